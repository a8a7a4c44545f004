"""A runtime in a process of its own, from both sides.

Native code can crash, hang or fill the memory, and memory can only be measured in a process that did nothing
else. A request comes to the child as JSON on stdin; it says JSON lines on stdout: progress, then one answer
or error. Whatever else happens to it (a crash, a hang, silence) becomes one line as well.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from exporter.errors import ExporterError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# (stage, done, total), as the worker gets on.
OnProgress = Callable[[str, int, int], None]

_PR_SET_PDEATHSIG = 1
_LOOK_SECONDS = 0.05  # between two looks at a child's memory


class WorkerDied(ExporterError):
    """The worker ended without saying why: it crashed, or was stopped at a limit."""


# The parent's side


def run_worker(
    request: DataclassInstance,
    module: str,
    time_limit: float,
    *,
    runtime: str,
    subject: str,
    command: Sequence[str] | None = None,
    environment: Mapping[str, str] | None = None,
    on_progress: OnProgress | None = None,
    memory_limit: int = 0,
) -> dict[str, Any]:
    """What `python -m module` answers. An error that it says is an ExporterError, any other end a WorkerDied.

    It is stopped after `time_limit` seconds, and above `memory_limit` resident bytes (0: no limit).
    `runtime` and `subject` name what runs what in those errors; `environment` is added to our own.
    `on_progress` is called from another thread.
    """
    # -P: a folder called `exporter` in the working directory must not be imported.
    command = command or (sys.executable, "-P", "-m", module)
    with tempfile.TemporaryFile() as question, tempfile.TemporaryFile() as errors:
        question.write(json.dumps(dataclasses.asdict(request)).encode())
        question.seek(0)
        with subprocess.Popen(
            command,
            stdin=question,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        ) as process:
            result: dict[str, Any] = {}
            reader = threading.Thread(target=_listen, args=(process.stdout, result, on_progress), daemon=True)
            reader.start()
            try:
                _wait(process, time_limit, memory_limit, subject, runtime)
            finally:  # also on Ctrl-C: nothing is left running
                process.kill()
                process.wait()
                reader.join()
        errors.seek(0)
        said = errors.read().decode("utf-8", "replace")
    return _answer(runtime, subject, process.returncode, result, said)


def _wait(process: subprocess.Popen[bytes], time_limit: float, memory_limit: int, subject: str, runtime: str) -> None:
    """Until the child ends by itself; WorkerDied as soon as it is beyond a limit."""
    deadline = time.monotonic() + time_limit
    while True:
        left = max(0.0, deadline - time.monotonic())
        try:
            process.wait(min(left, _LOOK_SECONDS) if memory_limit else left)
            return
        except subprocess.TimeoutExpired:
            pass
        if memory_limit and _resident(process.pid) > memory_limit:
            raise WorkerDied(
                f"{subject} used more than {memory_limit / 1e9:.3g} GB of memory in {runtime}",
                hint="a machine with more memory, or a higher limit",
            )
        if time.monotonic() >= deadline:
            raise WorkerDied(
                f"{subject} did not finish in {runtime} within {time_limit:g} s",
                hint="fewer windows or a longer limit; more threads than free cores are slow",
            )


def _resident(pid: int) -> int:
    """Resident bytes of a process without the pages of files, which the system can drop; 0 when it has just ended."""
    if sys.platform == "linux":
        try:
            found = _status(pid)
            return found.get("RssAnon", 0) + found.get("RssShmem", 0)
        except OSError:
            return 0
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _status(pid: int | str) -> dict[str, int]:
    """Fields of /proc/PID/status that are sizes, in bytes; none for a process that has ended. Raises OSError."""
    lines = (line.partition(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: int(value.split()[0]) * 1024 for name, _, value in lines if value.endswith(" kB")}


def _listen(lines: IO[bytes], result: dict[str, Any], on_progress: OnProgress | None) -> None:
    """Read JSON lines until the worker ends; the last that is not progress is the result."""
    for line in lines:
        try:
            message = json.loads(line)
        except ValueError:
            continue
        if not isinstance(message, dict):
            continue
        if "progress" not in message:
            result.update(message)
        elif on_progress:
            on_progress(*message["progress"])


def _answer(runtime: str, subject: str, code: int, result: dict[str, Any], said: str) -> dict[str, Any]:
    if "error" in result:
        raise ExporterError(result["error"]["message"], hint=result["error"]["hint"])
    if code == 0 and "answer" in result:
        answer: dict[str, Any] = result["answer"]
        return answer
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
    hint = "not enough memory?" if code == -signal.SIGKILL else "exporter doctor, then make the file again"
    reason = _last_words(said)
    raise WorkerDied(f"{runtime} {how} while running {subject}" + (f": {reason}" if reason else ""), hint=hint)


def _last_words(said: str) -> str:
    """The line of native output that tells most: the last that speaks of an error, else the last."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if "rror" in line or "GGML_ASSERT" in line]
    return (telling or lines or [""])[-1][:300]


# The child's side


def serve(run: Callable[[dict[str, Any], OnProgress], dict[str, Any]]) -> int:
    """Answer the request on stdin with what `run(request, report)` gives; the exit code."""
    _die_with_parent()
    # Native code may print to stdout: keep the real one for the answer, give it stderr instead.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    try:
        say({"answer": run(json.load(sys.stdin), lambda *done: say({"progress": done}))})
    except ExporterError as error:
        say({"error": {"message": error.message, "hint": error.hint}})
        return error.exit_code
    return 0


def memory() -> dict[str, int | None]:
    """Peak resident bytes of this process so far, and what of the present is not file pages.

    From /proc: ru_maxrss survives exec on Linux, so it may be the parent's peak.
    """
    fields: dict[str, int] = {}
    try:
        fields = _status("self")
    except OSError:
        import psutil

        info = psutil.Process().memory_info()
        fields["VmHWM"] = getattr(info, "peak_wset", info.rss)
    return {"peak_rss_bytes": fields.get("VmHWM"), "anonymous_bytes": fields.get("RssAnon")}


def load_average() -> float | None:
    """Processes that wanted to run in the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _die_with_parent() -> None:
    """A killed parent must not leave a model in memory. Linux only; elsewhere the run just ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
