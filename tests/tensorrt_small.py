"""Graphs of a few nodes for TensorRT, and their shapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from exporter.validate import tensorrt

E, K, N, GROUP = 8, 256, 512, 32
HALF = TensorProto.FLOAT16
CODES = {4: TensorProto.INT4, 8: TensorProto.INT8}


INPUTS = {"x": ("n", 1, K), "rows": ("n", K), "all": (1, "n", K), "ids": ("n",)}


class Small:
    """A graph of a few nodes. Inputs: x [n, 1, K], rows [n, K] and all [1, n, K] float16, ids [n] int64."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"the_{output}", **attributes))
        return output

    def weight(self, name: str, array: Any) -> str:
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def quantized(self, name: str, bits: int, shape: tuple[int, ...], axis: int, zeros: bool = False) -> str:
        """The name of the float16 values of `bits`-bit codes, scales in groups along `axis`."""
        raw = self.random.integers(1, 120, int(np.prod(shape)) * bits // 8, dtype=np.uint8).tobytes()
        self.weights.append(helper.make_tensor(name, CODES[bits], shape, raw, raw=True))
        grouped = [n // GROUP if i == axis else n for i, n in enumerate(shape)]
        inputs = [name, self.weight(f"{name}.scale", self.random.uniform(0.001, 0.01, grouped).astype(np.float16))]
        if zeros:
            inputs.append(self.weight(f"{name}.zero", np.zeros(grouped, np.int8)))
        return self.node("DequantizeLinear", inputs, f"{name}.values", axis=axis, block_size=GROUP)

    def save(self, path: Path, shape: tuple[Any, ...], dtype: int = HALF, more: Sequence[Any] = ()) -> Path:
        used = {name for node in self.nodes for name in node.input}
        inputs = [
            helper.make_tensor_value_info(name, TensorProto.INT64 if name == "ids" else HALF, dims)
            for name, dims in INPUTS.items()
            if name in used
        ]
        output = helper.make_tensor_value_info("y", dtype, shape)
        graph = helper.make_graph(self.nodes, "small", inputs, [output, *more], self.weights)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), path)
        return path


def shapes(graph: Path) -> dict[str, tuple[list[int], list[int], list[int]]]:
    inputs = onnx.load(graph, load_external_data=False).graph.input
    dims = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in inputs}
    return {name: tuple([d or n for d in shape] for n in (1, 4, 16)) for name, shape in dims.items()}  # type: ignore[misc]


def build(graph: Path, sm: int = 89, **settings: Any) -> dict[str, Any]:
    given = {"time_limit": 60, "memory_limit": 4 << 30, **settings}
    if "shapes" not in given:
        given["shapes"] = shapes(graph)
    return tensorrt.build(graph, sm=sm, **given)


def experts(path: Path, bits: int = 4, zeros: bool = False) -> Path:
    """DequantizeLinear of all experts, Gather of the chosen, MatMul: the one form whose weights stay packed."""
    small = Small()
    values = small.quantized("w", bits, (E, K, N), axis=1, zeros=zeros)
    small.node("MatMul", ["x", small.node("Gather", [values, "ids"], "chosen", axis=0)], "y")
    return small.save(path, ("n", 1, N))


def dense(path: Path, bits: int) -> Path:
    small = Small()
    small.node("MatMul", ["rows", small.quantized("w", bits, (K, N), axis=0)], "y")
    return small.save(path, ("n", N))


def attention(path: Path, heads: int, tokens: int | str, operator: bool = True) -> Path:
    """Of `heads` heads over 2 of keys and values: the operator, or spelled out with a step that no kernel has."""
    q, kv = (1, heads, tokens, 64), (1, 2, "t", 64)
    small = Small()
    if operator:
        small.node("Attention", ["q", "k", "v"], "y")
    else:
        scores = small.node("MatMul", ["q", small.node("Transpose", ["k"], "turned", perm=[0, 1, 3, 2])], "scores")
        wide = small.node("Cast", [scores], "wide", to=TensorProto.FLOAT)
        summed = small.node("CumSum", [wide, small.weight("axis", np.array(3))], "summed")
        shares = small.node("Cast", [small.node("Softmax", [summed], "shares")], "narrow", to=HALF)
        small.node("MatMul", [shares, "v"], "y")
    values = [helper.make_tensor_value_info(n, HALF, d) for n, d in (("q", q), ("k", kv), ("v", kv), ("y", q))]
    graph = helper.make_graph(small.nodes, "small", values[:3], values[3:], small.weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), path)
    return path
