"""What several processes share: the output folder, a store that others fill and read, and what makes them alike."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from exporter.errors import ExporterError, MissingExtra, Refused, UsageError
from exporter.pipeline import workers
from exporter.pipeline.artifact import alone
from exporter.pipeline.cells import Cell, Settings
from exporter.pipeline.cluster import run_on_ray
from exporter.pipeline.cluster.jobs import Jobs
from exporter.pipeline.cluster.ticket import Ticket, environment, look, versions
from exporter.pipeline.cluster.work import Outcome, fill, perform
from exporter.pipeline.profiles import load_profile
from exporter.pipeline.progress import Progress
from exporter.pipeline.quantize import obtain, quantize, quantize_apart, tasks
from exporter.pipeline.source import open_model
from exporter.pipeline.store import Store, store_key
from exporter.pipeline.store_data import StoreData
from exporter.types import QTensor, Scheme, TensorSpec
from exporter.types.recipe import Recipe
from tests.conftest import DEMO

# Workers on an output folder

JOINS = """
import sys, time
from pathlib import Path
from exporter.errors import ExporterError
from exporter.pipeline.workers import joined
try:
    with joined(Path(sys.argv[1]), sys.argv[2], sys.argv[3]):
        print("in", flush=True)
        time.sleep(60)
except ExporterError as error:
    print(error.message, flush=True)
"""


class Worker:
    """Another process, in a folder until it is killed."""

    def __init__(self, folder, token, name=""):
        command = [sys.executable, "-c", JOINS, str(folder), token, name]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def says(self):
        return self.process.stdout.readline().strip()

    def kill(self):
        self.process.kill()
        self.process.communicate()


def test_workers_are_let_in_while_a_run_leads(tmp_path):
    with workers.leading(tmp_path) as token:
        workers.require_reach(tmp_path, token)
        with workers.joined(tmp_path, token), workers.joined(tmp_path, token, "a cell"):
            pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ExporterError, match="has ended"), workers.joined(tmp_path, token):
        pass


def test_the_next_run_waits_for_a_worker_that_was_left(tmp_path, monkeypatch):
    with workers.leading(tmp_path) as token:
        left = Worker(tmp_path, token)
        assert left.says() == "in"
    monkeypatch.setattr(workers, "_WAIT_SECONDS", 0.3)
    with pytest.raises(Refused, match="still at work"), alone(tmp_path):
        pass
    left.kill()
    with alone(tmp_path):
        late = Worker(tmp_path, token)  # sent by the earlier run, and only now awake
        assert "has ended" in late.says()
        late.kill()
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_no_two_workers_do_the_same_at_once(tmp_path, monkeypatch):
    with workers.leading(tmp_path) as token:
        first = Worker(tmp_path, token, "cell 1")
        assert first.says() == "in"
        with workers.joined(tmp_path, token, "cell 2"):
            pass
        monkeypatch.setattr(workers, "_WAIT_SECONDS", 0.3)
        with pytest.raises(ExporterError, match="still at work on it"), workers.joined(tmp_path, token, "cell 1"):
            pass
        monkeypatch.setattr(workers, "_WAIT_SECONDS", 30.0)
        second = Worker(tmp_path, token, "cell 1")
        time.sleep(0.3)
        first.kill()
        assert second.says() == "in"  # as soon as the first has gone
        second.kill()


def test_another_folder_of_that_name_is_refused(tmp_path):
    with workers.leading(tmp_path) as token:
        with pytest.raises(Refused, match="another folder"):
            workers.require_reach(tmp_path, token[::-1])
        path = next(tmp_path.glob(".workers-*"))
        path.rename(tmp_path / ".workers-copied")  # seen, but nobody's lock is on it
        (tmp_path / ".workers-copied" / "lock").rename(tmp_path / ".workers-copied" / "held")
        (tmp_path / ".workers-copied" / "lock").touch()
        with pytest.raises(Refused, match="lock"):
            workers.require_reach(tmp_path, "copied")
        (tmp_path / ".workers-copied").rename(path)


# A store that others fill

SPEC = TensorSpec("model.layers.0.mlp.experts.up_proj.weight", (6, 4, 64), "expert", 0)
RECIPE = """
title = "rounded"
[[rule]]
match = "*"
method = "rtn"
scheme = "int8-g32"
"""


@pytest.fixture
def step():
    return Recipe.from_toml(RECIPE, "rounded", "recipe rounded").step(SPEC, Scheme.parse("bf16"))


@pytest.fixture
def source():
    rng = np.random.default_rng(5)
    raw = (rng.normal(size=SPEC.shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return lambda name, start, stop: QTensor(
        name, Scheme.parse("bf16"), np.ascontiguousarray(raw[start:stop]).view(np.uint8)
    )


def test_leaves_written_by_others_are_the_same_store(tmp_path, step, source):
    here = Store(tmp_path / "here", [step], source, {})
    quantize(here, [step], source, 1, Progress())
    led = Store(tmp_path / "led", [step], source, {})
    every = list(tasks([step]))
    for part in (every[3:], every[:3], every[:2]):  # out of order, and some of it twice, as after a lost worker
        data = StoreData(tmp_path / "led", [step], "write")
        for record in quantize_apart(data, part, source, 2):
            led.record(record)
        data.close()
    assert led.complete([step])
    assert led.digest(step) == here.digest(step)
    assert (tmp_path / "led" / "data.bin").read_bytes() == (tmp_path / "here" / "data.bin").read_bytes()
    here.release()
    led.release()


def test_a_store_that_is_read_is_not_changed(tmp_path, step, source):
    store = Store(tmp_path / "store", [step], source, {})
    quantize(store, [step], source, 1, Progress())
    store.release()
    with open(tmp_path / "store" / "journal.jsonl", "ab") as f:
        f.write(b'{"tensor": "torn')  # somebody is writing there
    with open(tmp_path / "store" / "data.bin", "r+b") as f:
        f.seek(50)
        f.write(b"damaged")
    before = {p.name: p.read_bytes() for p in (tmp_path / "store").iterdir()}
    read = Store(tmp_path / "store", [step], source, {}, read_only=True)
    assert read.intact(step, 0) is None
    made = obtain(read, step, 0, source)
    assert made.leaf_digest() == read.leaf_digest(step, 0)
    other = replace(made, data=made.data ^ 1)
    with pytest.raises(ExporterError, match="as it was committed"):
        read.append(step, 0, other)
    read.release()
    assert {p.name: p.read_bytes() for p in (tmp_path / "store").iterdir()} == before


# What makes machines alike


@pytest.fixture
def ticket(tmp_path):
    with workers.leading(tmp_path / "out") as token, open_model(str(DEMO), Progress()).checkpoint:
        yield Ticket(
            folders={tmp_path / "out": token},
            checkpoints={str(DEMO): open_model(str(DEMO), Progress()).fingerprint()},
            profiles={"16gb": load_profile("16gb").sha256},
            versions=versions(),
            environment=environment(),
            directory=Path.cwd(),
            cache=tmp_path,
            device="cpu",
        )


def test_a_machine_like_this_one_is_taken(ticket, tmp_path):
    assert not look(ticket, "mark").cache
    (tmp_path / "mark").touch()
    seen = look(ticket, "mark")
    assert (seen.device, seen.cache) == ("cpu", True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: replace(t, versions={**t.versions, "exporter": "9.9"}), r"exporter is 0.*there, 9.9 here"),
        (lambda t: replace(t, versions={**t.versions, "numpy": "1.0"}), "numpy is .* there, 1.0 here"),
        (lambda t: replace(t, versions={**t.versions, "extra": "1"}), "extra is not installed there"),
        (lambda t: replace(t, folders=dict.fromkeys(t.folders, "0" * 16)), "another folder there"),
        (lambda t: replace(t, checkpoints=dict.fromkeys(t.checkpoints, "0")), "another checkpoint there"),
        (lambda t: replace(t, profiles=dict.fromkeys(t.profiles, "0")), "another profile there"),
    ],
)
def test_a_machine_that_differs_is_refused(ticket, change, says):
    with pytest.raises(Refused, match=says):
        look(change(ticket), "")


def test_an_error_of_a_job_is_an_answer(ticket, tmp_path, monkeypatch):
    monkeypatch.setattr("os.environ", dict(os.environ))
    monkeypatch.setattr("exporter.pipeline.cluster.work._end_with", lambda parent: None)
    outcome = perform(ticket, tmp_path / "out", "it", int, ("no number",))
    assert outcome.value is None
    assert "no number" in outcome.error["message"]
    assert os.environ["EXPORTER_CACHE"] == str(tmp_path)


def test_a_worker_ends_with_the_process_that_started_it(tmp_path):
    """Ray would let its job end first, on a machine that is lost."""
    inner = "from exporter.pipeline.cluster.work import _end_with\nimport os, time\n_end_with(os.getppid())\n"
    inner += "print(os.getpid(), flush=True)\ntime.sleep(60)"
    outer = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {inner!r}])"
    with subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        parent.kill()
        assert parent.stdout.read() == ""  # ends when the last process that holds the pipe does
    assert not Path(f"/proc/{worker}").exists() or "Z" in Path(f"/proc/{worker}/stat").read_text()


# Jobs


@pytest.fixture
def cells():
    return [Cell(str(DEMO), DEMO.name, p, "gguf", "mxfp4-q8") for p in ("16gb", "cpu")]


def test_what_cells_share_is_one_job(tmp_path, cells):
    model = open_model(str(DEMO), Progress())
    with Jobs(Settings(out=tmp_path)) as jobs:
        for cell in cells:
            jobs.add(cell, model)
        parts = [job for job in jobs.all if job.call is fill]
        assert len(parts) > 2
        assert len({job.group for job in parts}) == 1
        first, second = (job for job in jobs.all if job.name in jobs.cells)
        assert len(jobs.all) == len(parts) + 4  # hashes, the reference, two cells
        assert first.after == second.after == {job.group for job in jobs.all if job.name not in jobs.cells}
        leaves = [leaf for job in parts for leaf in job.arguments[3]]
        assert len(leaves) == len(set(leaves))


def test_only_what_is_missing_is_sent(tmp_path, cells):
    model = open_model(str(DEMO), Progress())
    for left in (True, False):
        with Jobs(Settings(out=tmp_path)) as jobs:
            jobs.add(cells[0], model)
            parts = [job for job in jobs.all if job.call is fill]
            for job in parts if left else ():
                records = fill(*job.arguments)
                assert len(records) == len(job.arguments[3])
                jobs.take(job, Outcome(records))
    assert parts == []


def test_a_worker_of_other_numbers_does_not_write(tmp_path, cells):
    model = open_model(str(DEMO), Progress())
    with Jobs(Settings(out=tmp_path)) as jobs:
        jobs.add(cells[0], model)
        request, _, folder, leaves = next(job for job in jobs.all if job.call is fill).arguments
        before = (folder / "data.bin").read_bytes()
        with pytest.raises(ExporterError, match="changed"):
            fill(request, store_key("another", ()), folder, leaves)
        assert (folder / "data.bin").read_bytes() == before


@pytest.mark.parametrize(
    ("address", "device", "says"),
    [("ray://host:10001", "auto", "outside the cluster"), (None, "cuda:1", "one machine")],
)
def test_what_cannot_be_meant_is_refused(tmp_path, monkeypatch, address, device, says):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(UsageError, match=says):
        run_on_ray([], Settings(out=tmp_path, device=device), Progress(), address)


def test_where_nobody_answers_there_is_no_cluster(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ExporterError, match=r"no Ray cluster at 127\.0\.0\.1:1: .*refused") as caught:
        run_on_ray([], Settings(out=tmp_path), Progress(), "127.0.0.1:1")
    assert caught.value.exit_code == 1


def test_without_ray_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="needs ray") as caught:
        run_on_ray([], Settings(out=tmp_path), Progress())
    assert caught.value.hint == "pip install 'exporter[ray]'"
