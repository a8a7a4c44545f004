"""Calibrated quantization by the real command: once, into every format, killed, and asked for the impossible."""

import hashlib
import json
import signal
import subprocess
import sys
import time

import gguf
import numpy as np
import pytest
from safetensors import safe_open

from tests.conftest import DEMO, run_exporter
from tests.e2e.test_bad_input import one_clear_line
from tests.e2e.test_kill import COUNTED

FORMATS = ("gguf", "gptq", "compressed-tensors")
RECIPE = """
title = "INT4 experts"
formats = ["gguf", "gptq", "compressed-tensors"]
[calibration]
windows = 4
length = 64
[gates]
export_kl_mean = 0.03
export_top1 = 0.85
release_kl_mean = 0.03
release_top1 = 0.85
ppl_ratio = 1.1
[[rule]]
match = "*.mlp.experts.*_proj.weight"
method = "gptq"
scheme = "int4-g32"
[[rule]]
match = ["*.self_attn.*_proj.weight", "lm_head.weight"]
method = "rtn"
scheme = "int8-g32"
[[rule]]
match = "*"
method = "keep"
"""
# The same in a second: what is calibrated lies in one layer.
FEW = """
title = "MXFP4 but for one layer"
[calibration]
windows = 2
length = 64
[[rule]]
match = ["model.layers.1.mlp.experts.*_proj.weight", "model.layers.1.self_attn.*_proj.weight"]
method = "gptq"
scheme = "int4-g32"
[[rule]]
match = "*.mlp.experts.*_proj.weight"
method = "pass"
scheme = "mxfp4"
[[rule]]
match = "*"
method = "keep"
"""


def written(folder, name, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.toml").write_text(text)
    return folder / f"{name}.toml"


def arguments(recipe, out, *more):
    return ["quantize", "--profile", "16gb", str(DEMO), "--recipe", str(recipe), "--out", str(out), *more]


def contents(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


# One store, every format


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(recipe, out, answer) of the whole job."""
    root = tmp_path_factory.mktemp("made")
    recipe = written(root, "int4", RECIPE)
    done = run_exporter(*arguments(recipe, root / "out", "--json"))
    assert done.code == 0, done.err
    return recipe, root / "out", done.json


def artifact(made, fmt):
    return made[1] / "tiny-gpt-oss" / "16gb" / f"{fmt}-int4"


def test_every_format_is_proved_from_one_store(made):
    _, out, answer = made
    assert [a["format"] for a in answer["artifacts"]] == list(FORMATS)
    for each in answer["artifacts"]:
        assert each["status"] == "passed"
        assert each["digests"] == {"tensors": 79, "equal": 79, "different": []}
    assert len(list(out.rglob("data.bin"))) == 1
    assert not list(out.rglob("hidden*"))
    manifests = [json.loads((artifact(made, f) / "manifest.json").read_text()) for f in FORMATS]
    digests = [{name: t["digest"] for name, t in m["tensors"].items()} for m in manifests]
    assert digests[0] == digests[1] == digests[2]


def test_the_manifest_says_what_was_calibrated_on(made):
    manifest = json.loads((artifact(made, "gguf") / "manifest.json").read_text())
    calibration = manifest["calibration"]
    assert (calibration["windows"], calibration["length"]) == (4, 64)
    assert "calibration files" in calibration["text"]
    assert len(calibration["sha256"]) == 64
    entry = manifest["tensors"]["model.layers.0.mlp.experts.up_proj.weight"]
    assert (entry["method"], entry["scheme"], entry["scale_rule"]) == ("gptq", "int4-g32", "signed-mse")


def in_gguf(path, layer, projection):
    """Integers int [E, N, K] and scales [E, N, K / 32] of Q4_0 blocks: a float16, then 16 bytes of two halves."""
    reader = gguf.GGUFReader(path)
    tensor = next(t for t in reader.tensors if t.name == f"blk.{layer}.ffn_{projection}_exps.weight")
    assert tensor.tensor_type == gguf.GGMLQuantizationType.Q4_0
    blocks = np.asarray(tensor.data).reshape(16, 192, 6, 18)
    scales = blocks[..., :2].copy().view(np.float16)[..., 0]
    codes = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1)
    return codes.reshape(16, 192, 192).astype(int) - 8, scales


def nibbles(words):
    """int32 [..., W] -> eight fields of four bits, low bits first, in a new last axis."""
    return (words.view(np.uint32)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15


def in_gptq(tensors, layer, expert, projection):
    """The same of `qweight` [K / 8, N] and `scales` [K / 32, N], zeros one less than they are."""
    stem = f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj."
    codes = nibbles(tensors[stem + "qweight"]).transpose(1, 0, 2).reshape(192, 192).astype(int)
    zeros = nibbles(tensors[stem + "qzeros"]).reshape(6, 192).astype(int) + 1
    assert np.array_equal(tensors[stem + "g_idx"], np.arange(192) // 32)
    return codes - np.repeat(zeros.T, 32, axis=1), tensors[stem + "scales"].T


def in_compressed(tensors, layer, expert, projection):
    """The same of `weight_packed` [N, K / 8] and `weight_scale` [N, K / 32]."""
    stem = f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj."
    assert tensors[stem + "weight_shape"].tolist() == [192, 192]
    return nibbles(tensors[stem + "weight_packed"]).reshape(192, 192).astype(int) - 8, tensors[stem + "weight_scale"]


def experts(folder):
    """Tensors of expert weights by name; biases are bf16, which numpy does not have."""
    with safe_open(folder / "model.safetensors", "np") as f:
        names = [n for n in f.keys() if ".experts." in n and not n.endswith(".bias")]  # noqa: SIM118
        return {name: f.get_tensor(name) for name in names}


@pytest.mark.parametrize("layer", [0, 3])
def test_the_same_integers_and_scales_in_every_file(made, layer):
    """Taken apart by hand. GPTQModel's gate is the first half of gate and up in turn, row by row."""
    of_gptq, of_compressed = (experts(artifact(made, f)) for f in FORMATS[1:])
    path = next(artifact(made, "gguf").glob("*.gguf"))
    (gate, up, down) = (in_gguf(path, layer, p) for p in ("gate", "up", "down"))
    assert (gate[1] < 0).any()
    assert set(np.unique(gate[0])) == set(range(-8, 8))
    for expert in range(16):
        for name, (codes, scales) in (("gate", gate), ("up", up), ("down", down)):
            found = in_compressed(of_compressed, layer, expert, name)
            assert np.array_equal(found[0], codes[expert])
            assert np.array_equal(found[1], scales[expert])
        for part in (0, 1):
            halves = np.concatenate([in_gptq(of_gptq, layer, expert, n)[part] for n in ("gate", "up")])
            in_turn = np.stack([gate[part][expert], up[part][expert]], axis=1).reshape(halves.shape)
            assert np.array_equal(halves, in_turn)
            assert np.array_equal(in_gptq(of_gptq, layer, expert, "down")[part], down[part][expert])


def test_the_experts_are_near_the_released_ones(made, demo_checkpoint):
    """Each under its own name: a twelfth of the energy is INT4's part, another's would be twice all of it."""
    from exporter.numerics import decode

    path = next(artifact(made, "gguf").glob("*.gguf"))
    for projection in ("gate", "up", "down"):
        codes, scales = in_gguf(path, 2, projection)
        values = codes * np.repeat(scales.astype(np.float64), 32, axis=2)
        want = decode.values(demo_checkpoint.read(f"model.layers.2.mlp.experts.{projection}_proj.weight", 0, 16))
        lost = np.square(values - want).sum((1, 2)) / np.square(want).sum((1, 2))
        assert lost.max() < 0.05


def test_nothing_is_redone(made):
    recipe, out, _ = made
    files = [p for p in out.rglob("*") if p.is_file() and p.name not in (".lock", "journal.jsonl")]
    leaves = next(out.rglob("journal.jsonl")).read_text().count('"leaf"')
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in files}
    started = time.monotonic()
    done = run_exporter(*arguments(recipe, out, "--until", "export"))
    assert done.code == 0, done.err
    assert time.monotonic() - started < 20  # three seconds where nothing else runs
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in files} == before
    assert next(out.rglob("journal.jsonl")).read_text().count('"leaf"') == leaves


# Killed


def killed_at(event, out, tmp_path):
    recipe = written(tmp_path, "few", FEW)
    command = [sys.executable, "-c", COUNTED, str(event), str(tmp_path / "events")]
    more = arguments(recipe, out, "--format", "gguf", "--until", "export")
    return subprocess.run([*command, *more], capture_output=True, check=False).returncode


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(contents of the artifact, number of events on the disk)."""
    tmp = tmp_path_factory.mktemp("undisturbed")
    assert killed_at(0, tmp / "out", tmp) == 0
    return contents(tmp / "out" / "tiny-gpt-oss" / "16gb" / "gguf-few"), int((tmp / "events").read_text())


# Two fifths of the events are calibration's: the embeddings are named at the 12th, the layer that is calibrated
# begins after the 79th (attention, then experts: a leaf and its line in the journal each) and ends before the 250th.
@pytest.mark.parametrize("event", [*(pytest.param(n, marks=pytest.mark.slow) for n in (12, 90, 150)), 79, 230, 800])
def test_killed_and_resumed_gives_the_same_bytes(event, undisturbed, tmp_path):
    whole, events = undisturbed
    assert 850 < events < 1000  # else the numbers above mean other moments
    out = tmp_path / "out"
    assert killed_at(event, out, tmp_path) == -signal.SIGKILL
    assert not list(out.rglob("manifest.json"))
    assert killed_at(0, out, tmp_path) == 0
    assert contents(out / "tiny-gpt-oss" / "16gb" / "gguf-few") == whole
    assert not list(out.rglob("hidden*"))


# Refused


def test_too_little_memory_is_said_before_any_work(tmp_path):
    recipe = written(tmp_path, "int4", RECIPE)
    done = run_exporter(*arguments(recipe, tmp_path / "out", "--max-memory", "400M"))
    assert one_clear_line(done, 4, "--max-memory 400 MB is too small: calibration needs", "hint: --max-memory 7")
    assert not list((tmp_path / "out").rglob("data.bin"))
    needed = done.err.split("hint: ")[1].split()[1].rstrip(",")
    done = run_exporter(*arguments(recipe, tmp_path / "out", "--max-memory", needed, "--until", "plan"))
    assert done.code == 0, done.err


TEXTS = {
    "too short": ("short.txt", "A short text. " * 20, 2, "4 windows of 64 need 256"),
    "empty": ("empty.jsonl", "", 2, "empty.jsonl"),
    "another template": ("im.jsonl", '{"text": "<|im_start|>user\\nHi<|im_end|>"}\n' * 200, 4, "template"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_text_that_cannot_calibrate_is_said(case, tmp_path):
    name, content, code, words = TEXTS[case]
    (tmp_path / name).write_text(content)
    recipe = written(tmp_path, "int4", RECIPE)
    done = run_exporter(*arguments(recipe, tmp_path / "out", "--calibration", tmp_path / name))
    assert one_clear_line(done, code, words, "hint: ")
    assert not list((tmp_path / "out").rglob("data.bin"))
