"""Calibration that was killed, or whose files were damaged, ends with the same numbers."""

import json

import numpy as np
import pytest

from exporter.model.reference import embed, run_layers
from exporter.pipeline.calibrate import Calibrated, StoreNumbers, calibrate
from exporter.pipeline.progress import Progress
from exporter.quantize import gptq
from exporter.quantize.experts import _Expert
from exporter.quantize.solve import Problem
from exporter.types.recipe import GptqSpec
from exporter.validate import text
from tests.corner import GATE0, LEAVES, Job, Killed, corner, corner_job, stopped_after


@pytest.fixture(autouse=True)
def one_thread():
    with gptq.one_thread():
        yield


@pytest.fixture
def job(demo_checkpoint, tmp_path):
    return corner_job(demo_checkpoint, tmp_path / "store")


@pytest.fixture(scope="module")
def whole(demo_checkpoint, tmp_path_factory):
    """The leaves of a job that nobody disturbed."""
    with gptq.one_thread():
        return corner_job(demo_checkpoint, tmp_path_factory.mktemp("whole") / "store").run()


@pytest.mark.parametrize(("count", "layer"), [(0, 0), (1, 0), (5, 0), (9, 0), (17, 1), (25, 1), (32, 2)])
def test_killed_anywhere_and_resumed_gives_the_same_numbers(job, whole, count, layer):
    with pytest.raises(Killed):
        job.run(stopped_after(count))
    assert job.calibration.spill.latest() == layer
    assert job.committed() == count

    seen = set()

    class Watched(StoreNumbers):
        def released(self, name, start, stop):
            seen.add(name)
            return super().released(name, start, stop)

    assert job.run(Watched) == whole
    assert job.committed() == len(whole) == LEAVES  # nothing was made twice
    assert not any(f"layers.{i}." in name for name in seen for i in range(layer))
    assert not (job.folder / "calibration").exists()


def test_killed_within_a_slice(job):
    """The slice is one batch: what is there already comes out again, equal."""
    whole = job.run(at_once=2)
    again = Job(job.checkpoint, job.config, job.tokens, job.folder.with_name("again"))
    with pytest.raises(Killed):
        again.run(stopped_after(6), at_once=2)
    assert again.run(at_once=2) == whole
    assert again.committed() == LEAVES


@pytest.mark.parametrize(("count", "at_once", "left"), [(1, 1, 21), (5, 1, 19), (15, 1, 12), (7, 4, 7)])
def test_resuming_computes_in_the_same_batches(job, monkeypatch, count, at_once, left):
    """A product's last bits may depend on its shape, so nothing is left out of one because it is there already.

    Killed in layer 0: its tokens go through experts as in the first run, and what is rounded is rounded together
    with what it was together with.
    """
    rounded, sent = [], []
    solve, inner = Problem.solve, _Expert.inner

    def watched_solve(self, names, scheme, weights, device):
        rounded.append((names, [w.shape for own in weights for w in own]))
        return solve(self, names, scheme, weights, device)

    def watched_inner(self, h):
        sent.append(len(h))
        return inner(self, h)

    monkeypatch.setattr(Problem, "solve", watched_solve)
    monkeypatch.setattr(_Expert, "inner", watched_inner)
    job.run(at_once=at_once)
    whole, again = (list(rounded), list(sent)), Job(job.checkpoint, job.config, job.tokens, job.folder / "again")
    with pytest.raises(Killed):
        again.run(stopped_after(count), at_once=at_once)
    rounded.clear()
    sent.clear()
    again.run(at_once=at_once)
    assert sent == whole[1]
    assert rounded == whole[0][-left:]


def spoil(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


def another_layer(folder):
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "layer": 0}))


DAMAGES = {
    "states": lambda folder: spoil(folder / "hidden-1.bin"),
    "states gone": lambda folder: (folder / "hidden-1.bin").unlink(),
    "torn state": lambda folder: (folder / "state.json").write_text('{"layer": 1, "dig'),
    "another layer": another_layer,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_states_are_made_again(job, whole, damage):
    with pytest.raises(Killed):
        job.run(stopped_after(18))
    DAMAGES[damage](job.folder / "calibration")
    assert job.calibration.spill.latest() is None
    assert job.run() == whole


def test_what_is_under_work_is_never_the_input(job, whole):
    """The input of the layer survives whatever the killed run did to its copy."""
    with pytest.raises(Killed):
        job.run(stopped_after(25))
    (job.folder / "calibration" / "hidden.partial").write_bytes(b"torn")
    (job.folder / "calibration" / "scratch.partial").write_bytes(b"torn")
    assert job.run() == whole


@pytest.mark.parametrize("rows", [4096, 50])
def test_both_streams_are_those_of_the_model(job, monkeypatch, rows):
    """The states between two layers: of the model with final numbers, and of the released one."""
    monkeypatch.setattr("exporter.quantize.experts._ROWS", rows)
    monkeypatch.setattr("exporter.quantize.sequential._ROWS", rows)
    with pytest.raises(Killed):
        job.run(stopped_after(16))
    found = np.fromfile(job.folder / "calibration" / "hidden-1.bin", np.float32).reshape(2, *job.tokens.shape, 192)
    numbers, one = job.numbers(), corner(job.config, layers=1)
    for states, read in zip(found, (numbers.final, numbers.released), strict=True):
        x = embed(one, read, job.tokens, "cpu")[None].contiguous()
        run_layers(one, read, x, [one.rope], "cpu")
        np.testing.assert_allclose(states, x[0], atol=2e-5 * float(x.abs().max()))
    assert not np.array_equal(*found)


# The store's own leaves


def calibrated(job, store):
    windows = text.Windows(job.tokens, "", "")
    arguments = (job.checkpoint.read, job.config, Calibrated(windows, GptqSpec()), "cpu", 1, Progress())
    calibrate(store, job.steps, *arguments)


def damage_leaf(job, name, leaf):
    store = job.store()
    store.release()
    with open(job.folder / "data.bin", "r+b") as f:
        f.seek(store._data.offset(store.steps[name], leaf) + 100)
        byte = f.read(1)[0]
        f.seek(-1, 1)
        f.write(bytes([byte ^ 3]))


@pytest.mark.parametrize(("name", "leaf"), [(GATE0, 1), ("lm_head.weight", 0)])
@pytest.mark.parametrize("count", [LEAVES, 20])
def test_a_damaged_leaf_is_made_again(job, whole, name, leaf, count):
    """After the end, or beside a job that is in a later layer: its states say nothing about the damaged one."""
    if count < LEAVES:
        with pytest.raises(Killed):
            job.run(stopped_after(count))
    else:
        job.run()
    damage_leaf(job, name, leaf)
    store = job.store()
    try:
        calibrated(job, store)
    finally:
        store.release()
    assert job.leaves() == whole
    assert job.committed() == LEAVES + (name == GATE0 or count == LEAVES)


def test_what_is_whole_is_not_calibrated_again(job, whole):
    job.run()
    left = job.folder / "calibration"
    left.mkdir()  # of a run that was killed before it could clean up
    (left / "hidden-2.bin").write_bytes(b"")
    before = (job.folder / "journal.jsonl").read_bytes()
    store = job.store()
    try:
        calibrated(job, store)
    finally:
        store.release()
    assert (job.folder / "journal.jsonl").read_bytes() == before
    assert not left.exists()
    assert job.leaves() == whole


def test_the_key_names_all_that_the_numbers_depend_on(job):
    """A store is found by it: other text, other cut, other settings are other numbers."""
    tokens, spec = job.tokens, GptqSpec()
    other = tokens.copy()
    other[1, 5] += 1
    variants = [
        (tokens, spec),
        (other, spec),
        (tokens.reshape(4, -1), spec),
        (tokens, GptqSpec(damp=0.02)),
        (tokens, GptqSpec(hessian="shared")),
    ]
    keys = [Calibrated(text.Windows(t, "", ""), s).key() for t, s in variants]
    assert len(set(keys)) == len(variants)
    assert Calibrated(text.Windows(tokens.copy(order="F"), "other", "name"), spec).key() == keys[0]


def test_any_rows_can_be_asked_for(job, monkeypatch):
    """Of a tensor in leaves of 100 rows: within one, across a border, up to the end."""
    monkeypatch.setattr("exporter.types.qtensor._LEAF_ELEMENTS", 192 * 100)
    numbers = job.numbers()
    for read in (numbers.final, numbers.released):
        every = read("model.embed_tokens.weight", 0, 2048)
        for start, stop in ((0, 1), (30, 70), (30, 230), (100, 200), (2040, 2048)):
            assert np.array_equal(read("model.embed_tokens.weight", start, stop), every[start:stop])
