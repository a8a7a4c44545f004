"""What engines show: weights that TensorRT expands are found, and those that it keeps are never reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.validate import tensorrt_facts
from exporter.validate.tensorrt_facts import Plan, Weight, Weights

onnx = pytest.importorskip("onnx")
pytest.importorskip("tensorrt_rtx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from tests.tensorrt_small import HALF, E, K, N, Small, attention, build, dense, experts  # noqa: E402


def bytes_experts(path: Path) -> Path:
    """Expert weights as UINT8: TensorRT computes no such type and folds them into INT32."""
    small = Small()
    small.weight("w", small.random.integers(0, 255, (E, K, N), dtype=np.uint8))
    chosen = small.node("Gather", ["w", "ids"], "chosen", axis=0)
    small.node("MatMul", ["x", small.node("Cast", [chosen], "values", to=HALF)], "y")
    return small.save(path, ("n", 1, N))


def test_weights_folded_into_a_wider_type_are_found(tmp_path: Path) -> None:
    answer = build(bytes_experts(tmp_path / "x.onnx"))
    assert (answer["built"], answer["expansion"], answer["expanded"]) == (True, 1, ["w"])
    assert answer["constants"]["int32"] == 4 * E * K * N
    assert answer["growth"] == pytest.approx(3, abs=0.01)


def transposed(path: Path, bits: int) -> Path:
    small = Small()
    turned = small.node("Transpose", [small.quantized("w", bits, (N, K), axis=1)], "turned", perm=[1, 0])
    small.node("MatMul", ["rows", turned], "y")
    return small.save(path, ("n", N))


@pytest.mark.parametrize("make", [dense, transposed])
def test_weights_written_out_in_a_run_are_found(make: Any, tmp_path: Path) -> None:
    """INT8 in groups times rows: the file holds 8 bits, but every run writes all values in 16."""
    answer = build(make(tmp_path / "x.onnx", 8))
    assert (answer["expansion"], answer["written_out"], answer["written_bytes"]) == (0, ["w"], 2 * K * N)
    assert answer["buffer_bytes"] >= answer["written_bytes"]


def merged(path: Path) -> Path:
    small = Small()
    halves = [small.quantized(name, 4, (K, N // 2), axis=0) for name in ("a", "b")]
    small.node("MatMul", ["rows", small.node("Concat", halves, "both", axis=1)], "y")
    return small.save(path, ("n", N))


def twins(path: Path) -> Path:
    """Two weights of the same bytes, which the engine holds once."""
    small = Small()
    products = []
    for name in ("a", "b"):
        small.random = np.random.default_rng(1)
        values = small.quantized(name, 4, (E, K, N), axis=1)
        chosen = small.node("Gather", [values, "ids"], f"chosen_{name}", axis=0)
        products.append(small.node("MatMul", ["x", chosen], f"y_{name}"))
    small.node("Add", products, "y")
    return small.save(path, ("n", 1, N))


@pytest.mark.parametrize(
    "make",
    [lambda p: dense(p, 4), merged, lambda p: transposed(p, 4), twins, lambda p: experts(p, 8, zeros=True)],
    ids=["in another order", "merged", "transposed", "the same twice", "with zero points"],
)
def test_weights_that_stay_packed_are_not_reported(make: Any, tmp_path: Path) -> None:
    answer = build(make(tmp_path / "x.onnx"))
    assert answer["built"], answer
    assert (answer["expansion"], answer["expanded"], answer["written_out"]) == (0, [], [])
    assert answer["growth"] < 1e-3


@pytest.mark.parametrize(
    ("heads", "tokens", "operator", "fused"), [(8, 1, True, 1), (8, "s", True, 1), (2, "s", False, 0)]
)
def test_attention_in_one_kernel_is_counted(
    heads: int, tokens: int | str, operator: bool, fused: int, tmp_path: Path
) -> None:
    """Where the graph says one token it is another kernel than for many."""
    answer = build(attention(tmp_path / "x.onnx", heads, tokens, operator))
    assert answer["built"], answer
    assert (answer["fused_attention"], answer["expansion"], answer["growth"]) == (fused, 0, 0)


def test_constants_of_all_kinds_are_seen(tmp_path: Path) -> None:
    """In branches, in Constant nodes, small, true or false: a weight is what has few bits and some size."""
    tensors = {
        "codes": np.zeros((64, 64), np.int8),
        "tiny": np.zeros(4, np.int8),
        "mask": np.zeros((64, 64), bool),
        "wide": np.zeros((64, 64), np.float32),
    }
    held = [numpy_helper.from_array(a, name) for name, a in tensors.items()]
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["node"], value=numpy_helper.from_array(tensors["codes"]))],
        "inner",
        [],
        [helper.make_tensor_value_info("node", TensorProto.INT8, (64, 64))],
    )
    node = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    values = [helper.make_tensor_value_info(n, t, s) for n, t, s in (("x", 9, ()), ("y", 3, (64, 64)))]
    graph = helper.make_graph([node], "outer", values[:1], values[1:], held)
    onnx.save(helper.make_model(graph), tmp_path / "x.onnx")
    found = tensorrt_facts.read_weights(tmp_path / "x.onnx")
    assert [w.name for w in found.quantized] == ["codes", "node", "node"]
    assert found.packed_bytes == 5 * 4096 + 4 + 4 * 4096 - 4096
    assert found.expanded_bytes == found.packed_bytes + 3 * 4096


@pytest.fixture(scope="module")
def engine_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the graph beside it."""
    file = tmp_path_factory.mktemp("engines") / "sm89.engine"
    build(experts(file.with_name("decode.onnx")), keep=file)
    return file


def test_one_expanded_weight_among_others_is_named(engine_file: Path) -> None:
    """As if the engine held a second weight in 16 bits, under its name, or under none."""
    engine = engine_file.read_bytes()
    plan = tensorrt_facts.read_plan(engine)
    weight = Weight("w", 4, (E, K, N), E * K * N // 2)
    weights = Weights(0, 0, (weight, replace(weight, name="v", nbytes=weight.nbytes // 2, shape=(E, K, N // 2))))
    wide = replace(weights.quantized[1], name="v_constantHalf", bits=16, nbytes=weight.nbytes * 2)
    for constants in ((*plan.constants, wide), (*plan.constants, replace(wide, name="__mye1_dconst")), plan.constants):
        facts = tensorrt_facts.compare(weights, replace(plan, constants=constants))
        assert (facts["expanded"], facts["expansion"]) == (["v"], pytest.approx(1 / 3))


def test_an_engine_whose_text_is_another_counts_as_expanded(engine_file: Path) -> None:
    plan = tensorrt_facts.read_plan(engine_file.read_bytes().replace(b"const_payload_size", b"payload_bytes_each"))
    weights = tensorrt_facts.read_weights(engine_file.with_name("decode.onnx"))
    assert tensorrt_facts.compare(weights, plan)["expansion"] == 1
    assert tensorrt_facts.read_plan(b"") == Plan((), {}, (), (), 0, 0)
