"""Nodes, weights and constants of an ONNX graph, in the order in which they compute; what graphs of ours share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporter.errors import MissingExtra
from exporter.formats.onnx.arrays import Initializer

_TYPES = {
    "float": "FLOAT",
    "float16": "FLOAT16",
    "bfloat16": "BFLOAT16",
    "uint8": "UINT8",
    "int8": "INT8",
    "int4": "INT4",
    "float4e2m1": "FLOAT4E2M1",
    "float8e8m0": "FLOAT8E8M0",
    "int64": "INT64",
}


def import_ir() -> Any:
    """The onnx_ir module. Raises MissingExtra."""
    try:
        import onnx_ir
    except ModuleNotFoundError as missing:
        raise MissingExtra(missing.name or "onnx_ir", "onnx", "writing ONNX graphs") from missing
    return onnx_ir


@dataclass(frozen=True)
class Place:
    """Where the bytes of an initializer are: a file beside the graph, and the offset in it."""

    location: str
    offset: int


class GraphBuilder:
    """A graph under construction. `places`: where the bytes of every initializer that is not in the graph are."""

    def __init__(self, places: Mapping[Initializer, Place]) -> None:
        self.ir, self.places = import_ir(), places
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self._external = {i.name: i for i in places}

    def serialized(
        self, opsets: Mapping[str, int], ir_version: int, metadata: Mapping[str, str], version: str
    ) -> bytes:
        """The model; the same bytes for the same graph. `version`: of exporter."""
        ir = self.ir
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports=dict(opsets),
            name="gpt_oss",
        )
        model = ir.Model(
            graph,
            ir_version=ir_version,
            producer_name="exporter",
            producer_version=version,
            metadata_props=dict(metadata),
        )
        raw: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
        return raw

    def typed(self, value: Any, dtype: Any, shape: Sequence[int | str]) -> Any:
        value.type, value.shape = self.ir.TensorType(dtype), self.ir.Shape(shape)
        return value

    def input(self, name: str, dtype: Any, shape: Sequence[int | str]) -> Any:
        value = self.ir.Value(name=name)
        self.inputs.append(self.typed(value, dtype, shape))
        return value

    def weight(self, name: str) -> Any:
        """The initializer `name` as it lies in a data file."""
        if name not in self.initializers:
            stored = self._external[name]
            place, dtype = self.places[stored], self.ir.DataType[_TYPES[stored.dtype]]
            tensor = self.ir.ExternalTensor(
                place.location, place.offset, stored.nbytes, dtype, shape=self.ir.Shape(stored.shape), name=name
            )
            self._add(name, tensor, dtype, stored.shape)
        return self.initializers[name]

    def constant(self, name: str, array: np.ndarray[Any, Any]) -> Any:
        """A small tensor inside the graph."""
        if name not in self.initializers:
            tensor = self.ir.tensor(array, name=name)
            self._add(name, tensor, tensor.dtype, array.shape)
        return self.initializers[name]

    def _add(self, name: str, tensor: Any, dtype: Any, shape: Sequence[int]) -> None:
        value = self.ir.Value(name=name, const_value=tensor)
        self.initializers[name] = self.typed(value, dtype, shape)

    def op(
        self, name: str, kind: str, inputs: Sequence[Any], domain: str = "", out: str = "", **attributes: Any
    ) -> Any:
        """The one output of a new node, called `out` or after the node."""
        return self.ops(name, kind, inputs, (out or f"{name}/output",), domain, **attributes)[0]

    def ops(
        self, name: str, kind: str, inputs: Sequence[Any], outputs: Sequence[str], domain: str = "", **attributes: Any
    ) -> list[Any]:
        values = [self.ir.Value(name=each) for each in outputs]
        self.nodes.append(self.ir.node(kind, inputs, attributes, domain=domain, outputs=values, name=name))
        return values

    def cast(self, name: str, value: Any, dtype: Any) -> Any:
        """`value` as `dtype`. Of a weight, ONNX Runtime does this once, when it loads the model."""
        return self.op(name, "Cast", [value], to=int(dtype))
