"""A worker's limits and ends, with small programs in its place."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import pytest

from exporter.errors import ExporterError
from exporter.validate.child import WorkerDied, memory, run_worker

LIMIT = 300 << 20


@dataclass(frozen=True)
class Question:
    text: str = "?"


def run(code: str, time_limit: float = 60, **settings: Any) -> dict[str, Any]:
    """`code` in place of a worker."""
    command = (sys.executable, "-c", code)
    return run_worker(Question(), "", time_limit, runtime="runtime", subject="x.onnx", command=command, **settings)


def served(body: str) -> str:
    """A worker that answers what `body` returns, given `asked` and `report`."""
    return f"from exporter.validate.child import *\ndef run(asked, report):\n    {body}\nsys.exit(serve(run))"


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    before = psutil.Process().children(recursive=True)
    yield
    assert psutil.Process().children(recursive=True) == before


EATS = "import time\nkept = []\nfor _ in range(60):\n    kept.append(bytearray(16 << 20))\n    time.sleep(0.02)"


def test_a_child_that_eats_memory() -> None:
    started = time.monotonic()
    with pytest.raises(WorkerDied, match=r"^x\.onnx used more than 0\.315 GB of memory in runtime$"):
        run(EATS, memory_limit=LIMIT)
    assert time.monotonic() - started < 20


def test_a_child_below_the_limit() -> None:
    said: list[tuple[Any, ...]] = []
    body = "kept = bytearray(100 << 20); report('half', 1, 2); time.sleep(0.3); return {'asked': asked, **memory()}"
    answer = run(served(body), memory_limit=LIMIT, on_progress=lambda *done: said.append(done))
    assert answer["asked"] == {"text": "?"}
    assert 100 << 20 < answer["peak_rss_bytes"] < LIMIT
    assert said == [("half", 1, 2)]


@pytest.mark.parametrize("limit", [0, LIMIT])
def test_a_child_that_hangs(limit: int) -> None:
    with pytest.raises(WorkerDied, match=r"^x\.onnx did not finish in runtime within 0\.3 s$"):
        run("import time; time.sleep(60)", 0.3, memory_limit=limit)


@pytest.mark.parametrize("limit", [0, LIMIT])
def test_a_child_that_dies_by_a_signal(limit: int) -> None:
    with pytest.raises(WorkerDied, match=r"^runtime was killed by SIGSEGV while running x\.onnx$"):
        run("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", memory_limit=limit)


def test_an_error_that_the_child_says_is_no_death() -> None:
    with pytest.raises(ExporterError, match=r"^it is too hot$") as error:
        run(served("raise ExporterError('it is too hot', hint='wait')"), memory_limit=LIMIT)
    assert not isinstance(error.value, WorkerDied)
    assert error.value.hint == "wait"


def test_ctrl_c_while_memory_is_watched() -> None:
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run("import time; time.sleep(60)", memory_limit=LIMIT)
    assert time.monotonic() - started < 30


def test_memory_of_this_process() -> None:
    found = memory()
    assert (found["peak_rss_bytes"] or 0) >= (found["anonymous_bytes"] or 0) > 1 << 20
