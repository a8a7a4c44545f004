"""Cells on a real Ray cluster of several nodes: workers, a node and the driver are killed, and nothing shows it."""

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exporter.pipeline.profiles import source_text
from tests.conftest import DEMO, run_exporter
from tests.ray_cluster import LocalCluster, parent_of, title_of

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")

ARTIFACTS = (("gguf", "mxfp4-q8"), ("mxfp4", "mxfp4-bf16"))
CELLS = tuple(f"{fmt}-{recipe}" for fmt, recipe in ARTIFACTS)


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """Two artifacts, one of which copies no weights into its store, on a short text."""
    text = source_text("cpu")
    hardware, rest = text[: text.index("[[artifact]]")], text[text.index("[validate]") :]
    made = "".join(f'[[artifact]]\nformat = "{f}"\nrecipe = "{r}"\n\n' for f, r in ARTIFACTS)
    short = rest.replace("windows = 4", "windows = 2").replace("length = 512", "length = 256")
    path = tmp_path_factory.mktemp("profile") / "small.toml"
    path.write_text(hardware + made + short)
    return path


def arguments(profile, out):
    return ["matrix", "--run", "--model", str(DEMO), "--profile", str(profile), "--out", str(out), "--json"]


@pytest.fixture(scope="module")
def at_home(profile, tmp_path_factory):
    """What one machine makes: hash by name of every file but the reports, and what each journal says."""
    out = tmp_path_factory.mktemp("home")
    done = run_exporter(*arguments(profile, out))
    assert done.code == 0, done.err
    return contents(out), journals(out)


@pytest.fixture(scope="module")
def cluster():
    made = LocalCluster(3)
    yield made
    made.close()


class Driver:
    """The real command, on the cluster."""

    def __init__(self, profile, out, cluster, *more):
        command = [sys.executable, "-m", "exporter", *arguments(profile, out), *more]
        command += ["--executor", "ray", "--address", cluster.address]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=cluster.environment
        )

    def end(self):
        """Its answer, after a good end, on the way to which only cells were spoken of."""
        out, err = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, err
        assert all(line.startswith(f"{DEMO.name}/small/") for line in err.splitlines()), err
        return json.loads(out)


@pytest.fixture
def drive(profile, cluster):
    """Starts drivers, and leaves none."""
    started = []

    def start(out, *more):
        started.append(Driver(profile, out, cluster, *more))
        return started[-1]

    yield start
    for driver in started:
        driver.process.kill()
        driver.process.communicate()


def contents(out):
    """SHA-256 of every file of every artifact that is not a measurement's."""
    found = {}
    for name in CELLS:
        folder = out / DEMO.name / "small" / name
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.name.startswith("report."):
                found[f"{name}/{path.relative_to(folder)}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def journals(out):
    """Digest by store, tensor and leaf. A leaf that is there twice must be the same both times."""
    found = {}
    for path in sorted(out.rglob("store/*/journal.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            key = path.parent.name, record["tensor"], record["leaf"]
            assert found.setdefault(key, record["digest"]) == record["digest"]
    return found


def left_over(out):
    """What no run may leave: partial folders, locks of workers, scratch."""
    return [p.name for p in out.rglob("*") if p.name.endswith(".partial") or p.name.startswith((".workers", ".proof"))]


def holder(out, cell):
    """The process that holds the lock of a cell; None where there is none."""
    inodes = {f":{path.stat().st_ino}" for path in out.rglob(f"*{cell}*.lease")}
    for line in Path("/proc/locks").read_text().splitlines():
        if "->" not in line and any(f"{inode} " in line for inode in inodes):
            return int(line.split()[4])
    return None


def taken(out, cell):
    """The process that holds the lock of a cell, once there is one: not one that waits for it."""
    until(lambda: holder(out, cell) is not None, 240)
    return holder(out, cell)


def until(true, seconds=120):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_lost_workers_and_a_lost_machine_do_not_show(at_home, cluster, drive, tmp_path):
    driver = drive(tmp_path)
    os.kill(cluster.stop_at("numbers of"), signal.SIGKILL)

    # A machine is lost while its worker lives on: the next one must not touch the cell before that worker has gone.
    zombie = taken(tmp_path, CELLS[0])
    os.kill(parent_of(zombie), signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):  # the kernel may hang up on what is stopped when its parent dies
        os.kill(zombie, signal.SIGSTOP)
    until(lambda: any(CELLS[0] in title for pid, title in cluster.workers().items() if pid != zombie))
    before = sorted(tmp_path.rglob("*gguf*"))
    time.sleep(0.5)
    assert sorted(tmp_path.rglob("*gguf*")) == before or not title_of(zombie)
    with contextlib.suppress(ProcessLookupError):
        os.kill(zombie, signal.SIGCONT)
    until(lambda: not title_of(zombie))

    os.kill(cluster.stop_at(f"small/{CELLS[1]}"), signal.SIGKILL)
    answer = driver.end()
    assert [row["status"] for row in answer["cells"]] == ["passed", "passed"]
    assert (contents(tmp_path), journals(tmp_path)) == at_home
    assert left_over(tmp_path) == []


@pytest.mark.slow
def test_a_killed_driver_goes_on_where_it_was(at_home, cluster, drive, tmp_path):
    """And one that is interrupted says so; what was there is not made again."""
    home = {name: digest for name, digest in at_home[0].items() if name.startswith(CELLS[1])}
    only = ("--format", "mxfp4")
    driver = drive(tmp_path, *only)
    worker = cluster.stop_at("numbers of")
    driver.process.send_signal(signal.SIGINT)
    os.kill(worker, signal.SIGCONT)
    _, err = driver.process.communicate(timeout=60)
    assert driver.process.returncode == 130
    assert "error: interrupted\n  hint: run the same command" in err

    driver = drive(tmp_path, *only)
    worker = cluster.stop_at(f"small/{CELLS[1]}")
    driver.process.kill()
    driver.process.wait()
    os.kill(worker, signal.SIGCONT)
    kept = {path: path.read_bytes() for path in tmp_path.rglob("store/*/*") if path.is_file()}

    (row,) = drive(tmp_path, *only).end()["cells"]
    assert row["status"] == "passed"
    assert contents(tmp_path) == home
    assert {path: path.read_bytes() for path in kept} == kept
    assert left_over(tmp_path) == []
    (row,) = drive(tmp_path, *only).end()["cells"]
    assert row["done_before"]


def test_a_machine_with_another_version_is_refused_by_name(cluster, drive, tmp_path):
    import exporter

    package = Path(exporter.__file__).parent
    shutil.copytree(package, tmp_path / "other" / "exporter", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(package.parent / "profiles", tmp_path / "other" / "profiles")
    with open(tmp_path / "other" / "exporter" / "errors.py", "a") as f:
        f.write("# changed\n")
    node = cluster.add(PYTHONPATH=str(tmp_path / "other"))
    try:
        driver = drive(tmp_path / "out")
        err = driver.process.communicate(timeout=120)[1]
    finally:
        cluster.remove(node)
    assert driver.process.returncode == 4, err
    assert "error: machine " in err
    assert f"exporter is {exporter.__version__} (" in err
    assert "install the same versions on all machines" in err
    assert left_over(tmp_path / "out") == []
