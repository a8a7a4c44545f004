"""exporter serve, the command: how it starts, how it ends, and what it says when it cannot."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import DEMO, run_exporter
from tests.served import make


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("serve"), ("gguf", "mxfp4-q8", ""))["gguf"]


@contextmanager
def started(*arguments: Any) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any], psutil.Process]]:
    """`exporter serve`, what it says once it is ready, and its worker."""
    command = [sys.executable, "-m", "exporter", "serve", *map(str, arguments), "--threads", "1", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            facts = json.loads(process.stdout.readline())
            (worker,) = psutil.Process(process.pid).children()
            yield process, facts, worker
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_when_it_is_told_to(artifact: Path, number: int) -> None:
    with started(artifact, "-c", 64, "--name", "tiny") as (process, facts, worker):
        assert (facts["model"], facts["context"], facts["chat"]) == ("tiny", 64, True)
        assert facts["runtime"].startswith("llama.cpp")
        with urllib.request.urlopen(facts["url"] + "/models", timeout=20) as answer:
            assert [m["id"] for m in json.load(answer)["data"]] == ["tiny"]
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out, err) == (0, "", "")
        assert not worker.is_running()


def test_a_runtime_that_dies_is_one_clear_line(artifact: Path) -> None:
    with started(artifact, "-c", 64) as (process, facts, worker):
        os.kill(worker.pid, signal.SIGSEGV)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert err.splitlines()[0].startswith(f"error: {facts['runtime']} was killed by SIGSEGV while serving")
    assert len(err.splitlines()) == 2


def test_a_request_under_way_when_the_runtime_dies_gets_an_answer(artifact: Path) -> None:
    with started(artifact) as (process, facts, worker), ThreadPoolExecutor(1) as pool:
        body = json.dumps({"prompt": "x", "max_tokens": 30000, "temperature": 0}).encode()
        asked = urllib.request.Request(facts["url"] + "/completions", body, {"Content-Type": "application/json"})
        before = worker.cpu_times().user
        under_way = pool.submit(urllib.request.urlopen, asked, timeout=60)
        while worker.cpu_times().user < before + 0.1:
            time.sleep(0.02)
        worker.kill()
        with pytest.raises(urllib.error.HTTPError) as found:
            under_way.result(60)
        with found.value as answer:
            assert answer.code == 503
            assert "was killed by SIGKILL" in json.loads(answer.read())["error"]["message"]
        _, err = process.communicate(timeout=20)
        assert (process.returncode, len(err.splitlines())) == (1, 2)


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["nothing-here"], 2, "does not exist"),
        ([DEMO / "config.json"], 2, "is no GGUF and no ONNX file"),
        ([DEMO, "--context", "99999999"], 2, "99,999,999 are asked for"),
        ([DEMO, "--host", "256.1.1.1"], 2, "cannot listen on 256.1.1.1"),
    ],
    ids=lambda each: str(each)[:30],
)
def test_what_cannot_be_served_is_one_line(arguments: list[Any], code: int, line: str) -> None:
    done = run_exporter("serve", *arguments)
    assert (done.code, done.out) == (code, "")
    assert line in done.err.splitlines()[0]
    assert len(done.err.splitlines()) == 2


def test_a_port_in_use_is_one_line(artifact: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run_exporter("serve", artifact, "-c", 64, "--port", taken.getsockname()[1])
    assert done.code == 2
    assert "Address already in use" in done.err.splitlines()[0]


def test_a_damaged_file_is_one_line(artifact: Path, tmp_path: Path) -> None:
    (path,) = artifact.glob("*.gguf")
    raw_bytes = path.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(raw_bytes[: len(raw_bytes) // 2])
    done = run_exporter("serve", tmp_path / "cut.gguf")
    assert done.code in (1, 4)
    assert len(done.err.splitlines()) == 2
