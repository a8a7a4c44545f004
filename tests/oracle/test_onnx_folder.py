"""ONNX folders read by what we did not write: onnx, ONNX Runtime, transformers, onnxruntime-genai's own builder.

`tests/golden/builder-fp4-experts.json` holds the hashes of what that builder writes for CUDA from the same
checkpoint (its MXFP4 form, which runs nowhere here).
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporter.checkpoint import open_checkpoint
from exporter.model.rope import rotation_table
from exporter.numerics import decode
from exporter.quantize.rtn import round_to
from exporter.types.recipe import Recipe
from tests.conftest import DEMO, make_artifact

MIX = """title = "INT4 experts, INT8 attention and embeddings, bf16 head"
[[rule]]
match = "*.mlp.experts.*_proj.weight"
method = "rtn"
scheme = "int4-g64"
[[rule]]
match = ["*.self_attn.*_proj.weight", "model.embed_tokens.weight"]
method = "rtn"
scheme = "int8-g32"
[[rule]]
match = "*"
method = "keep"
"""
GOLDEN = Path(__file__).parent.parent / "golden" / "builder-fp4-experts.json"
GRAPHS = {"cpu": "model.onnx", "cuda": "model.onnx", "webgpu": "onnx/model_q4f16.onnx"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    (folder / "mix.toml").write_text(MIX)
    return folder


@pytest.fixture(scope="module")
def mix(root):
    return make_artifact(root, "onnx", root / "mix.toml", "cpu")


@pytest.fixture(scope="module")
def fp4(root):
    return make_artifact(root, "onnx", "mxfp4-q8", "cuda")


@pytest.fixture(scope="module")
def web(root):
    return make_artifact(root, "onnx", root / "mix.toml", "webgpu", more='split_size = "2M"')


def initializers(folder, target):
    """Every initializer with its bytes, by onnx's own reader."""
    model = onnx.load(folder / GRAPHS[target])
    return {i.name: i for i in model.graph.initializer}


def wanted(name):
    """float32 values of a canonical tensor as MIX rounds it."""
    recipe = Recipe.from_toml(MIX, "mix", "mix")
    with open_checkpoint(DEMO) as checkpoint:
        spec = next(s for s in checkpoint.specs if s.name == name)
        step = recipe.step(spec, checkpoint.scheme(name))
        q = checkpoint.read(name, 0, spec.shape[0])
        return decode.values(round_to(q, step.scheme) if step.method == "rtn" else q)


def run_one(kind, inputs, feed, initial, **attributes):
    """The one output of one operator of com.microsoft."""
    node = helper.make_node(kind, inputs, ["y"], domain="com.microsoft", **attributes)
    (name, array), *_ = feed.items()
    value = helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "one", [value], [out], initial)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0]


@pytest.mark.parametrize(("projection", "first"), [("q_proj", 0), ("k_proj", 512), ("v_proj", 640)])
def test_attention_computes_with_the_numbers_of_the_recipe(mix, projection, first):
    held = initializers(mix, "cpu")
    codes, scales = (held[f"model.layers.1.self_attn.qkv_proj.weight_{kind}"] for kind in ("codes", "scales"))
    unit = np.eye(192, dtype=np.float32)  # each column of the weight, by ONNX Runtime's own kernel
    settings = {"K": 192, "N": 768, "bits": 8, "block_size": 32, "accuracy_level": 1}
    found = run_one("MatMulNBits", ["x", codes.name, scales.name], {"x": unit}, [codes, scales], **settings).T
    expected = wanted(f"model.layers.1.self_attn.{projection}.weight")
    assert np.array_equal(found[first : first + len(expected)], expected)


def test_embeddings_are_looked_up_exactly(mix):
    held = initializers(mix, "cpu")
    codes, scales = (held[f"model.embed_tokens.weight_{kind}"] for kind in ("codes", "scales"))
    ids = np.arange(2048, dtype=np.int64)
    settings = {"bits": 8, "block_size": 32, "gather_axis": 0, "quantize_axis": 1}
    found = run_one("GatherBlockQuantized", [codes.name, "ids", scales.name], {"ids": ids}, [codes, scales], **settings)
    assert np.array_equal(found, wanted("model.embed_tokens.weight"))


def test_gate_and_up_take_turns(mix):
    held = initializers(mix, "cpu")
    stem = "model.layers.2.mlp.experts.gate_up_proj"
    codes, scales = (numpy_helper.to_array(held[f"{stem}.weight_{kind}"]) for kind in ("codes", "scales"))
    numbers = np.stack((codes & 15, codes >> 4), axis=-1).reshape(16, 384, 192).astype(np.float32) - 8
    values = numbers * np.repeat(scales, 64, axis=-1)
    bias = numpy_helper.to_array(held[f"{stem}.bias"])
    for start, projection in enumerate(("gate_proj", "up_proj")):
        assert np.array_equal(values[:, start::2], wanted(f"model.layers.2.mlp.experts.{projection}.weight"))
        assert np.array_equal(bias[:, start::2], wanted(f"model.layers.2.mlp.experts.{projection}.bias"))


def test_fp4_experts_are_those_of_the_builder(fp4):
    golden = json.loads(GOLDEN.read_text())["sha256"]
    held = initializers(fp4, "cuda")
    assert len(golden) == 16
    for name, digest in golden.items():
        _, _, layer, *_, projection, kind = name.split(".")
        stem = f"model.layers.{layer}.mlp.experts.{projection}.weight"
        ours = held[f"{stem}_{'codes' if kind == 'qweight' else 'scales'}"]
        assert hashlib.sha256(ours.raw_data).hexdigest() == digest, name


def test_rotation_is_that_of_transformers(mix):
    import torch
    from transformers import AutoConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

    held = initializers(mix, "cpu")
    positions = torch.tensor([[0, 1, 127, 128, 4095, 4096, 5000, 70001, 131071]])
    cos, sin = GptOssRotaryEmbedding(AutoConfig.from_pretrained(DEMO))(torch.zeros(1), positions)
    for name, expected in (("cos_cache", cos), ("sin_cache", sin)):
        found = numpy_helper.to_array(held[name])[positions[0].numpy()]
        assert np.allclose(found, expected[0].numpy()[:, :32], atol=2e-3), name  # one unit of a frequency is 0.004 rad
        assert np.allclose(found[:5], expected[0].numpy()[:5, :32], atol=1e-5), name


def test_rotation_keeps_the_released_range(mix):
    from dataclasses import replace

    with open_checkpoint(DEMO) as checkpoint:
        rope = checkpoint.config.rope
    table = numpy_helper.to_array(initializers(mix, "cpu")["cos_cache"])[:5000]
    assert np.array_equal(table, rotation_table(np.cos, rope, 64, 5000))
    assert np.abs(table - rotation_table(np.cos, replace(rope, truncate=True), 64, 5000)).max() > 0.1


def test_the_web_graph_finds_its_parts(web):
    files = sorted(p.name for p in (web / "onnx").iterdir())
    data = ["model_q4f16.onnx_data", *(f"model_q4f16.onnx_data_{i}" for i in range(1, len(files) - 1))]
    assert sorted(["model_q4f16.onnx", *data]) == files
    settings = json.loads((web / "config.json").read_text())["transformers.js_config"]
    assert settings["use_external_data_format"] == {"model_q4f16.onnx": len(data)}
    assert settings["kv_cache_dtype"] == {"q4f16": "float16"}
    used = {
        e.value
        for i in onnx.load(web / GRAPHS["webgpu"], load_external_data=False).graph.initializer
        for e in i.external_data
        if e.key == "location"
    }
    assert used == set(data)
    session = onnxruntime.InferenceSession(web / GRAPHS["webgpu"], providers=["CPUExecutionProvider"])
    assert {i.type for i in session.get_inputs() if i.name.startswith("past")} == {"tensor(float16)"}
