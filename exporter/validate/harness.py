"""Harnesses that score a model through its endpoint: how each is started, and what it leaves behind.

They live in environments of their own, with pins of their own, and are never imported here.
lm-eval (EleutherAI/lm-evaluation-harness 0.4.13): `lm_eval run`, results_*.json and samples_*.jsonl.
gpt-oss-evals (openai/gpt-oss, gpt_oss/evals): writes into the system's folder for temporary files and says where.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from exporter.errors import ExporterError, Refused, UsageError
from exporter.validate.statistics import standard_error

Name = Literal["lm-eval", "gpt-oss-evals"]
_JSON_CAP = 1 << 30  # bytes
# Of the metrics that a task has, the one that counts; a part "flexible-extract" is preferred (see published.trap).
_METRICS = ("exact_match", "acc", "pass@1", "f1", "bleu", "acc_norm")
_FILTERS = ("flexible-extract", "none", "custom-extract", "strict-match")


@dataclass(frozen=True)
class Harness:
    """module: what `python -m` runs. distribution: what pip calls it. install: the command that cures its absence."""

    name: Name
    module: str
    distribution: str
    install: str


_INSTALL = "in an environment of its own: python -m venv harness && harness/bin/pip install {0}"
HARNESSES: dict[str, Harness] = {
    "lm-eval": Harness("lm-eval", "lm_eval", "lm_eval", _INSTALL.format("'lm_eval[api]==0.4.13'")),
    "gpt-oss-evals": Harness(
        "gpt-oss-evals", "gpt_oss.evals", "gpt-oss", _INSTALL.format("'gpt-oss[eval]' (Python 3.12 or newer)")
    ),
}


@dataclass(frozen=True)
class Score:
    """One task. score: a share. questions: its score by question, where the harness says; `metric` as it names it.

    by_likelihood: answers were chosen by log-probability, not written.
    """

    task: str
    metric: str
    score: float
    n: int
    stderr: float | None
    questions: dict[str, float] = field(default_factory=dict)
    by_likelihood: bool = False


@dataclass(frozen=True)
class Ask:
    """What a harness is to do. url: of the endpoint, up to /v1. chat: by chat completions, else by completions.

    context: tokens that the endpoint takes. limit: questions of each task, None for all. seconds: for one request.
    """

    tasks: Sequence[str]
    url: str
    model: str
    chat: bool
    effort: str
    context: int
    max_tokens: int
    seconds: int
    limit: int | None = None
    task_dir: Path | None = None


def version(harness: Harness, python: str) -> str:
    """The harness's version in the environment of `python`. Raises Refused where it is not there."""
    code = (
        "import importlib.metadata as m, importlib.util as u, sys\n"
        f"if u.find_spec({harness.module!r}) is None: sys.exit(3)\n"
        f"try: print(m.version({harness.distribution!r}))\n"
        "except m.PackageNotFoundError: print('from its sources')"
    )
    try:
        done = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"{python} cannot be run ({error})", hint="--python names an interpreter") from None
    if done.returncode != 0:  # find_spec raises where a parent package is missing
        raise Refused(f"{harness.name} is not installed in {python}", hint=f"{harness.install}; then --python")
    return done.stdout.strip() or "unknown"


def command(harness: Harness, python: str, ask: Ask, folder: Path) -> list[str]:
    """The command line that runs it; results go to `folder` where the harness lets us say so."""
    return _lm_eval(python, ask, folder) if harness.name == "lm-eval" else _gpt_oss(python, ask)


def _lm_eval(python: str, ask: Ask, folder: Path) -> list[str]:
    arguments = {
        "model": ask.model,
        "base_url": f"{ask.url}/{'chat/completions' if ask.chat else 'completions'}",
        # The endpoint's own tokens, so that none of another version of the tokenizer are asked.
        "tokenizer_backend": "None" if ask.chat else "remote",
        "num_concurrent": "1",
        "max_retries": "1",  # a failure is a failure: asked again, it would be another answer
        "timeout": str(ask.seconds),
        "max_length": str(ask.context),
    }
    made = [python, "-m", "lm_eval", "run", "--model", "local-chat-completions" if ask.chat else "local-completions"]
    made += ["--model_args", ",".join(f"{k}={v}" for k, v in arguments.items())]
    made += ["--tasks", ",".join(ask.tasks), "--output_path", str(folder), "--log_samples"]
    if ask.chat:
        made += ["--apply_chat_template", "--gen_kwargs"]
        made += [f"max_gen_toks={ask.max_tokens},reasoning_effort={ask.effort}"]
    if ask.limit is not None:
        made += ["--limit", str(ask.limit)]
    if ask.task_dir is not None:
        made += ["--include_path", str(ask.task_dir.absolute())]
    return made


def _gpt_oss(python: str, ask: Ask) -> list[str]:
    made = [python, "-m", "gpt_oss.evals", "--sampler", "chat_completions", "--base-url", ask.url]
    made += ["--model", ask.model, "--reasoning-effort", ask.effort, "--eval", ",".join(ask.tasks), "--n-threads", "4"]
    return made + (["--examples", str(ask.limit)] if ask.limit is not None else [])


def scores(harness: Harness, ask: Ask, folder: Path, said: str) -> list[Score]:
    """What the harness found; `said` is what it printed. Raises ExporterError where it left nothing to read."""
    found = _lm_eval_scores(ask, folder) if harness.name == "lm-eval" else _gpt_oss_scores(ask, said)
    if not found:
        raise ExporterError(
            f"{harness.name} left no scores that are shares of answers", hint="run it by hand against `exporter serve`"
        )
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _JSON_CAP:
            raise ValueError("too large")
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise ExporterError(f"{path.name} of the harness cannot be read ({error})", hint="run it again") from None
    return found


# lm-eval


def _lm_eval_scores(ask: Ask, folder: Path) -> list[Score]:
    files = sorted(folder.rglob("results_*.json"))
    if not files:
        return []
    report = _read(files[-1])
    made = []
    for task, metrics in report.get("results", {}).items():
        key = _metric(metrics)
        if key is None:
            continue
        name, _, part = key.partition(",")
        parts = _parts(task, report.get("group_subtasks") or {})
        questions = {
            (number if len(parts) == 1 else f"{each} {number}"): value
            for each in parts
            for number, value in _questions(files[-1].parent, each, name, part).items()
        }
        n = len(questions) or sum(_count(report, each) for each in parts)
        error = metrics.get(f"{name}_stderr,{part}")
        error = float(error) if isinstance(error, int | float) else standard_error(list(questions.values()))
        kinds = {report.get("configs", {}).get(each, {}).get("output_type") for each in parts}
        if n:
            made.append(Score(task, key, float(metrics[key]), n, error, questions, kinds != {"generate_until"}))
    return made


def _parts(task: str, groups: dict[str, list[str]], depth: int = 8) -> list[str]:
    """The tasks of a group, of which only they have questions; the task itself where it is none."""
    below = groups.get(task)
    return [leaf for each in below for leaf in _parts(each, groups, depth - 1)] if below and depth else [task]


def _count(report: dict[str, Any], task: str) -> int:
    return int(report.get("n-samples", {}).get(task, {}).get("effective", 0))


def _metric(metrics: dict[str, Any]) -> str | None:
    """The key of the metric that counts, "exact_match,flexible-extract"; None where none is a share of the answers."""
    numbers = {k: v for k, v in metrics.items() if "," in k and "_stderr" not in k and isinstance(v, int | float)}
    keys = [k for k, v in numbers.items() if 0 <= v <= 1]  # not a perplexity; not NaN
    ranked = [f"{name},{part}" for name in _METRICS for part in _FILTERS]
    return next((k for k in ranked if k in keys), keys[0] if keys else None)


def _questions(folder: Path, task: str, metric: str, part: str) -> dict[str, float]:
    """Score by question: its number and the digest of what was asked, so that only the same one is the same."""
    found: dict[str, float] = {}
    files = sorted(folder.glob(f"samples_{task}_*.jsonl"))
    if not files:
        return found
    with files[-1].open(encoding="utf-8") as lines:
        for line in lines:
            try:
                sample = json.loads(line)
                value, name = sample.get(metric), f"{sample.get('doc_id')} {str(sample.get('doc_hash', ''))[:16]}"
            except (ValueError, AttributeError, RecursionError):
                raise ExporterError(f"{files[-1].name} of the harness cannot be read", hint="run it again") from None
            if sample.get("filter", "none") == part and isinstance(value, int | float | bool):
                found[name] = float(value)
    return found


# gpt-oss-evals


def _gpt_oss_scores(ask: Ask, said: str) -> list[Score]:
    made = []
    for path in re.findall(r"^Writing all results to (.+_allresults\.json)$", said, re.MULTILINE):
        report = _read(Path(path))
        task = next((t for t in ask.tasks if Path(path).name.startswith(f"{t}_{ask.model}-")), Path(path).stem)
        n = len(report.get("convos") or [])
        score, spread = report.get("score"), (report.get("metrics") or {}).get("score:std")
        if n and isinstance(score, int | float):
            error = float(spread) / n**0.5 if n > 1 and isinstance(spread, int | float) else None
            made.append(Score(task, "score", float(score), n, error))
    return made
