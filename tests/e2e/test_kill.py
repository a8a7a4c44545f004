"""kill -9 at many points of the real command, then the same command again: the same bytes, nothing half-done.

The child counts what it does to the disk and kills itself before a chosen event, so that every kind of
moment is met: in the store, in the journal, between two writes of a leaf, before and after a rename.
"""

import hashlib
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import DEMO, run_exporter

COUNTED = """
import os, signal, sys
limit, log = int(sys.argv[1]), sys.argv[2]
count = 0
def counted(name):
    real = getattr(os, name)
    def call(*a, **k):
        global count
        count += 1
        if count == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*a, **k)
    setattr(os, name, call)
for name in ("pwrite", "write", "replace", "fsync", "ftruncate", "posix_fallocate"):
    counted(name)
from exporter.cli import main
try:
    main(sys.argv[3:])
finally:
    open(log, "w").write(str(count))
"""


def arguments(out):
    # One worker: the same event then means the same moment in every run.
    return ["quantize", "--profile", "16gb", str(DEMO), "--out", str(out), "--until", "export", "--max-memory", "310M"]


def killed_at(event, out, tmp_path):
    """Run the command until it kills itself before its `event`th write; its return code."""
    command = [sys.executable, "-c", COUNTED, str(event), str(tmp_path / "events"), *arguments(out)]
    return subprocess.run(command, capture_output=True, check=False).returncode


def contents(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def artifact(out):
    return out / "tiny-gpt-oss" / "16gb" / "gguf-mxfp4-q8"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(contents of the artifact, number of disk events) of a run that nobody disturbed."""
    tmp = tmp_path_factory.mktemp("whole")
    assert killed_at(0, tmp / "out", tmp) == 0
    return contents(artifact(tmp / "out")), int((tmp / "events").read_text())


# Shares of the run, and exact distances from its end, where files get their names.
POINTS = [*(i / 16 for i in range(16)), *range(-8, 0)]


@pytest.mark.parametrize("point", POINTS)
def test_killed_and_resumed_gives_the_same_bytes(point, uninterrupted, tmp_path):
    whole, events = uninterrupted
    event = events + 1 + point if point < 0 else int(1 + point * events)
    out = tmp_path / "out"
    assert killed_at(event, out, tmp_path) == -signal.SIGKILL
    if artifact(out).exists():
        assert contents(artifact(out)) == whole  # a final name means finished
    done = run_exporter(*arguments(out))
    assert done.code == 0, done.err
    assert contents(artifact(out)) == whole
    assert [p.name for p in artifact(out).parent.iterdir()] == [artifact(out).name]


def test_killed_again_and_again(uninterrupted, tmp_path):
    """Each run gets a little further than the one before; what is done is never redone."""
    whole, events = uninterrupted
    out, tries = tmp_path / "out", 0
    while killed_at(events // 4, out, tmp_path) == -signal.SIGKILL:
        tries += 1
        assert tries < 12
    assert tries >= 2
    assert contents(artifact(out)) == whole


def test_a_torn_leaf_is_written_again(uninterrupted, tmp_path):
    """Power loss: the journal reached the disk, some pages of data did not."""
    whole, events = uninterrupted
    out = tmp_path / "out"
    killed_at(int(events * 0.9), out, tmp_path)
    for path in [*out.rglob("data.bin"), *out.rglob("*.gguf")]:
        with open(path, "r+b") as f:
            f.seek(path.stat().st_size // 3)
            f.write(bytes(5000))
    for journal in out.rglob("*.jsonl"):
        text = journal.read_text().replace('{"closed": true}\n', "")
        journal.write_text(text + '{"tensor": "model.la')  # and the last line is torn
    assert run_exporter(*arguments(out)).code == 0
    assert contents(artifact(out)) == whole


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_politely(stop, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "exporter", *arguments(out)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not list(out.rglob("journal.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.002)
    child.send_signal(stop)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "error: interrupted" in err
    assert "run the same command" in err
    assert "Traceback" not in err
    assert run_exporter(*arguments(out)).code == 0


def test_a_second_run_on_the_same_output_is_refused(tmp_path):
    import fcntl

    folder = tmp_path / "tiny-gpt-oss"
    folder.mkdir()
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.write(descriptor, b"4711\n")
    done = run_exporter(*arguments(tmp_path))
    assert done.code == 4
    assert "in use by another run (process 4711)" in done.err


def test_nothing_is_redone(tmp_path):
    assert run_exporter(*arguments(tmp_path)).code == 0
    made = artifact(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in [*made.iterdir(), *tmp_path.rglob("data.bin")]}
    assert run_exporter(*arguments(tmp_path)).code == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
