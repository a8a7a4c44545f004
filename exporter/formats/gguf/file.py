"""The GGUF container: header, metadata and tensor table, written whole and read with bounds.

Source: ggml `docs/gguf.md`, version 3, little-endian. The reader trusts nothing: every count and
length is checked against the bytes that are left before anything is allocated (gguf-py hangs on a
2^40-element array in a file of 100 bytes).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import ExporterError

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
_MAX_DIMS = 4

# Value types of GGUF metadata.
U8, U16, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 2, 4, 5, 6, 7, 8, 9, 10
_FORMATS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}


@dataclass(frozen=True)
class Value:
    """A metadata value with its GGUF type; `item` is the type of an array's elements."""

    type: int
    value: Any
    item: int = 0


@dataclass(frozen=True)
class TensorInfo:
    """`dims` in numpy order (GGUF stores them reversed); `offset` counts from the start of the data."""

    name: str
    dims: tuple[int, ...]
    type: int
    offset: int


def align(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _strings(texts: Sequence[str]) -> bytes:
    """All strings of an array; a released tokenizer has 650,000 of them."""
    raw = [text.encode() for text in texts]
    lengths = struct.pack(f"<{len(raw)}Q", *map(len, raw))
    parts = [b""] * (2 * len(raw))
    parts[0::2] = [lengths[i : i + 8] for i in range(0, len(lengths), 8)]
    parts[1::2] = raw
    return b"".join(parts)


def _encode(value: Value) -> bytes:
    if value.type == STRING:
        return _string(value.value)
    if value.type == ARRAY:
        head = struct.pack("<IQ", value.item, len(value.value))
        if value.item == STRING:
            return head + _strings(value.value)
        code = _FORMATS[value.item][1]
        return head + struct.pack(f"<{len(value.value)}{code}", *value.value)
    return struct.pack(_FORMATS[value.type], value.value)


def encode_head(metadata: Mapping[str, Value], tensors: Sequence[TensorInfo]) -> bytes:
    """Everything before the tensor data, padded to the alignment."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), struct.pack("<I", value.type), _encode(value)]
    for t in tensors:
        dims = struct.pack(f"<I{len(t.dims)}Q", len(t.dims), *reversed(t.dims))
        parts += [_string(t.name), dims, struct.pack("<IQ", t.type, t.offset)]
    head = b"".join(parts)
    return head + bytes(align(len(head)) - len(head))


@dataclass(frozen=True)
class GgufFile:
    """The tables of one GGUF file. Tensor bytes start at `data_start`."""

    path: Path
    size: int
    metadata: dict[str, Value]
    tensors: list[TensorInfo]
    data_start: int


class _Cursor:
    """Bounded reading from the front of a file."""

    def __init__(self, raw: mmap.mmap, path: Path) -> None:
        self.raw, self.path, self.at = raw, path, 0

    def fail(self, problem: str) -> ExporterError:
        return ExporterError(
            f"{self.path.name}: damaged GGUF: {problem} (at byte {self.at})",
            hint="exporter quantize ... --overwrite makes it again",
        )

    def take(self, n: int) -> bytes:
        if n > len(self.raw) - self.at:
            raise self.fail("ends inside its header")
        self.at += n
        return self.raw[self.at - n : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        n = self.number("<Q")
        try:
            return self.take(n).decode()
        except UnicodeDecodeError:
            raise self.fail("a string is not UTF-8") from None

    def value(self, kind: int, depth: int = 0) -> Value:
        if kind == STRING:
            return Value(kind, self.string())
        if kind == ARRAY:
            item, n = self.number("<I"), self.number("<Q")
            if item == ARRAY or depth:
                raise self.fail("arrays inside arrays")
            smallest = 8 if item == STRING else struct.calcsize(self.format(item))
            if n * smallest > len(self.raw) - self.at:
                raise self.fail(f"an array claims {n:,} elements")
            if item == STRING:
                return Value(kind, [self.string() for _ in range(n)], item)
            body = self.take(n * smallest)
            return Value(kind, list(struct.unpack(f"<{n}{self.format(item)[1]}", body)), item)
        return Value(kind, self.number(self.format(kind)))

    def format(self, kind: int) -> str:
        if kind not in _FORMATS:
            raise self.fail(f"unknown value type {kind}")
        return _FORMATS[kind]


def read_gguf(path: Path) -> GgufFile:
    """Metadata and tensor table of one file. Raises ExporterError for anything damaged or hostile."""
    size = path.stat().st_size
    if size < 24:
        raise ExporterError(
            f"{path.name}: not a GGUF file ({size} bytes)", hint="exporter quantize ... --overwrite makes it again"
        )
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as raw:
        return _read_tables(_Cursor(raw, path), size)


def _read_tables(c: _Cursor, size: int) -> GgufFile:
    path = c.path
    if c.take(4) != MAGIC:
        raise ExporterError(f"{path.name}: not a GGUF file", hint="exporter quantize ... --overwrite makes it again")
    version = c.number("<I")
    if version != VERSION:
        raise ExporterError(
            f"{path.name}: GGUF version {version}, not {VERSION}",
            hint="exporter quantize ... --overwrite makes it again",
        )
    n_tensors, n_metadata = c.number("<Q"), c.number("<Q")
    if (n_tensors + n_metadata) * 16 > size:
        raise c.fail(f"claims {n_tensors:,} tensors and {n_metadata:,} metadata keys")
    metadata: dict[str, Value] = {}
    for _ in range(n_metadata):
        key = c.string()
        if key in metadata:
            raise c.fail(f"key {key!r} appears twice")
        metadata[key] = c.value(c.number("<I"))
    tensors = [_tensor_info(c) for _ in range(n_tensors)]
    if len({t.name for t in tensors}) != len(tensors):
        raise c.fail("a tensor name appears twice")
    return GgufFile(path, size, metadata, tensors, align(c.at))


def _tensor_info(c: _Cursor) -> TensorInfo:
    name, n_dims = c.string(), c.number("<I")
    if not 1 <= n_dims <= _MAX_DIMS:
        raise c.fail(f"tensor {name!r} claims {n_dims} dimensions")
    dims = struct.unpack(f"<{n_dims}Q", c.take(8 * n_dims))
    kind, offset = c.number("<I"), c.number("<Q")
    if offset % ALIGNMENT:
        raise c.fail(f"tensor {name!r} is not aligned")
    return TensorInfo(name, tuple(reversed(dims)), kind, offset)
