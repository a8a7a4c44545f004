"""Known-bad controls: each mistake is caught by the gate that it is for, and the artifact itself is left alone."""

import hashlib
import shutil

import pytest

from exporter.errors import ExporterError, MissingExtra, Refused
from exporter.pipeline.controls import CONTROLS, _one, run_controls
from exporter.validate.child import OverLimit, TimedOut
from exporter.validate.runtime import SCRATCH_PREFIX
from tests.made import make

BYTES = {"digests_equal", "head_equal"}
# Found by how the copy behaves, not only by its bytes. One scale of one block is too little for that.
BY_BEHAVIOUR = [control.name for control in CONTROLS if control.name != "scale off by one"]
# Shown by no limit on the divergence: what the twins are for.
BY_TWINS_ALONE = {"window off by one", "YaRN truncated"}
WHY_NOT = {
    ("gguf", "YaRN truncated"): "the files have no place for it: llama.cpp rounds the range of every file",
    ("onnx", "nibbles swapped"): "none of its tensors has 4 bits",
}
RECIPES = {"gguf": "mxfp4-q8", "mxfp4": "mxfp4-bf16", "onnx": "exact-q8"}


def hashes(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if "report" not in p.name}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By format."""
    done = {}

    def of(fmt):
        if fmt not in done:
            done[fmt] = make(tmp_path_factory.mktemp(fmt), fmt, RECIPES[fmt], "cpu" if fmt == "onnx" else "")
        return done[fmt]

    return of


def check(fmt, controls):
    """What `controls` of a report must say."""
    assert [each["name"] for each in controls] == [control.name for control in CONTROLS]
    for each in controls:
        name = each["name"]
        if (fmt, name) in WHY_NOT:
            assert each["applies"] is False
            assert each["why_not"] == WHY_NOT[fmt, name]
            continue
        assert each["applies"] is True, name
        assert each["caught"] is True, name
        failed = set(each["gates_failed"])
        assert BYTES & failed, name
        behaviour = failed - BYTES
        assert bool(behaviour) == each["by_behaviour"] == (name in BY_BEHAVIOUR), (name, failed)
        if name in BY_TWINS_ALONE:
            assert behaviour - {"arithmetic_kl_mean"} == {"behaves_as_released"}, name
        assert each["kl_mean"] > 0


def test_controls_of_a_gguf(made):
    artifact = made("gguf")
    before = hashes(artifact.folder)
    assert artifact.proof.judge(artifact.folder)[0] == []  # undamaged it passes, by the same quick proof
    check("gguf", run_controls(artifact.folder, artifact.job, artifact.proof))
    assert hashes(artifact.folder) == before
    assert not list(artifact.proof.reference.scratch.glob(f"{SCRATCH_PREFIX}*"))


def test_controls_of_a_folder(made):
    artifact = made("mxfp4")
    before = hashes(artifact.folder)
    check("mxfp4", run_controls(artifact.folder, artifact.job, artifact.proof))
    assert hashes(artifact.folder) == before


@pytest.mark.slow
def test_controls_of_an_onnx_folder(made):
    artifact = made("onnx")
    before = hashes(artifact.folder)
    check("onnx", run_controls(artifact.folder, artifact.job, artifact.proof))
    assert hashes(artifact.folder) == before


# The copies


@pytest.mark.parametrize("fmt", RECIPES)
def test_every_mistake_changes_the_copy_and_is_undone(fmt, made, tmp_path):
    copy = made(fmt).copy(tmp_path)
    before = hashes(copy.folder)
    seen = [before]
    for control in CONTROLS:
        why_not = control.damage(copy)
        damaged = hashes(copy.folder)
        assert (damaged == before) == bool(why_not), control.name
        assert why_not == WHY_NOT.get((fmt, control.name), ""), control.name
        if not why_not:
            assert damaged not in seen, control.name
            seen.append(damaged)
        copy.restore()
        assert hashes(copy.folder) == before, control.name


def test_a_mistake_that_cannot_be_run_is_caught_too(made, tmp_path):
    copy = made("gguf").copy(tmp_path)
    before = hashes(copy.folder)

    def refuses(folder):
        assert hashes(folder) != before
        raise ExporterError("the runtime cannot load this")

    found = _one(CONTROLS[0], copy, refuses, ())
    assert (found["caught"], found["by_behaviour"], found["gates_failed"]) == (True, True, [])
    assert found["refused"] == "the runtime cannot load this"
    assert hashes(copy.folder) == before


@pytest.mark.parametrize("failure", [TimedOut("not within 5 s"), OverLimit("above 1 GiB"), MissingExtra("a", "b", "c")])
def test_what_says_nothing_of_the_mistake_catches_nothing(failure, made, tmp_path):
    copy = made("gguf").copy(tmp_path)
    before = hashes(copy.folder)

    def fails(folder):
        raise failure

    with pytest.raises(type(failure)):
        _one(CONTROLS[0], copy, fails, ())
    assert hashes(copy.folder) == before


def test_a_mistake_that_passes_every_gate_is_said(made, tmp_path):
    copy = made("gguf").copy(tmp_path)
    found = _one(CONTROLS[3], copy, lambda folder: ([], 0.0), ())
    assert found == {
        "name": "scale off by one",
        "what": CONTROLS[3].what,
        "applies": True,
        "caught": False,
        "by_behaviour": False,
        "gates_failed": [],
        "kl_mean": 0.0,
    }


def test_a_gate_that_the_artifact_fails_by_itself_catches_nothing(made, tmp_path):
    copy = made("gguf").copy(tmp_path)
    found = _one(CONTROLS[3], copy, lambda folder: (["release_top1", "digests_equal"], 0.1), ["release_top1"])
    assert (found["caught"], found["by_behaviour"], found["gates_failed"]) == (True, False, ["digests_equal"])
    found = _one(CONTROLS[3], copy, lambda folder: (["release_top1"], 0.1), ["release_top1"])
    assert (found["caught"], found["gates_failed"]) == (False, [])


def test_a_stop_leaves_the_copy_as_it_was(made, tmp_path):
    copy = made("mxfp4").copy(tmp_path)
    before = hashes(copy.folder)

    def stopped(folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _one(CONTROLS[2], copy, stopped, ())
    assert hashes(copy.folder) == before


def test_without_room_for_a_copy_nothing_begins(made, monkeypatch):
    artifact = made("gguf")
    usage = shutil.disk_usage(artifact.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(Refused, match=r"--controls damages a copy: 0\.\d+ GB in "):
        run_controls(artifact.folder, artifact.job, artifact.proof)
