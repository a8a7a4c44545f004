"""What the linter for TensorRT knows of a graph around a node: types, shapes, constants, what an If decided."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import ExporterError
from exporter.validate.onnx_file import AGAIN, Place, Scope, located, pieces, printable, scopes

SMS = (75, 80, 86, 89, 120, 121)
BF16, INT8, INT4, FP8, FP4, UINT8 = 16, 3, 22, 17, 23, 2  # TensorProto's numbers
_INFINITY = {1: ("<u4", 0x7F800000), 10: ("<u2", 0x7C00), BF16: ("<u2", 0x7F80)}
_SMALL = 4096  # numbers; a tensor of more is neither a shape nor an axis

TRT = "trt"  # the domain of TensorRT's own operators

Dims = tuple[int | None, ...]


@dataclass(frozen=True)
class Problem:
    """A finding about a node, before it is known which. Its fields are those of Finding."""

    rule: str
    text: str
    sms: tuple[int, ...] = SMS
    fatal: bool = True


Problems = Iterator[Problem]


@dataclass(frozen=True, eq=False)
class Known:
    """A scope with the types that inference found. outer: the same of the scope around it.

    types: dtype (0: no tensor) and dimensions (None: rank unknown) of the values of this graph.
    """

    scope: Scope
    outer: Known | None
    types: Mapping[str, tuple[int, Dims | None]]

    @functools.cached_property
    def tensors(self) -> dict[str, Any]:
        """Initializers, and tensors of Constant nodes."""
        found = dict(self.scope.weights)
        for node in self.scope.graph.node:
            value = next((a.t for a in node.attribute if a.name == "value"), None)
            if node.op_type == "Constant" and node.output and value is not None:
                found[node.output[0]] = value
        return found

    @functools.cached_property
    def outputs(self) -> frozenset[str]:
        return frozenset(o.name for o in self.scope.graph.output)

    @functools.cached_property
    def constants(self) -> set[str]:
        """Values that follow from initializers alone."""
        found = set(self.tensors)
        for node in self.scope.graph.node:
            if not any(a.HasField("g") or a.graphs for a in node.attribute) and all(
                not name or name in found or (self.outer is not None and self.outer.is_constant(name))
                for name in node.input
            ):
                found.update(node.output)
        return found

    @functools.cached_property
    def chosen(self) -> set[str]:
        """Values that follow from what an If decided."""
        found: set[str] = set()
        for node in self.scope.graph.node:
            if node.op_type == "If" or not found.isdisjoint(node.input):
                found.update(name for name in node.output if name)
        return found

    @functools.cached_property
    def attends_first(self) -> bool:
        """Whether some Attention does not wait for what an If decides."""
        nodes = (node for node in self.scope.graph.node if node.op_type == "Attention")
        return any(self.chosen.isdisjoint(node.input) for node in nodes)

    def _around(self) -> Iterator[Known]:
        at: Known | None = self
        while at is not None:
            yield at
            at = at.outer

    def _type(self, name: str) -> tuple[int, Dims | None] | None:
        return next((k.types[name] for k in self._around() if name in k.types), None) if name else None

    def dtype(self, name: str) -> int | None:
        """ONNX's number of a value's type; None where unknown."""
        found = self._type(name)
        return found[0] if found else None

    def shape(self, name: str) -> Dims | None:
        """Its dimensions, None for one that is not fixed; None where even their number is unknown."""
        found = self._type(name)
        return found[1] if found else None

    def is_constant(self, name: str) -> bool:
        return any(name in k.constants for k in self._around())

    def tensor(self, name: str) -> Any | None:
        return next((k.tensors[name] for k in self._around() if name in k.tensors), None)

    def maker(self, name: str) -> Any | None:
        return next((k.scope.made[name] for k in self._around() if name in k.scope.made), None)

    def named(self, name: str) -> list[str]:
        """What the graph calls the dimensions of one of its inputs or outputs."""
        for value in (*self.scope.graph.input, *self.scope.graph.output):
            if value.name == name:
                return [d.dim_param for d in value.type.tensor_type.shape.dim]
        return []


@dataclass(frozen=True)
class Site(Place):
    """A node, what is known around it, and the file that it is from. inside: of the graphs in it, by attribute."""

    known: Known
    graph: Path
    inside: Mapping[int, Known]

    def dtype(self, index: int) -> int | None:
        return self.known.dtype(self.node.input[index]) if self.has(index) else None

    def shape(self, index: int) -> Dims | None:
        return self.known.shape(self.node.input[index]) if self.has(index) else None

    def constant(self, index: int) -> bool:
        return self.has(index) and self.known.is_constant(self.node.input[index])

    def tensor(self, index: int) -> Any | None:
        """The initializer, or the tensor of a Constant, that is this input."""
        return self.known.tensor(self.node.input[index]) if self.has(index) else None

    def number(self, index: int) -> int | None:
        """The only value of an INT64 constant."""
        tensor = self.tensor(index)
        if tensor is None or tensor.data_type != 7 or math.prod(tensor.dims) != 1:
            return None
        data = b"".join(pieces(self.graph, tensor))
        return int.from_bytes(data, "little", signed=True) if len(data) == 8 else None

    def inner(self, attribute: str) -> Known | None:
        """The graph that is this attribute."""
        found = next((a.g for a in self.node.attribute if a.name == attribute and a.HasField("g")), None)
        return None if found is None else self.inside.get(id(found))


def typed(graph: Path, model: Any) -> tuple[list[Known], str | None]:
    """Every scope of a model with its types, outer ones first; and what of it is not valid ONNX, if something is."""
    for scope in scopes(graph, model):  # inference goes down by recursion: bounded first
        for tensor in getattr(scope.graph, "initializer", ()):
            _take_in(graph, tensor)
    _declare_dequantized(model)
    model, problem = _inferred(model)
    found: dict[Scope, Known] = {}
    for scope in scopes(graph, model):
        outer = found[scope.outer] if scope.outer is not None else None
        found[scope] = Known(scope, outer, _declared(scope.graph))
    return list(found.values()), problem


def _take_in(graph: Path, tensor: Any) -> None:
    """Inference asks for the values of shapes and axes, and finds none outside the graph."""
    if tensor.data_type in (6, 7) and math.prod(tensor.dims) <= _SMALL and located(graph, tensor):  # INT32, INT64
        tensor.raw_data = b"".join(pieces(graph, tensor))
        tensor.data_location = 0
        del tensor.external_data[:]


def _declare_dequantized(model: Any) -> None:
    """ONNX knows no operator of TensorRT's: its output has the shape of its codes and the type it is asked for."""
    from onnx import TensorProto, helper

    waiting = [model.graph]
    while waiting:
        graph = waiting.pop()
        dims = {t.name: list(t.dims) for t in graph.initializer}
        for node in graph.node:
            waiting += [g for a in node.attribute for g in (*([a.g] if a.HasField("g") else []), *a.graphs)]
            if node.domain == TRT and node.op_type == "TRT_MXFP8DequantizeLinear" and node.input and node.output:
                asked = [a.i for a in node.attribute if a.name == "output_dtype"]
                shape = dims.get(node.input[0])
                if not asked or asked[0] in TensorProto.DataType.values():
                    graph.value_info.append(helper.make_tensor_value_info(node.output[0], (asked or [1])[0], shape))


def _inferred(model: Any) -> tuple[Any, str | None]:
    """A model with the types of its values. Its own functions are left out: they may call each other for ever."""
    from onnx import ModelProto, shape_inference

    plain = ModelProto()
    plain.CopyFrom(model)
    del plain.functions[:]
    problem = None
    for check in (True, False):
        try:
            return shape_inference.infer_shapes(plain, check_type=check, strict_mode=check), problem
        except Exception as error:  # of several kinds, with the nodes' own text in it
            problem = problem or printable(" ".join(str(error).split()), 200)
    return plain, problem


def _declared(graph: Any) -> dict[str, tuple[int, Dims | None]]:
    """Types and shapes as a graph declares them."""
    found: dict[str, tuple[int, Dims | None]] = {}
    for value in (*graph.value_info, *graph.input, *graph.output):
        tensor = value.type.tensor_type
        if not value.type.WhichOneof("value"):
            continue
        if not value.type.HasField("tensor_type") or not tensor.elem_type:
            found[value.name] = (0, None)
            continue
        dims = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
        found[value.name] = (int(tensor.elem_type), dims if tensor.HasField("shape") else None)
    found |= {t.name: (int(t.data_type), tuple(t.dims)) for t in graph.initializer}
    return found


def name_of(dtype: int | None) -> str:
    """ONNX's name of a type."""
    from onnx import TensorProto

    known = dtype in TensorProto.DataType.values()
    return TensorProto.DataType.Name(dtype) if dtype and known else "an unknown type"


def positive(graph: Path, tensor: Any) -> bool:
    """Whether all numbers of a float16, bfloat16 or float32 tensor are above zero."""
    import numpy as np

    kind, infinity = _INFINITY[int(tensor.data_type)]
    for piece in pieces(graph, tensor):
        if len(piece) % np.dtype(kind).itemsize:
            raise ExporterError(f"{graph.name}: initializer {printable(tensor.name)} has half a number", hint=AGAIN)
        bits = np.frombuffer(piece, kind)
        if bits.size and (int(bits.min()) == 0 or int(bits.max()) > infinity):  # a sign or NaN is above infinity
            return False
    return True


def all_zero(graph: Path, tensor: Any) -> bool:
    return not any(piece.strip(b"\0") for piece in pieces(graph, tensor))
