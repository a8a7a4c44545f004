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
from exporter.validate import limits
from exporter.validate.limits import Limit

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# (stage, done, total), as the worker gets on.
OnProgress = Callable[[str, int, int], None]

_PR_SET_PDEATHSIG = 1
_LOOK_SECONDS = 0.05  # between two looks at a child's memory
_LESS = "a recipe of fewer bits, a shorter --context, or a profile with more memory"


class WorkerDied(ExporterError):
    """The worker ended without saying why: it crashed, or was stopped at a limit."""


class TimedOut(WorkerDied):
    """It was not done in its time."""


class OverLimit(WorkerDied):
    """The worker needed more memory than it was given."""


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
    limit: Limit | None = None,
) -> dict[str, Any]:
    """What `python -m module` answers. An error that it says is an ExporterError, any other end a WorkerDied.

    It is stopped after `time_limit` seconds, and above `memory_limit` resident bytes (0: no limit). `limit`: enforced
    by the system where it can be, see limits.py; beyond it OverLimit, and what is known of it goes into the answer's
    "memory" (limit_bytes, limit_by, limit_peak_bytes, limit_read_again_bytes).
    `runtime` and `subject` name what runs what in those errors; `environment` is added to our own.
    `on_progress` is called from another thread.
    """
    # -P: a folder called `exporter` in the working directory must not be imported.
    command = command or (sys.executable, "-P", "-m", module)
    if limit is None:
        watch = _Watch(time_limit, subject, runtime, memory_limit)
        return _run(request, command, watch, environment, on_progress)
    with limits.enforced(limit) as enforced:
        watch = _Watch(time_limit, subject, runtime, enforced.watched, limit.reason)
        beyond = OverLimit(f"{subject} needs more than {limit.reason} in {runtime}", hint=_LESS)
        try:
            answer = _run(request, enforced.command(command), watch, environment, on_progress)
        except ExporterError as error:
            if enforced.exceeded(error.message):
                raise beyond from error
            raise
        if enforced.exceeded(""):  # a process of its own was ended, and it went on without
            raise beyond
        answer["memory"] = {**answer.get("memory", {}), **enforced.figures()}
    return answer


def _run(
    request: DataclassInstance,
    command: Sequence[str],
    watch: _Watch,
    environment: Mapping[str, str] | None,
    on_progress: OnProgress | None,
) -> dict[str, Any]:
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
                watch.wait(process)
            finally:  # also on Ctrl-C: nothing is left running
                process.kill()
                process.wait()
                reader.join()
        errors.seek(0)
        said = errors.read().decode("utf-8", "replace")
    return _answer(watch.runtime, watch.subject, process.returncode, result, said)


@dataclasses.dataclass(frozen=True)
class _Watch:
    """What ends a child from outside: seconds, and resident bytes (0: no limit); `reason`: whose these are."""

    time_limit: float
    subject: str
    runtime: str
    memory_limit: int
    reason: str = ""

    def wait(self, process: subprocess.Popen[bytes]) -> None:
        """Until the child ends by itself; WorkerDied as soon as it is beyond a limit."""
        deadline = time.monotonic() + self.time_limit
        while True:
            left = max(0.0, deadline - time.monotonic())
            try:
                process.wait(min(left, _LOOK_SECONDS) if self.memory_limit else left)
                return
            except subprocess.TimeoutExpired:
                pass
            if self.memory_limit and _resident(process.pid) > self.memory_limit:
                if self.reason:
                    raise OverLimit(f"{self.subject} needs more than {self.reason} in {self.runtime}", hint=_LESS)
                raise WorkerDied(
                    f"{self.subject} used more than {self.memory_limit / 1e9:.3g} GB of memory in {self.runtime}",
                    hint="a machine with more memory, or a higher limit",
                )
            if time.monotonic() >= deadline:
                raise TimedOut(
                    f"{self.subject} did not finish in {self.runtime} within {self.time_limit:g} s",
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
    reason = last_words(said)
    raise WorkerDied(f"{runtime} {how} while running {subject}" + (f": {reason}" if reason else ""), hint=hint)


def last_words(said: str) -> str:
    """The line of native output that tells most: the last that speaks of an error, else the last."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if "rror" in line or "GGML_ASSERT" in line]
    return (telling or lines or [""])[-1][:300]


# The child's side


def serve(run: Callable[[dict[str, Any], OnProgress], dict[str, Any]]) -> int:
    """Answer the request on stdin with what `run(request, report)` gives; the exit code."""
    die_with_parent()
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


def peak() -> int | None:
    """Peak resident bytes of this process so far."""
    return memory()["peak_rss_bytes"]


def load_average() -> float | None:
    """Processes that wanted to run in the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def die_with_parent() -> None:
    """A killed parent must not leave a model in memory. Linux only; elsewhere the run just ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
