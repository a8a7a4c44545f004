"""What ONNX Runtime computes wrongly after rewriting a graph, nobody saying so: the proof looks for it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.formats import get_format
from exporter.model.reference import ReferenceLogits
from exporter.validate import onnx_session, onnx_worker
from exporter.validate.onnx_kernels import CPU
from exporter.validate.onnx_session import Decoding
from exporter.validate.onnx_ties import EITHER, Computed, relative_difference

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

VOCABULARY, PREFILL = 64, 8


def expert_in_if(path: Path) -> Path:
    """A decoder whose logits are a float16 product inside If: embeddings [V, 64] times a weight in INT8."""
    k, n, rng = 64, 32, np.random.default_rng(0)
    half, int64 = TensorProto.FLOAT16, TensorProto.INT64
    held = {
        "embeddings": rng.standard_normal((VOCABULARY, k)).astype(np.float16),
        "flat": np.array([-1, k], np.int64),
        "first": np.array([0], np.int64),
    }
    own = {
        "codes": rng.integers(-127, 128, (k, n)).astype(np.int8),
        "scales": rng.uniform(0.001, 0.002, (k // 32, n)).astype(np.float16),
    }

    def tensors(arrays: dict[str, Any]) -> list[Any]:
        return [numpy_helper.from_array(array, name) for name, array in arrays.items()]

    def value(name: str, kind: int, *shape: Any) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    chosen = [
        helper.make_node("DequantizeLinear", list(own), ["w"], axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "w"], ["chosen"]),
    ]
    other = [helper.make_node("Slice", ["x", "first", "end", "one"], ["other"])]
    ends = {"end": np.array([n], np.int64), "one": np.array([1], np.int64)}
    branches = {
        "then_branch": helper.make_graph(chosen, "then", [], [value("chosen", half, "s", n)], tensors(own)),
        "else_branch": helper.make_graph(other, "else", [], [value("other", half, "s", n)], tensors(ends)),
    }
    nodes = [
        helper.make_node("Gather", ["embeddings", "input_ids"], ["rows"]),
        helper.make_node("Reshape", ["rows", "flat"], ["x"]),
        helper.make_node("ReduceMax", ["attention_mask"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["real"], to=TensorProto.BOOL),
        helper.make_node("If", ["real"], ["y"], **branches),
        helper.make_node("Unsqueeze", ["y", "first"], ["logits"]),
        helper.make_node("Concat", ["past_key_values.0.key", "fresh"], ["present.0.key"], axis=2),
    ]
    held["fresh"] = np.zeros((1, 1, 1, 8), np.float16)
    inputs = [value(name, int64, 1, "s") for name in ("input_ids", "attention_mask")]
    inputs.append(value("past_key_values.0.key", half, 1, 1, "p", 8))
    outputs = [value("logits", half, 1, "s", n), value("present.0.key", half, 1, 1, "t", 8)]
    graph = helper.make_graph(nodes, "if", inputs, outputs, tensors(held))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
    return path


def text(path: Path) -> Path:
    """A reference of which only the tokens are read."""
    tokens = np.arange(16, dtype=np.int64)[None]
    zeros = np.zeros(16, np.float32)
    ReferenceLogits(tokens, tokens.T.astype(np.int32), zeros[:, None], zeros, zeros).save(path)
    return path


def test_zeros_in_place_of_a_product_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16 at accuracy level 4, its default, the product is zeros; we ask for level 1."""
    path = expert_in_if(tmp_path / "if.onnx")
    request = onnx_worker.Request(str(path), 1, CPU, windows=str(text(tmp_path / "windows.npz")), prefill=PREFILL)
    limit = get_format("tensorrt").gates["optimizer_shipped_difference"]

    def apart() -> float:
        rewritten = Decoding(onnx_worker._load(request, str(path)))
        starts = (onnx_worker._start(each, request) for each in (rewritten, onnx_worker._untouched(request)))
        return relative_difference(*starts)

    assert apart() < 0.01  # float16's own rounding of numbers up to 4
    monkeypatch.setattr(onnx_session, "_FLOAT32_ACTIVATIONS", 4)
    if ort.__version__.startswith("1.32."):
        assert apart() > limit


def computed(logits: np.ndarray[Any, Any], routes: np.ndarray[Any, Any]) -> Computed:
    return Computed(logits.astype(np.float32), routes.astype(np.uint16))


def test_a_tie_between_two_experts_is_not_counted_and_zeros_are() -> None:
    logits, routes, fourth = np.ones((8, 16)), np.zeros((2, 8, 4)), np.arange(8)[:, None] == 3
    sound = computed(logits, routes)
    tied = computed(np.where(fourth, 1.5, logits + 1e-4), np.where(fourth, 1, routes))
    assert relative_difference(sound, tied) == pytest.approx(1e-4, rel=1e-3)
    assert relative_difference(sound, dataclasses.replace(tied, routes=None)) == pytest.approx(0.5)
    either = computed(tied.logits, np.where(fourth, EITHER, routes))
    assert relative_difference(either, either[:]) == 0
    assert relative_difference(computed(logits, either.routes), either) == pytest.approx(1e-4, rel=1e-3)
    zeros = computed(logits * 0, routes + 1)  # so wrong that no token has its experts
    assert relative_difference(sound, zeros) == pytest.approx(1)
    broken = dataclasses.replace(tied, logits=np.where(fourth, np.nan, sound.logits))
    assert np.isnan(relative_difference(sound, broken))
