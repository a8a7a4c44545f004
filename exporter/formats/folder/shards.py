"""safetensors files: a header that is known before any number, and a reader that trusts nothing in it.

Source: the safetensors format: the header's length in 8 bytes, a JSON object of dtype, shape and offsets
by name, the bytes. Tensors are laid out widest type first, so that each one is aligned to its own type.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import ExporterError
from exporter.types.qtensor import U8

ITEM_BYTES = {"I64": 8, "I32": 4, "F32": 4, "F16": 2, "BF16": 2, "U8": 1}
_HEADER_CAP = 100_000_000  # bytes; the limit of the safetensors library
_AGAIN = "exporter quantize ... --overwrite makes it again"


@dataclass(frozen=True)
class Stored:
    """One tensor of a file. `make` gives its bytes where they do not come from the model's numbers."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], U8] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Entry:
    """A tensor as a file's header gives it; `offset` counts from the start of the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def encode_header(tensors: Sequence[Stored], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """The head of a file of these tensors, the offset of each in the file, and the file's size."""
    at, relative, table = 0, {}, {}
    for t in sorted(tensors, key=lambda t: -ITEM_BYTES[t.dtype]):
        relative[t.name] = at
        table[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    raw = json.dumps({"__metadata__": dict(metadata), **table}, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    head = len(raw).to_bytes(8, "little") + raw
    return head, {name: len(head) + start for name, start in relative.items()}, len(head) + at


def read_headers(paths: Sequence[Path]) -> dict[str, Entry]:
    """Every tensor of some files, by name. Raises ExporterError for what no writer of ours makes."""
    found: dict[str, Entry] = {}
    for path in paths:
        for name, entry in _read_header(path).items():
            if name in found:
                raise _damaged(path, f"tensor {name[:96]!r} appears twice")
            found[name] = entry
    return found


def _read_header(path: Path) -> dict[str, Entry]:
    size = path.stat().st_size
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        if size < 8 or n > min(size - 8, _HEADER_CAP):
            raise _damaged(path, "its header does not fit into it")
        raw = f.read(n)
    try:
        table: Any = json.loads(raw)
    except (ValueError, RecursionError):
        raise _damaged(path, "its header is not JSON") from None
    if not isinstance(table, dict):
        raise _damaged(path, "its header is not an object")
    table.pop("__metadata__", None)
    return {name: _entry(path, name, value, 8 + n, size) for name, value in table.items()}


def _entry(path: Path, name: str, value: Any, start: int, size: int) -> Entry:
    value = value if isinstance(value, dict) else {}
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not (isinstance(dtype, str) and dtype in ITEM_BYTES and _counts(shape) and _counts(offsets)):
        raise _damaged(path, f"tensor {name[:96]!r} has no type, shape and place of ours")
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if len(offsets) != 2 or offsets[1] - offsets[0] != nbytes or start + offsets[1] > size:
        raise _damaged(path, f"tensor {name[:96]!r} does not lie where its header says")
    return Entry(path, dtype, tuple(shape), start + offsets[0])


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 60 for n in value)


def _damaged(path: Path, problem: str) -> ExporterError:
    return ExporterError(f"{path.name}: damaged safetensors file: {problem}", hint=_AGAIN)
