"""An ONNX graph that anyone may have made: read within bounds, walked to its bottom, its weights read in pieces.

Source: ONNX IR specification, "External Tensor Data": location, offset and length as strings, the location
relative to the graph's folder. Here the data lie in plain files below that folder and nowhere else.
"""

from __future__ import annotations

import functools
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import ExporterError, MissingExtra, Refused

GRAPH_CAP = 64 << 20  # bytes of a graph without its weights
PIECE = 1 << 20  # bytes of weights in memory at a time
DEFAULT_DOMAIN = {"ai.onnx": ""}  # the operators of ONNX itself go by two names
AGAIN = "exporter quantize ... --overwrite makes it again"
_DEPTH = 16  # graphs inside graphs
_MAX_DIMS, _MAX_DIM = 8, 1 << 40
_BITS = {
    "FLOAT": 32, "DOUBLE": 64, "FLOAT16": 16, "BFLOAT16": 16, "FLOAT8E8M0": 8, "FLOAT8E4M3FN": 8, "FLOAT8E5M2": 8,
    "INT64": 64, "INT32": 32, "INT16": 16, "INT8": 8, "UINT64": 64, "UINT32": 32, "UINT16": 16, "UINT8": 8,
    "INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "BOOL": 8,
}  # fmt: skip

Shape = tuple[int, ...]


def parse(graph: Path) -> Any:
    """The model of a bounded regular file, its weights not read.

    Raises MissingExtra without the onnx library, ExporterError for a file that is no model.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ModuleNotFoundError as missing:
        raise MissingExtra("onnx", "onnx", "reading an ONNX graph") from missing
    try:
        found = graph.stat()
    except FileNotFoundError:
        raise ExporterError(f"{graph} is missing", hint=AGAIN) from None
    if not stat.S_ISREG(found.st_mode) or found.st_size > GRAPH_CAP:
        what = f"{found.st_size:,} bytes, more than {GRAPH_CAP:,}" if stat.S_ISREG(found.st_mode) else "no file"
        raise ExporterError(f"{graph}: not a graph with its weights outside it: {what}", hint=AGAIN)
    try:
        model = onnx.ModelProto.FromString(graph.read_bytes())
    except DecodeError:
        raise ExporterError(f"{graph}: not an ONNX model, or cut off", hint=AGAIN) from None
    if not model.ir_version or not model.graph.node:
        raise ExporterError(f"{graph}: no model in it", hint=AGAIN)
    return model


@dataclass(frozen=True, eq=False)
class Scope:
    """A graph or a function, and what lies around it.

    holder: the node that it is inside of. outer: the graph of that node; None for the model's own and for functions.
    """

    graph: Any
    opsets: Mapping[str, int]
    outer: Scope | None = None
    holder: Any = None
    depth: int = 0

    @functools.cached_property
    def weights(self) -> dict[str, Any]:
        """Its initializers as they are in the file."""
        return {t.name: t for t in getattr(self.graph, "initializer", ())}

    @functools.cached_property
    def made(self) -> dict[str, Any]:
        """The node that makes a value."""
        return {name: node for node in self.graph.node for name in node.output if name}

    @functools.cached_property
    def shapes(self) -> dict[str, Shape]:
        """Of its inputs, 0 where unknown."""
        return {
            i.name: tuple(d.dim_value for d in i.type.tensor_type.shape.dim)
            for i in self.graph.input
            if not isinstance(i, str)
        }

    def around(self) -> Iterator[Scope]:
        """This one, the one that it is in, and so on."""
        scope: Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.outer

    def weight(self, name: str) -> Any | None:
        """The initializer of a name, in this graph or around it."""
        return next((s.weights[name] for s in self.around() if name in s.weights), None)


@dataclass(frozen=True)
class Place:
    """A node and where it is."""

    node: Any
    scope: Scope

    def __str__(self) -> str:
        name = self.node.name or f"that makes {self.node.output[0] if self.node.output else 'nothing'}"
        return f"node {printable(name, 96)} ({printable(self.node.op_type)})"

    @property
    def domain(self) -> str:
        return DEFAULT_DOMAIN.get(self.node.domain, str(self.node.domain))

    @functools.cached_property
    def attributes(self) -> dict[str, Any]:
        from onnx import helper

        try:
            found = {a.name: helper.get_attribute_value(a) for a in self.node.attribute if not a.ref_attr_name}
        except ValueError:
            raise ExporterError(f"{self}: an attribute of no type", hint=AGAIN) from None
        return {name: v.decode("utf-8", "replace") if isinstance(v, bytes) else v for name, v in found.items()}

    def has(self, index: int) -> bool:
        return index < len(self.node.input) and bool(self.node.input[index])

    def tensor(self, index: int) -> Any | None:
        """The initializer that is this input."""
        return self.scope.weight(self.node.input[index]) if self.has(index) else None

    def weight(self, index: int) -> tuple[int, Shape] | None:
        """dtype (ONNX's number) and shape of the initializer that is this input."""
        tensor = self.tensor(index)
        return None if tensor is None else (int(tensor.data_type), tuple(tensor.dims))


def printable(text: str | bytes, length: int = 48) -> str:
    """A name out of a file, as part of one line. One that is not UTF-8 comes as bytes."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "?" for c in text[:length])


def scopes(graph: Path, model: Any) -> Iterator[Scope]:
    """The model's graph, its functions, and the graphs inside nodes of these. Raises Refused where they go too deep."""
    opsets = _opsets(model.opset_import)
    waiting = [Scope(model.graph, opsets)]
    waiting += [Scope(f, opsets | _opsets(f.opset_import)) for f in model.functions]
    while waiting:
        scope = waiting.pop()
        if scope.depth > _DEPTH:
            raise Refused(f"{graph.name}: graphs nested more than {_DEPTH} deep", hint=AGAIN)
        yield scope
        for node in scope.graph.node:
            for attribute in node.attribute:
                graphs = [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
                waiting += [Scope(inner, scope.opsets, scope, node, scope.depth + 1) for inner in graphs]


def places(graph: Path, model: Any) -> Iterator[Place]:
    """Every node: of the graph, of graphs inside nodes, and of the model's own functions."""
    for scope in scopes(graph, model):
        for node in scope.graph.node:
            yield Place(node, scope)


def _opsets(imports: Any) -> dict[str, int]:
    return {DEFAULT_DOMAIN.get(i.domain, str(i.domain)): int(i.version) for i in imports}


def pieces(graph: Path, tensor: Any) -> Iterator[bytes]:
    """The bytes of a weight, at most PIECE at a time: little-endian, 4-bit codes two to a byte or one to a byte.

    Raises ExporterError where they are missing, short, elsewhere or not what its shape says.
    """
    from onnx import numpy_helper

    where = located(graph, tensor)
    if where:
        path, offset, left = where
        with path.open("rb") as file:
            file.seek(offset)
            while left:
                piece = file.read(min(PIECE, left))
                if not piece:
                    raise _damaged(graph, tensor, f"ends early in {path.name}")
                yield piece
                left -= len(piece)
        return
    size = _size(graph, tensor)
    if tensor.raw_data and len(tensor.raw_data) != size:
        raise _damaged(graph, tensor, f"has {len(tensor.raw_data):,} bytes, not {size:,}")
    if tensor.raw_data:
        yield tensor.raw_data
        return
    if size > GRAPH_CAP * 8:  # a number of 1 byte in the file may be one of 8 in memory
        raise _damaged(graph, tensor, "has no data for its shape")
    try:
        yield numpy_helper.to_array(tensor).tobytes()
    except (ValueError, TypeError):
        raise _damaged(graph, tensor, "has other data than its shape says") from None


def located(graph: Path, tensor: Any) -> tuple[Path, int, int] | None:
    """File, offset and bytes of a weight outside the graph; None for one inside it."""
    if tensor.data_location != 1 and not tensor.external_data:  # 1: TensorProto.EXTERNAL
        return None
    fields = {each.key: printable(each.value, 4096) for each in tensor.external_data}
    location = fields.get("location", "")
    steps = location.split("/")
    if re.search(r'[\\:\x00-\x1f*?"<>|]', location) or not all(s.strip(" .") for s in steps):
        raise _damaged(graph, tensor, f"has its data at {location[:96]!r}, which is no plain path below its folder")
    at = graph.parent
    for step in steps:
        at = at / step
        try:
            found = os.lstat(at)
        except OSError:
            raise ExporterError(f"{at} is missing", hint=AGAIN) from None
        if stat.S_ISLNK(found.st_mode):
            raise _damaged(graph, tensor, f"has its data behind {at.name}, a symbolic link")
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        raise _damaged(graph, tensor, f"has its data in {at.name}, which is no plain file of one name")
    size = _size(graph, tensor)
    offset, length = (_count(graph, tensor, fields.get(f, d)) for f, d in (("offset", "0"), ("length", str(size))))
    if length != size:
        raise _damaged(graph, tensor, f"has {length:,} bytes, not {size:,}")
    if offset + length > found.st_size:
        raise _damaged(graph, tensor, f"ends at {offset + length:,} of the {found.st_size:,} bytes of {at.name}")
    return at, offset, size


def _size(graph: Path, tensor: Any) -> int:
    """Bytes of a tensor by its type and shape."""
    from onnx import TensorProto

    dims = tuple(tensor.dims[: _MAX_DIMS + 1])
    known = tensor.data_type in TensorProto.DataType.values()
    dtype = TensorProto.DataType.Name(tensor.data_type) if known else f"type {tensor.data_type}"
    if dtype not in _BITS:
        raise _damaged(graph, tensor, f"is of {dtype}, which has no bytes of its own")
    if len(dims) > _MAX_DIMS or not all(0 <= d <= _MAX_DIM for d in dims):
        raise _damaged(graph, tensor, f"has impossible dimensions {list(dims)}")
    bits: int = math.prod(dims) * _BITS[dtype]
    return -(-bits // 8)


def _count(graph: Path, tensor: Any, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,19}", text, re.ASCII):
        raise _damaged(graph, tensor, f"has {text[:48]!r} for a count of bytes")
    return int(text)


def _damaged(graph: Path, tensor: Any, problem: str) -> ExporterError:
    return ExporterError(f"{graph.name}: initializer {printable(tensor.name, 96)} {problem}", hint=AGAIN)
