"""Which bytes of which file the initializers of an ONNX graph are; a reader that trusts nothing in it.

Source: ONNX IR specification, "External Tensor Data": location, offset and length as strings, the location
relative to the graph's folder. ONNX Runtime follows a hard link, and a graph may name any file of the machine:
here data lie inside the artifact's folder, in plain files, each byte in one initializer.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import ExporterError, MissingExtra

GRAPH_CAP = 64 << 20  # bytes; a graph of 36 layers with its weights outside takes about half a megabyte
_AGAIN = "exporter quantize ... --overwrite makes it again"
_MAX_DIMS, _MAX_DIM = 8, 1 << 40
_DEPTH = 16  # graphs inside graphs
BITS = {
    "float": 32, "double": 64, "float16": 16, "bfloat16": 16, "float8e8m0": 8, "float8e4m3fn": 8, "float8e5m2": 8,
    "int64": 64, "int32": 32, "int16": 16, "int8": 8, "uint64": 64, "uint32": 32, "uint16": 16, "uint8": 8,
    "int4": 4, "uint4": 4, "float4e2m1": 4, "bool": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One initializer. `dtype` is ONNX's name in lower case; `offset` counts from the start of the file `path`."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_initializers(graph: Path, root: Path) -> dict[str, Entry]:
    """The initializers of a graph whose bytes are in other files, by name; the data are not read.

    `root` is the artifact's folder: nothing outside it is looked at. Raises ExporterError for a graph that
    is damaged, or whose data are missing, short, linked, shared or elsewhere.
    """
    model = _parse(graph, root)
    _refuse_hidden(graph, model)
    names: set[str] = set()
    found: dict[str, Entry] = {}
    sizes: dict[Path, int] = {}
    for tensor in model.graph.initializer:
        if not tensor.name or tensor.name in names:
            problem = "appears twice" if tensor.name else "has no name"
            raise _damaged(graph, f"initializer {_shown(tensor.name)} {problem}")
        names.add(tensor.name)
        if _is_external(tensor):
            found[tensor.name] = _entry(graph, root, tensor, sizes)
    _refuse_overlaps(graph, found)
    return found


def _parse(graph: Path, root: Path) -> Any:
    """The model of a bounded file."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ModuleNotFoundError as missing:
        raise MissingExtra("onnx", "onnx", "reading an ONNX graph") from missing
    size = _plain_file(graph, root, graph)
    if size > GRAPH_CAP:
        raise _damaged(graph, f"{size:,} bytes, more than {GRAPH_CAP:,}: its weights are not outside it")
    try:
        model = onnx.ModelProto.FromString(graph.read_bytes())
    except DecodeError:
        raise _damaged(graph, "not an ONNX model, or cut off") from None
    if not model.ir_version or not model.graph.node:
        raise _damaged(graph, "no model in it")
    return model


def _refuse_hidden(graph: Path, model: Any) -> None:
    """External data are the main graph's initializers and nothing else: not a constant's, nor a branch's."""
    for tensor in _tensors_elsewhere(graph, model):
        if _is_external(tensor):
            raise _damaged(graph, f"{_shown(tensor.name)} has external data, but is no initializer of the main graph")


def _tensors_elsewhere(graph: Path, model: Any) -> Iterator[Any]:
    waiting = [(node, 0) for node in (*model.graph.node, *(n for f in model.functions for n in f.node))]
    yield from (part for s in model.graph.sparse_initializer for part in (s.values, s.indices))
    while waiting:
        node, depth = waiting.pop()
        if depth > _DEPTH:
            raise _damaged(graph, f"graphs nested more than {_DEPTH} deep")
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            sparse = (attribute.sparse_tensor, *attribute.sparse_tensors)
            yield from (part for s in sparse for part in (s.values, s.indices))
            for inner in (attribute.g, *attribute.graphs):
                yield from inner.initializer
                yield from (part for s in inner.sparse_initializer for part in (s.values, s.indices))
                waiting += [(n, depth + 1) for n in inner.node]


def _is_external(tensor: Any) -> bool:
    return bool(tensor.data_location == 1 or tensor.external_data)  # 1: TensorProto.EXTERNAL


def _entry(graph: Path, root: Path, tensor: Any, sizes: dict[Path, int]) -> Entry:
    name = _shown(tensor.name)
    if tensor.data_location != 1 or tensor.raw_data:
        raise _damaged(graph, f"{name} has data both inside and outside the graph")
    fields: dict[str, str] = {}
    for each in tensor.external_data:
        if each.key in fields:
            raise _damaged(graph, f"{name} names its {_shown(each.key)} twice")
        fields[each.key] = each.value
    dtype, shape, nbytes = _type_and_shape(graph, tensor)
    path = _located(graph, name, fields.get("location", ""))
    if path not in sizes:
        sizes[path] = _plain_file(path, root, graph)
    offset = _count(graph, name, "offset", fields.get("offset", "0"))
    length = _count(graph, name, "length", fields["length"]) if "length" in fields else nbytes
    if length != nbytes:
        raise _damaged(graph, f"{name} has {length:,} bytes; {dtype} {list(shape)} takes {nbytes:,}")
    if offset + length > sizes[path]:
        raise _damaged(path, f"{sizes[path]:,} bytes; {name} ends at {offset + length:,}")
    return Entry(path, dtype, shape, offset, nbytes)


def _type_and_shape(graph: Path, tensor: Any) -> tuple[str, tuple[int, ...], int]:
    """dtype, shape and the bytes that they take."""
    import onnx

    name, dims = _shown(tensor.name), tuple(tensor.dims[: _MAX_DIMS + 1])
    try:
        dtype = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
    except ValueError:
        dtype = f"type {tensor.data_type}"
    if dtype not in BITS:
        raise _damaged(graph, f"{name} is of {dtype}, which has no bytes of its own")
    if len(dims) > _MAX_DIMS or not all(0 <= d <= _MAX_DIM for d in dims):
        raise _damaged(graph, f"{name} has impossible dimensions {list(dims)}")
    return dtype, dims, -(-math.prod(dims) * BITS[dtype] // 8)


def _located(graph: Path, name: str, location: str) -> Path:
    """Where a location leads: downwards from the graph's folder, written the same way on every system."""
    steps = location.split("/")
    if re.search(r'[\\:\x00-\x1f*?"<>|]', location) or not all(s.strip(" .") for s in steps):
        where = _shown(location) if location else "nowhere"
        raise _damaged(graph, f"the data of {name} are at {where}, which is no plain path below its folder")
    return graph.parent.joinpath(*steps)


def _count(graph: Path, name: str, what: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,19}", text, re.ASCII):
        raise _damaged(graph, f"{name} has {what} {_shown(text)}, which is no count of bytes")
    return int(text)


def _plain_file(path: Path, root: Path, graph: Path) -> int:
    """Size of a regular file with one name, reached from `root` through no link."""
    try:
        steps = path.relative_to(root).parts
    except ValueError:
        raise _damaged(graph, f"{path} is outside the artifact's folder {root}") from None
    at = root
    for step in steps:
        if step == "..":
            raise _damaged(graph, f"{path} is outside the artifact's folder {root}")
        at = at / step
        try:
            found = os.lstat(at)
        except (FileNotFoundError, NotADirectoryError):
            raise ExporterError(f"{at} is missing", hint=_AGAIN) from None
        except OSError as error:
            raise _damaged(graph, f"{at} cannot be read: {error.strerror}") from None
        if stat.S_ISLNK(found.st_mode):
            raise _damaged(graph, f"{at} is a symbolic link; the artifact's own files and folders are not")
    if not steps or not stat.S_ISREG(found.st_mode):
        raise _damaged(graph, f"{at} is not a regular file")
    if found.st_nlink > 1:
        raise _damaged(graph, f"{at} is a hard link: another name can change its bytes")
    return found.st_size


def _refuse_overlaps(graph: Path, found: dict[str, Entry]) -> None:
    """Each byte belongs to one initializer; those of no bytes overlap nothing."""
    ranges: Sequence[tuple[Path, int, int, str]] = sorted(
        (e.path, e.offset, e.offset + e.nbytes, name) for name, e in found.items() if e.nbytes
    )
    for (path, _, end, name), (after, start, _, other) in itertools.pairwise(ranges):
        if path == after and start < end:
            raise _damaged(graph, f"{_shown(name)} and {_shown(other)} share bytes of {path.name}")


def _shown(name: str) -> str:
    return repr(name[:96])


def _damaged(path: Path, problem: str) -> ExporterError:
    return ExporterError(f"{path.name}: damaged ONNX artifact: {problem}", hint=_AGAIN)
