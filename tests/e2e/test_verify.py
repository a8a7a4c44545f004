"""exporter verify: files of anyone's judged against a checkpoint, in the right words; and seals of our own."""

import json
import os
import shutil
import struct

import pytest

from exporter.errors import ExporterError, Refused, UsageError
from exporter.formats.gguf.file import read_gguf
from exporter.pipeline.controls import CONTROLS
from exporter.pipeline.progress import Progress
from exporter.pipeline.verify import Ask, verify
from exporter.validate import speed
from tests import variants
from tests.conftest import DEMO, run_exporter
from tests.made import make, short_profile

INT8 = """title = "8 bits for all but what is kept"
[[rule]]
match = ["*.mlp.experts.*_proj.weight", "*.self_attn.*_proj.weight"]
method = "rtn"
scheme = "int8-g32"
[[rule]]
match = "*"
method = "keep"
"""


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """A GGUF of ours with its proof, and its profile beside the output."""
    return make(tmp_path_factory.mktemp("gguf"), "gguf", "mxfp4-q8")


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    return short_profile(tmp_path_factory.mktemp("profile"), "gguf", "mxfp4-q8")


def alone(made, tmp_path, name="stranger.gguf"):
    """The file, without anything that says who made it."""
    (source,) = made.folder.glob("*.gguf")
    return shutil.copy(source, tmp_path / name)


@pytest.fixture
def judged(profile, tmp_path, monkeypatch):
    """The report, as it was written; next to nothing is measured of the speed."""
    monkeypatch.setattr(speed, "PROOF", speed.Plan(prompts=(32,), generate=4, depths=(0,), repeats=1, seconds=1.0))

    def of(path, against=DEMO, **more):
        ask = Ask(path, str(against), **{"profile": str(profile), "out": tmp_path / "said", **more})
        report = verify(ask, Progress())
        assert json.loads((tmp_path / "said" / "report.json").read_text()) == json.loads(json.dumps(report))
        for page in ("report.md", "report.html"):
            assert (tmp_path / "said" / page).stat().st_size > 1000
        return report

    return of


def failed(report):
    return {gate["name"] for gate in report["gates"] if not gate["passed"]}


def write(path, at, data):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def set_window(path, window):
    """Another number under the key of the sliding window: key, type (4 is uint32), value."""
    key = b"gpt-oss.attention.sliding_window"
    raw = path.read_bytes()[: 1 << 16]
    at = raw.index(key) + len(key)
    assert struct.unpack_from("<II", raw, at) == (4, 128)
    write(path, at + 4, struct.pack("<I", window))


# GGUF


def test_our_own_file_out_of_its_folder_passes(gguf, judged, tmp_path):
    report = judged(alone(gguf, tmp_path))
    assert (report["status"], failed(report)) == ("passed", set())
    assert report["subject"]["name"] == "stranger.gguf"
    assert report["subject"]["format"] == "gguf"
    assert report["subject"]["class"] == "near"
    assert report["subject"]["tool"].startswith("exporter ")
    assert {"config_equal", "weights_sound", "behaves_as_released"} <= {gate["name"] for gate in report["gates"]}
    # What only we can promise of our own files is not asked of a stranger's.
    assert not {"digests_equal", "head_equal"} & {gate["name"] for gate in report["gates"]}
    assert report["weights"]["kept_exact"] is True
    assert report["weights"]["problems"] == []
    assert report["twins"]["nearest"] == "as released"
    assert report["runtime"]["name"] == "llama.cpp"
    assert report["router"]["release"]["share"] < 0.2
    assert list(report["accuracy"]) == ["conversations", "long", "plain"]
    assert report["generation"]["prompts"] == 8


def test_a_window_off_by_one_is_told_by_what_it_says_and_by_what_it_does(gguf, judged, tmp_path):
    path = alone(gguf, tmp_path)
    set_window(path, 129)
    report = judged(path)
    assert report["config_differs"] == ["sliding_window 129, not 128"]
    assert report["twins"]["nearest"] == "window of 129"
    # No limit on the divergence shows it: without the gate that it is for, only its own words would.
    assert failed(report) == {"config_equal", "behaves_as_released"}
    assert report["status"] == "gate failed"


def test_one_wrong_scale_is_found(gguf, judged, tmp_path):
    path = alone(gguf, tmp_path)
    file = read_gguf(path)
    at = file.data_start + next(t.offset for t in file.tensors if t.name == "blk.1.ffn_down_exps.weight")
    (scale,) = path.read_bytes()[at : at + 1]
    write(path, at, bytes([scale ^ 1]))
    report = judged(path, loss="lossy")  # what it may lose is asked for, and makes no difference to this
    assert report["subject"]["class"] == "lossy"
    assert {gate["name"]: gate["limit"] for gate in report["gates"]}["release_kl_mean"] == 0.02
    assert failed(report) == {"weights_sound"}
    assert report["weights"]["problems"] == [
        "layers.1 experts.down_proj: 1 block of 18,432 differs; MXFP4 should be exact"
    ]


@pytest.mark.slow
def test_gate_and_up_in_each_others_place(gguf, judged, tmp_path):
    copy = gguf.copy(tmp_path)
    assert CONTROLS[0].damage(copy) == ""
    (path,) = copy.folder.glob("*.gguf")
    report = judged(path)
    assert {"weights_sound", "behaves_as_released", "release_kl_mean", "conversations_kl_mean"} <= failed(report)
    assert report["twins"]["nearest"] == "gate and up swapped"
    problems = report["weights"]["problems"]
    assert "layers.0 experts.gate_proj: gate holds up's values" in problems
    assert "layers.2 experts.up_proj.bias: up holds gate's values" in problems
    assert len(problems) == 16  # every tensor, of which the last are not looked into


def test_a_class_that_there_is_not(gguf, judged, tmp_path):
    with pytest.raises(UsageError, match='no class "perfect"'):
        judged(alone(gguf, tmp_path), loss="perfect")


# What is not judged at all


def test_a_file_that_is_cut_off(gguf, judged, tmp_path):
    path = alone(gguf, tmp_path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ExporterError, match=r"stranger.gguf: damaged GGUF: ") as caught:
        judged(path)
    assert caught.value.exit_code == 1
    assert "\n" not in caught.value.message
    assert not (tmp_path / "said").exists()


def test_a_checkpoint_of_another_shape_is_refused(gguf, judged, tmp_path):
    def narrower(tensors):
        for name in list(tensors):
            if name.startswith("model.layers.3."):
                del tensors[name]

    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    other = variants.edited(tmp_path / "other", narrower, num_hidden_layers=3, layer_types=kinds)
    with pytest.raises(Refused, match="num_hidden_layers 4, not 3") as caught:
        judged(alone(gguf, tmp_path), against=other)
    assert caught.value.hint
    assert not (tmp_path / "said").exists()


def test_the_checkpoint_is_not_judged_against_itself(judged):
    with pytest.raises(UsageError, match="is the checkpoint itself"):
        judged(DEMO)


def test_paths_that_lead_nowhere(judged, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    for name, told in (("absent.gguf", "does not exist"), ("notes.txt", "is no GGUF and no ONNX file")):
        with pytest.raises(UsageError, match=told):
            judged(tmp_path / name)


# Folders


def strangers(folder, to):
    """As somebody would upload it: without manifest, hashes and reports."""
    for name in ("manifest.json", "SHA256SUMS"):
        assert not (shutil.copytree(folder, to, dirs_exist_ok=True) / name).exists() or (to / name).unlink() is None
    return to


@pytest.fixture(scope="module")
def gptq(tmp_path_factory):
    root = tmp_path_factory.mktemp("gptq")
    (root / "int8.toml").write_text(INT8)
    return make(root, "gptq", str(root / "int8.toml")).folder


def test_a_gptq_folder_with_another_tokenizer(gptq, judged, tmp_path):
    """All else of it is sound: one thing is wrong, and one gate says so."""
    folder = strangers(gptq, tmp_path / "model")
    raw = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    one, other = (next(t for t, i in vocabulary.items() if i == n) for n in (317, 318))
    vocabulary[one], vocabulary[other] = 318, 317
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    report = judged(folder)
    assert failed(report) == {"tokenizer_equal"}
    assert report["tokenizer"]["first_difference"] is not None
    assert report["subject"]["format"] == "gptq"
    assert report["subject"]["class"] == "near"
    groups = {group["group"]: group for group in report["weights"]["groups"]}
    assert set(groups["attention"]["stored"]) >= {"int8 g32"}
    assert groups["norms, sinks, biases"]["relative_error"] == 0
    assert "our own forward computed" in report["not_run"]["runtime"]


@pytest.mark.slow
def test_an_onnx_folder(judged, tmp_path):
    (tmp_path / "made").mkdir()
    made = make(tmp_path / "made", "onnx", "exact-q8", "cpu")
    report = judged(strangers(made.folder, tmp_path / "model"))
    assert (report["status"], failed(report)) == ("passed", set())
    assert report["subject"]["class"] == "lossy"  # its numbers are not read
    assert "weights" not in report
    assert "only how they behave" in report["not_run"]["weights"]
    assert report["runtime"]["name"] == "onnxruntime"


@pytest.mark.slow
def test_another_checkpoint_of_the_same_shape(gguf, judged, tmp_path):
    def tuned(tensors):
        tensors["model.layers.1.self_attn.q_proj.weight"] *= 1.5

    report = judged(alone(gguf, tmp_path), against=variants.edited(tmp_path / "tuned", tuned))
    assert {"weights_sound", "release_kl_mean"} <= failed(report)
    (problem,) = report["weights"]["problems"]
    assert problem.startswith("layers.1 q_proj: 0.667 times the checkpoint's values")


# By the command


def test_the_command_tells_an_artifact_that_fails(gguf, profile, tmp_path):
    path = alone(gguf, tmp_path)
    set_window(path, 127)
    done = run_exporter("verify", path, "--against", DEMO, "-p", profile, "-o", tmp_path / "said")
    assert done.code == 3, done.err
    assert "sliding_window 127, not 128" in done.out
    assert "it behaves like the model with this mistake: window of 127" in done.out
    assert f"{tmp_path}/said/report.html" in done.out


def test_a_strangers_file_needs_the_checkpoint(gguf, tmp_path):
    done = run_exporter("verify", alone(gguf, tmp_path))
    assert done.code == 2
    assert "was not made by exporter" in done.err
    assert "--against MODEL" in done.err
