"""Scores of an artifact in tasks: a harness asks its endpoint, and what the score can show is said beside it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import ExporterError, UsageError, did_you_mean
from exporter.pipeline import serve
from exporter.pipeline.files import write_whole
from exporter.pipeline.progress import Progress
from exporter.pipeline.serve import Served, endpoint
from exporter.validate import harness, published, statistics
from exporter.validate.endpoint.server import Server
from exporter.validate.harness import HARNESSES, Harness, Score
from exporter.validate.published import EFFORTS, Effort

SCHEMA = 1
_SCORES_CAP = 256 << 20  # bytes
_API = ("auto", "chat", "completions")


@dataclass(frozen=True)
class Ask:
    """What to score. limit: questions of each task, None for all. python: of the harness's environment.

    api: "chat", "completions", or "auto" by the task's name. against: scores of another run of the same questions.
    seconds: for all of it.
    """

    artifact: Path
    tasks: Sequence[str]
    harness: str = "lm-eval"
    limit: int | None = None
    python: str = sys.executable
    task_dir: Path | None = None
    effort: Effort = "medium"
    api: str = "auto"
    max_tokens: int = 32768
    context: int = 0
    threads: int = 0
    seconds: float = 24 * 3600.0
    out: Path | None = None
    against: Path | None = None


def score(ask: Ask, progress: Progress) -> dict[str, Any]:
    """`tasks` (report.json's entries), `questions` (by task, the score of each), and what made them.

    With `against`, each task says as "paired" how it differs from that run, question by question. Raises UsageError,
    Refused where the harness is not installed, and ExporterError where it fails; nothing runs for hours before that.
    """
    tool, api = _require_sound(ask)
    other = read_scores(ask.against) if ask.against else None
    version = harness.version(tool, ask.python)
    # gpt_oss.evals asks again, for ever, where an answer is empty.
    no_answer = "(no answer)" if tool.name == "gpt-oss-evals" else ""
    asked = serve.Ask(ask.artifact, context=ask.context, threads=ask.threads, no_answer=no_answer)
    with _running(asked) as (server, served):
        todo = harness.Ask(
            tasks=ask.tasks,
            url=server.url,
            model=served.name,
            chat=api == "chat",
            effort=ask.effort,
            context=served.context,
            max_tokens=min(ask.max_tokens, served.context),
            seconds=int(ask.seconds),
            limit=ask.limit,
            task_dir=ask.task_dir,
        )
        progress.stage(f"{tool.name}: {', '.join(ask.tasks)}", 0)
        started = time.monotonic()
        found = _run(tool, todo, ask, server)
        progress.done()
        runtime = server.service.worker.runtime
    report = {
        "schema": SCHEMA,
        "artifact": str(ask.artifact),
        "model": served.name,
        "runtime": runtime,
        "harness": {"name": tool.name, "version": version},
        "api": api,
        "effort": ask.effort if api == "chat" else None,
        "max_tokens": todo.max_tokens if api == "chat" else None,
        "seconds": time.monotonic() - started,
        "tasks": [entry(each, f"{tool.name} {version}", tool.name, served.released, ask.effort, api) for each in found],
        "questions": {each.task: each.questions for each in found},
    }
    if other:
        _pair(report, other)
    if ask.out:
        write_whole(ask.out, json.dumps(report, indent=1) + "\n")
    return report


def _require_sound(ask: Ask) -> tuple[Harness, str]:
    """The harness and the interface. Raises UsageError."""
    if ask.harness not in HARNESSES:
        raise UsageError(f'no harness "{ask.harness}".{did_you_mean(ask.harness, HARNESSES)}', ", ".join(HARNESSES))
    if not ask.tasks or not all(re.fullmatch(r"[\w.:+-]+", task) for task in ask.tasks):
        raise UsageError("--task names tasks of the harness, separated by commas", hint="python -m lm_eval ls tasks")
    if ask.effort not in EFFORTS or ask.api not in _API:
        raise UsageError("--effort is low, medium or high; --api auto, chat or completions", hint="--help")
    if ask.task_dir is not None and not ask.task_dir.is_dir():
        raise UsageError(f"{ask.task_dir} is no folder", hint="--task-dir holds the YAML files of tasks of your own")
    if ask.out is not None and not ask.out.parent.is_dir():
        raise UsageError(f"{ask.out.parent} does not exist", hint="make it, or choose another --out")
    tool = HARNESSES[ask.harness]
    if tool.name != "lm-eval":
        if ask.api == "completions" or ask.task_dir:
            raise UsageError(f"{tool.name} asks by chat, for its own tasks", hint="without --api and --task-dir")
        return tool, "chat"
    kinds = {published.by_likelihood(task) for task in ask.tasks}
    if ask.api == "auto" and len(kinds) > 1:
        raise UsageError("some of these tasks choose by log-probability, others write", hint="one kind at a time")
    return tool, ask.api if ask.api != "auto" else "completions" if kinds == {True} else "chat"


@contextmanager
def _running(asked: serve.Ask) -> Iterator[tuple[Server, Served]]:
    """The endpoint, answering in a thread."""
    ready: list[Served] = []
    with endpoint(asked, lambda server, served: ready.append(served)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server, ready[0]
        finally:
            server.shutdown()
            thread.join()


def _run(tool: Harness, todo: harness.Ask, ask: Ask, server: Server) -> list[Score]:
    """Run the harness to its end; its scores. It is stopped when the endpoint or the time ends."""
    with tempfile.TemporaryDirectory(prefix="exporter-score-") as folder, tempfile.TemporaryFile() as said:
        # abspath, not resolve: a link is how an environment's interpreter knows its environment.
        python = os.path.abspath(ask.python) if os.path.dirname(ask.python) else ask.python
        words = harness.command(tool, python, todo, Path(folder))
        # From an empty folder: its own cache and modules, not those of where we are.
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
            cwd=folder,
            env=_environment(),
        )
        deadline = time.monotonic() + ask.seconds
        try:
            while process.poll() is None:
                server.service.require_alive()
                if time.monotonic() > deadline:
                    raise ExporterError(
                        f"{tool.name} was not done after {ask.seconds:g} s", hint="a smaller --limit, or more --seconds"
                    )
                time.sleep(0.1)
        finally:
            _stop(process)
        said.seek(0)
        text = said.read().decode("utf-8", "replace")
        if process.returncode != 0:
            server.service.require_alive()
            raise _failure(tool, process.returncode, text, todo)
        return harness.scores(tool, todo, Path(folder), text)


def _environment() -> dict[str, str]:
    """Ours, with what its clients need; PYTHONPATH made absolute, since it runs in another folder."""
    own = {"OPENAI_API_KEY": "none", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}  # the client insists on a key
    if found := os.environ.get("PYTHONPATH"):
        own["PYTHONPATH"] = os.pathsep.join(os.path.abspath(p) for p in found.split(os.pathsep) if p)
    return {**os.environ, **own}


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End it and what it started."""
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()


def _failure(tool: Harness, code: int, text: str, todo: harness.Ask) -> ExporterError:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\b\w*(Error|Exception)\b", line)]
    reason = (errors or lines or ["it said nothing"])[-1][:300]
    hint = f"by hand: exporter serve, then python -m {tool.module} --help"
    if "Loglikelihood is not supported" in text:
        hint = "--api completions"
    elif "not found" in reason.lower() or "No module" in reason:
        hint = f"python -m {tool.module} --help; --task-dir for tasks of your own"
    return ExporterError(f"{tool.name} exited with {code} on {', '.join(todo.tasks)}: {reason}", hint=hint)


# What a score shows


def entry(found: Score, harness_name: str, harness: str, model: str | None, effort: Effort, api: str) -> dict[str, Any]:
    """One task of report.json: the score, the published one, and what a run of this size can show."""
    words = api == "chat" and not found.by_likelihood
    reference = published.published(harness, found.task, model, effort) if words else None
    limit = None if reference is None else statistics.threshold(reference, found.n)
    return {
        "task": found.task,
        "harness": harness_name,
        "metric": found.metric,
        "api": api,
        "score": found.score,
        "n": found.n,
        "stderr": found.stderr,
        "ci95": _interval(found),
        "published": reference,
        "published_source": None if reference is None else published.SOURCE,
        "published_effort": None if reference is None else effort,
        "effort": effort if api == "chat" else None,
        "threshold": limit,
        "detects": statistics.detectable(found.n),
        "verdict": _verdict(found, model, reference, limit),
        "note": published.LIKELIHOOD if found.by_likelihood else published.trap(found.task),
    }


def _interval(found: Score) -> list[float] | None:
    interval = statistics.interval(list(found.questions.values()))
    return list(interval) if interval else None


def _verdict(found: Score, model: str | None, reference: float | None, limit: float | None) -> str:
    loss = statistics.detectable(found.n)
    shows = f"a run of {found.n:,} can show a loss of {100 * loss:.1f} points or more"
    if loss >= 1:
        shows = f"a run of {found.n:,} can show nothing"
    if reference is None or limit is None:
        why = "no published score for this way of asking" if model else "no released model of this size"
        return f"not compared ({why}); {shows}"
    if found.score < limit:
        return f"below {100 * limit:.1f} %: worse than published, of which a sound run is accused once in 20"
    return f"not below {100 * limit:.1f} %; {shows}"


# Against another run


def read_scores(path: Path) -> dict[str, Any]:
    """A file that `score` wrote. Raises UsageError."""
    try:
        if not path.is_file() or path.stat().st_size > _SCORES_CAP:
            raise ValueError("no file of scores")
        found = json.loads(path.read_bytes())
        sound = isinstance(found, dict) and found.get("schema") == SCHEMA and isinstance(found.get("questions"), dict)
        if not sound or not all(_is_scores(each) for each in found["questions"].values()):
            raise ValueError("not what `exporter score --out` writes")
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read ({error})", hint="exporter score ... --out FILE makes one") from None
    return dict(found)


def _is_scores(value: object) -> bool:
    return isinstance(value, dict) and all(type(v) in (int, float) for v in value.values())


def _pair(report: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Add "paired" to each task. Raises UsageError where the other run has not the same questions."""
    for each in report["tasks"]:
        first, second = other["questions"].get(each["task"]), report["questions"][each["task"]]
        if first is None:
            raise UsageError(f"the other run has no {each['task']}", hint="run both with the same --task")
        pair = statistics.paired(first, second)
        each["paired"] = {"against": str(other.get("model")), **pair.json()}
