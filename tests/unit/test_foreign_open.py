"""What is found at a path and in which format, what it says otherwise than the checkpoint, what is never opened."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest

from exporter.errors import BadCheckpoint, ExporterError, Refused, UsageError
from exporter.model.config import FULL, SLIDING
from exporter.pipeline.foreign import compare_config, open_foreign
from exporter.pipeline.foreign_kinds import can_be_exact
from tests import variants
from tests.conftest import DEMO
from tests.foreign_files import demo_values, gguf_demo, gptq_demo, released_like


@pytest.mark.parametrize("layout", variants.VARIANTS)
def test_every_checkpoint_is_one_too(layout, tmp_path):
    """Floats and released blocks, in all layouts."""
    build, _ = variants.VARIANTS[layout]
    foreign = open_foreign(build(tmp_path / "m"))
    assert foreign.kind == "folder"
    assert foreign.format == ("float" if layout.startswith(("fused", "per_expert")) else "mxfp4")
    name = "model.layers.1.mlp.experts.up_proj.weight"
    assert np.array_equal(foreign.read(name, 3, 5), demo_values()[name][3:5])
    assert foreign.stored["model.norm.weight"].exact == (foreign.stored["model.norm.weight"].type != "F16")
    foreign.close()


def test_what_belongs_to_it(tmp_path):
    foreign = open_foreign(variants.copy(tmp_path / "m"))
    assert {p.name for p in foreign.files} >= {"config.json", "model-00001-of-00002.safetensors", "tokenizer.json"}
    assert foreign.bytes == sum(p.stat().st_size for p in foreign.files)
    assert foreign.tokenizer_file == tmp_path / "m" / "tokenizer.json"
    assert foreign.stored["model.layers.0.mlp.experts.gate_proj.weight"].bits == 4.25
    assert foreign.bits_per_weight == pytest.approx(6.6579, abs=1e-4)


SAYS = {
    "nothing": ({}, []),
    "window": ({"sliding_window": 127}, ["sliding_window 127, not 128"]),
    "experts": ({"num_experts_per_tok": 2}, ["num_experts_per_tok 2, not 4"]),
    "limit": ({"swiglu_limit": 5.0}, ["swiglu_limit 5, not 7"]),
    "layers": ({"layer_types": [FULL, SLIDING] * 2}, ["layer_types with layer 0 full_attention, not alternating"]),
    "base": ({"rope_theta": 10000, "rope_scaling": None}, ["rope theta 10000, not 150000", "rope default, not yarn"]),
    "rounding": ({"truncate": True}, ["rope truncate true, not false"]),
    "factor": ({"factor": 8.0}, ["rope factor 8, not 32"]),
}


@pytest.mark.parametrize("case", SAYS)
def test_what_a_folder_says_otherwise(case, tmp_path, demo_checkpoint):
    changes, wanted = SAYS[case]

    def change(config):
        inner = config["rope_scaling"]
        inner |= {k: v for k, v in changes.items() if k in inner and k != "rope_theta"}
        config |= {k: v for k, v in changes.items() if k not in inner or k == "rope_theta"}
        if "rope_theta" in changes:
            inner.pop("rope_theta", None)

    folder = variants.copy(tmp_path / "m")
    variants.edit_json(folder / "config.json", change)
    assert sorted(compare_config(open_foreign(folder), demo_checkpoint.config)) == sorted(wanted)


def test_onnx_is_found_and_not_read(tmp_path, demo_checkpoint):
    """Graph, its data, the configuration of its runtime; what is in the graph is not looked at here."""
    (tmp_path / "m.onnx").write_bytes(b"not a graph")
    (tmp_path / "m.onnx.data").write_bytes(b"x")
    alone = open_foreign(tmp_path / "m.onnx")
    assert (alone.kind, alone.format, alone.config, alone.read) == ("onnx", "onnx", None, None)
    assert alone.files == (tmp_path / "m.onnx", tmp_path / "m.onnx.data")
    assert compare_config(alone, demo_checkpoint.config) == []
    decoder = {"filename": "m.onnx", "head_size": 64, "hidden_size": 96, "sliding_window": {"window_size": 127}}
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {"decoder": decoder, "vocab_size": 2048}}))
    whole = open_foreign(tmp_path)
    assert whole.path == whole.genai == tmp_path / "m.onnx"
    assert compare_config(whole, demo_checkpoint.config) == ["sliding_window 127, not 128", "hidden_size 96, not 192"]


def test_a_graph_named_outside_its_folder_is_refused(tmp_path):
    (tmp_path / "secret.onnx").write_bytes(b"x")
    (tmp_path / "m").mkdir()
    for named in ("../secret.onnx", str(tmp_path / "secret.onnx")):
        config = {"model": {"decoder": {"filename": named}}}
        (tmp_path / "m" / "genai_config.json").write_text(json.dumps(config))
        with pytest.raises(Refused, match="outside it"):
            open_foreign(tmp_path / "m")
    (tmp_path / "m" / "model.onnx").symlink_to(tmp_path / "secret.onnx")
    with pytest.raises(BadCheckpoint, match="outside the checkpoint's folder"):
        open_foreign(tmp_path / "m")


# Paths


def nothing(root):
    return root / "nothing"


def link_to_nothing(root):
    (root / "m.gguf").symlink_to(root / "gone.gguf")
    return root / "m.gguf"


def a_pipe(root):
    os.mkfifo(root / "m.gguf")
    return root / "m.gguf"


def text(root):
    (root / "README.md").write_text("hello")
    return root / "README.md"


def a_shard(root):
    return DEMO / "model-00001-of-00002.safetensors"


def two_gguf(root):
    for name in ("a.gguf", "b.gguf"):
        (root / name).write_bytes(b"GGUF")
    return root


def of_two_kinds(root):
    (root / "a.gguf").write_bytes(b"GGUF")
    shutil.copy(a_shard(root), root)
    return root


def an_empty_folder(root):
    return root


def models_below(root):
    (root / "Q4_K_M").mkdir()
    (root / "Q4_K_M" / "a-00001-of-00002.gguf").write_bytes(b"GGUF")
    return root


USAGE = {
    "an empty folder": (an_empty_folder, "holds no GGUF, ONNX or safetensors file"),
    "models in a folder below": (models_below, "holds no GGUF, ONNX or safetensors file"),
    "nothing there": (nothing, "does not exist"),
    "a link to nothing": (link_to_nothing, "leads nowhere"),
    "a pipe": (a_pipe, "no plain file"),
    "another kind of file": (text, "no GGUF and no ONNX"),
    "one shard": (a_shard, "no GGUF and no ONNX"),
    "several models": (two_gguf, "several GGUF files"),
    "models of two kinds": (of_two_kinds, "several kinds"),
}


@pytest.mark.parametrize("case", USAGE)
def test_what_is_no_artifact(case, tmp_path):
    build, words = USAGE[case]
    with pytest.raises(UsageError, match=words) as failure:
        open_foreign(build(tmp_path))
    assert failure.value.hint


def test_the_device_that_never_ends():
    with pytest.raises(UsageError, match="no plain file"):
        open_foreign(type(DEMO)("/dev/zero"))


class Evil:
    def __reduce__(self):
        return (os._exit, (7,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_never_loaded(name, tmp_path):
    shutil.copy(DEMO / "config.json", tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(Refused, match="pickle"):
            open_foreign(path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "generation_config.json"])
def test_pipes_in_a_folder_are_never_opened(name, tmp_path):
    folder = variants.single_file(tmp_path / "m")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(BadCheckpoint, match="not a plain file"):
        open_foreign(folder)


@pytest.mark.parametrize("name", ["quantize_config.json", "tokenizer.json"])
def test_pipes_beside_quantized_layers(name, tmp_path):
    gptq_demo(tmp_path / "m")
    (tmp_path / "m" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "m" / name)
    with pytest.raises(BadCheckpoint, match="not a plain file"):
        open_foreign(tmp_path / "m")


def test_links_are_followed_as_the_hubs_cache_has_them(tmp_path):
    """snapshots/REVISION/file -> ../../blobs/HASH, and no further."""
    pytest.importorskip("gguf")
    home = tmp_path / "models--some--model"
    snapshot = home / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    gguf_demo(home / "blobs" / "1234", released_like)
    (snapshot / "m.gguf").symlink_to("../../blobs/1234")
    assert open_foreign(snapshot).format == "gguf"
    assert open_foreign(snapshot / "m.gguf").format == "gguf"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "m.gguf").symlink_to(home / "blobs" / "1234")
    with pytest.raises(BadCheckpoint, match="outside the checkpoint's folder"):
        open_foreign(tmp_path / "elsewhere")


def test_a_folder_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(tmp_path), "iterdir", refuse)
    with pytest.raises(ExporterError, match="cannot be read"):
        open_foreign(tmp_path)


def test_which_types_can_hold_what_was_released(demo_checkpoint):
    expert = next(s for s in demo_checkpoint.specs if s.role == "expert")
    linear = next(s for s in demo_checkpoint.specs if s.role == "linear")
    exact = {"MXFP4", "Q8_0", "Q5_0", "BF16", "F32", "int8 g32", "int8 g16"}
    for kind in (*exact, "Q4_0", "Q4_K", "int4 g32", "int8 g64", "int8 channel", "FP8 channel", "F16"):
        assert can_be_exact(kind, expert) == (kind in exact)
        assert can_be_exact(kind, linear) == (kind in ("BF16", "F32"))
