"""What a file claims about itself, checked before anything believes it: JSON objects and safetensors headers.

Source: the safetensors format (8 bytes little-endian header length, a JSON header, the bytes); its
rules are enforced here in full: a header of at most 100 MB, offsets that cover the rest of the file
without overlap, hole or trailing bytes, sizes that agree with dtype and shape, no duplicate names.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import BadCheckpoint
from exporter.types import TensorRef

HEADER_CAP = 100_000_000  # bytes; the limit that safetensors itself sets
JSON_CAP = 32 << 20  # bytes; the largest real index (120b, one tensor per expert) is about 3 MB
_MAX_DIMS = 8
_MAX_DIM = 1 << 48

# Bits per element of every dtype the format knows. Layouts decide which of them a model may use.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

_DOWNLOAD_AGAIN = "download or copy this file again"


@dataclass(frozen=True)
class Header:
    """One safetensors file: its tensors by name, its free-text metadata and its size on disk in bytes."""

    refs: dict[str, TensorRef]
    metadata: dict[str, str]
    file_bytes: int


def shown(text: object, limit: int = 96) -> str:
    """Text from a file, safe to print: one line, no control characters, of bounded length."""
    kept = str(text)[: limit + 1]
    kept = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in kept)
    return kept if len(kept) <= limit else kept[: limit - 3] + "..."


def shown_list(names: Iterable[object], first: int = 3) -> str:
    """The first few names and how many more there are."""
    every = [shown(n) for n in names]
    rest = len(every) - first
    return ", ".join(every[:first]) + (f" and {rest:,} more" if rest > 0 else "")


class _DuplicateKey(ValueError):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKey(key)
            seen.add(key)
    return out


def parse_object(raw: bytes, where: str, hint: str) -> dict[str, Any]:
    """A JSON object in UTF-8 without duplicate keys. Raises BadCheckpoint, for nesting bombs too."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except _DuplicateKey as e:
        raise BadCheckpoint(f'{where}: the key "{shown(e)}" occurs twice', hint) from None
    except RecursionError:
        raise BadCheckpoint(f"{where}: nested too deeply to be genuine", hint) from None
    except ValueError as e:  # JSON, UTF-8, and numbers of thousands of digits
        raise BadCheckpoint(f"{where}: not valid JSON ({shown(e)})", hint) from None
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{where}: holds a {type(value).__name__}, not an object", hint)
    return value


def file_size(path: Path) -> int:
    """Bytes of a regular file. Pipes, devices and folders are refused: opening one can hang."""
    try:
        info = path.stat()
    except FileNotFoundError:
        what = "is a link to a file that is gone" if path.is_symlink() else "is missing"
        raise BadCheckpoint(f"{path} {what}", _DOWNLOAD_AGAIN) from None
    except OSError as e:
        raise BadCheckpoint(f"{path}: cannot be opened ({e.strerror})", "check its permissions") from None
    if not stat.S_ISREG(info.st_mode):
        raise BadCheckpoint(f"{path} is not a plain file", _DOWNLOAD_AGAIN)
    return info.st_size


def read_small(path: Path, cap: int = JSON_CAP) -> bytes:
    """A whole file of at most `cap` bytes. Raises BadCheckpoint."""
    size = file_size(path)
    if size > cap:
        raise BadCheckpoint(f"{path}: {size:,} bytes, above the {cap:,} such a file can need", _DOWNLOAD_AGAIN)
    try:
        with path.open("rb") as f:
            return f.read(cap)
    except OSError as e:
        raise BadCheckpoint(f"{path}: cannot be read ({e.strerror})", "check its permissions") from None


def read_json(path: Path, cap: int = JSON_CAP) -> dict[str, Any]:
    """The JSON object in a file of at most `cap` bytes. Raises BadCheckpoint."""
    return parse_object(read_small(path, cap), str(path), _DOWNLOAD_AGAIN)


def read_header(path: Path) -> Header:
    """The checked header of one safetensors file; no tensor is read. Raises BadCheckpoint."""
    size = file_size(path)
    try:
        with path.open("rb") as f:
            head = f.read(8)
            length = int.from_bytes(head, "little")
            _check_length(path, head, length, size)
            raw = f.read(length)
    except OSError as e:
        raise BadCheckpoint(f"{path}: cannot be read ({e.strerror})", "check its permissions") from None
    if len(raw) != length:
        raise BadCheckpoint(f"{path}: ended inside its header", _DOWNLOAD_AGAIN)
    if not raw.startswith(b"{"):
        raise BadCheckpoint(f"{path}: not a safetensors file (no header)", _DOWNLOAD_AGAIN)
    entries = parse_object(raw, f"{path} (header)", _DOWNLOAD_AGAIN)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise BadCheckpoint(f"{path}: __metadata__ is not a map of texts", _DOWNLOAD_AGAIN)
    start = 8 + length
    refs = {name: _entry(path, name, entry, start) for name, entry in entries.items()}
    _check_cover(path, list(refs.values()), start, size)
    return Header(refs, metadata, size)


def _check_length(path: Path, head: bytes, length: int, size: int) -> None:
    if head == b"version ":  # "version https://git-lfs.github.com/spec/v1"
        raise BadCheckpoint(f"{path}: a git-lfs pointer, not the weights themselves", "run git lfs pull")
    if len(head) < 8:
        raise BadCheckpoint(f"{path}: {size} bytes, too short for a safetensors file", _DOWNLOAD_AGAIN)
    if length > size - 8:
        raise BadCheckpoint(
            f"{path}: its header claims {length:,} bytes, the file has {size:,}: truncated, or not safetensors",
            _DOWNLOAD_AGAIN,
        )
    if length > HEADER_CAP:
        raise BadCheckpoint(f"{path}: its header claims {length:,} bytes, the limit is {HEADER_CAP:,}", _DOWNLOAD_AGAIN)


def _wholes(values: Any) -> list[int] | None:
    """`values` when it is a short list of whole numbers from 0 up (true and false are not), else None."""
    if not isinstance(values, list) or len(values) > _MAX_DIMS:
        return None
    return values if all(type(v) is int and 0 <= v <= _MAX_DIM for v in values) else None


def _entry(path: Path, name: str, entry: Any, start: int) -> TensorRef:
    """One header entry as a TensorRef whose bytes agree with its dtype and shape."""
    where = f"{path}: tensor {shown(name)}"
    if not isinstance(entry, dict):
        raise BadCheckpoint(f"{where} has no description", _DOWNLOAD_AGAIN)
    dtype = entry.get("dtype")
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if not isinstance(dtype, str) or bits is None:
        raise BadCheckpoint(f"{where} has the unknown dtype {shown(dtype)}", _DOWNLOAD_AGAIN)
    shape, offsets = _wholes(entry.get("shape")), _wholes(entry.get("data_offsets"))
    if shape is None:
        raise BadCheckpoint(f"{where} has the impossible shape {shown(entry.get('shape'))}", _DOWNLOAD_AGAIN)
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise BadCheckpoint(f"{where} has the impossible offsets {shown(entry.get('data_offsets'))}", _DOWNLOAD_AGAIN)
    nbytes = offsets[1] - offsets[0]
    if math.prod(shape) * bits != nbytes * 8:
        raise BadCheckpoint(
            f"{where} is {dtype} {shape}, which is {math.prod(shape) * bits // 8:,} bytes, "
            f"but its offsets span {nbytes:,}",
            _DOWNLOAD_AGAIN,
        )
    return TensorRef(name, dtype, tuple(shape), path, start + offsets[0], nbytes)


def _check_cover(path: Path, refs: list[TensorRef], start: int, size: int) -> None:
    """Tensors must cover the file from the header to its end, once."""
    at = start
    for ref in sorted(refs, key=lambda r: (r.offset, r.nbytes)):
        if ref.offset != at:
            fault = "overlaps the tensor before it" if ref.offset < at else "leaves a hole before it"
            raise BadCheckpoint(f"{path}: tensor {shown(ref.name)} {fault}", _DOWNLOAD_AGAIN)
        at += ref.nbytes
    if at > size:
        raise BadCheckpoint(
            f"{path}: truncated: the header describes {at:,} bytes, the file has {size:,}", _DOWNLOAD_AGAIN
        )
    if at < size:
        raise BadCheckpoint(f"{path}: {size - at:,} bytes after the last tensor belong to nothing", _DOWNLOAD_AGAIN)
