"""The tables of a GGUF file that anyone may have written: read within bounds, believed only where they agree.

Source: ggml `docs/gguf.md`, versions 2 and 3 (which differ in byte order alone). Counts are held against the bytes
that are left and against caps before anything is made from them: an array may claim 2^40 elements in a file of
100 bytes, or a thousand million empty strings in a file that has the room for them.
"""

from __future__ import annotations

import math
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from exporter.errors import ExporterError
from exporter.formats.gguf.file import ARRAY, BOOL, MAGIC, STRING

AGAIN = "download or copy this file again; the tool that wrote it can write it again"
HEADER_CAP = 128 << 20  # bytes; a released tokenizer makes 13 MB
_STRINGS_CAP = 1 << 22  # strings of all arrays together; a released tokenizer has 650,000
_STRING_CAP = 4 << 20  # bytes; a chat template has 17 kB
_KEPT_CAP = 16 << 20  # bytes of all texts and numbers that are kept; in memory they take up to eight times that
_NAME_CAP = 256  # bytes; ggml itself stops at 63
_COUNT_CAP = 1 << 16  # tensors, and keys; gpt-oss-120b has some 800
_KEPT = 4096  # numbers of an array that is kept; longer ones are a tokenizer's
_MAX_DIMS, _MAX_ELEMENTS = 4, 1 << 44

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class GgmlType:
    """A type of ggml: `block` numbers take `nbytes` bytes."""

    name: str
    block: int
    nbytes: int

    @property
    def bits(self) -> float:
        return self.nbytes * 8 / self.block


# ggml.h `ggml_type`, sizes as in ggml-common.h. Left out: those that are for activations (Q8_1, Q8_K), whole
# numbers, and those that ggml has removed.
TYPES = {
    0: GgmlType("F32", 1, 4), 1: GgmlType("F16", 1, 2), 30: GgmlType("BF16", 1, 2), 28: GgmlType("F64", 1, 8),
    2: GgmlType("Q4_0", 32, 18), 3: GgmlType("Q4_1", 32, 20), 6: GgmlType("Q5_0", 32, 22), 7: GgmlType("Q5_1", 32, 24),
    8: GgmlType("Q8_0", 32, 34), 10: GgmlType("Q2_K", 256, 84), 11: GgmlType("Q3_K", 256, 110),
    12: GgmlType("Q4_K", 256, 144), 13: GgmlType("Q5_K", 256, 176), 14: GgmlType("Q6_K", 256, 210),
    16: GgmlType("IQ2_XXS", 256, 66), 17: GgmlType("IQ2_XS", 256, 74), 18: GgmlType("IQ3_XXS", 256, 98),
    19: GgmlType("IQ1_S", 256, 50), 20: GgmlType("IQ4_NL", 32, 18), 21: GgmlType("IQ3_S", 256, 110),
    22: GgmlType("IQ2_S", 256, 82), 23: GgmlType("IQ4_XS", 256, 136), 29: GgmlType("IQ1_M", 256, 56),
    34: GgmlType("TQ1_0", 256, 54), 35: GgmlType("TQ2_0", 256, 66), 39: GgmlType("MXFP4", 32, 17),
    40: GgmlType("NVFP4", 64, 36),
}  # fmt: skip


@dataclass(frozen=True)
class Listed:
    """An array of the metadata: how many elements; `numbers` where it is short and holds numbers."""

    count: int
    numbers: tuple[float, ...] = ()


Scalar = int | float | bool | str


@dataclass(frozen=True)
class Tensor:
    """`shape` in numpy order; `offset` counts bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    offset: int

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.type.block * self.type.nbytes

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class Tables:
    """What one file says of itself."""

    path: Path
    size: int
    metadata: dict[str, Scalar | Listed]
    tensors: dict[str, Tensor]

    def text(self, key: str) -> str:
        """A text of the metadata, safe to print; "" where there is none."""
        value = self.metadata.get(key)
        return printable(value) if isinstance(value, str) else ""

    def whole(self, key: str) -> int | None:
        """A whole number, also as an array of equal ones (one a layer); None where there is none."""
        value = self.metadata.get(key)
        if isinstance(value, Listed) and value.numbers and len(set(value.numbers)) == 1:
            value = value.numbers[0]
        return value if isinstance(value, int) and not isinstance(value, bool) else None


def printable(text: str, limit: int = 80) -> str:
    """Text out of a file as part of one line."""
    return "".join(c if c.isprintable() else "?" for c in text[:limit])


def is_gguf(path: Path) -> bool:
    """Whether a regular file begins as a GGUF does; never opens a pipe or a device, which may hang."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with path.open("rb") as f:
            return f.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_tables(path: Path) -> Tables:
    """Metadata and tensor table of one file. Raises ExporterError for anything damaged or hostile."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ExporterError(f"{path} is not a plain file", hint=AGAIN)
        with path.open("rb") as f:
            return _Cursor(f, path, found.st_size).tables()
    except OSError as error:
        raise ExporterError(f"{path}: cannot be read ({error.strerror})", hint="check its permissions") from None


class _Cursor:
    """Bounded reading from the front of a file."""

    def __init__(self, f: IO[bytes], path: Path, size: int) -> None:
        self.f, self.path, self.size = f, path, size
        self.at = self.strings = self.kept = 0

    def fail(self, problem: str) -> ExporterError:
        return ExporterError(f"{self.path.name}: damaged GGUF: {problem}", hint=AGAIN)

    def take(self, n: int) -> bytes:
        self.need(n)
        raw = self.f.read(n)
        if len(raw) != n:
            raise self.fail("ends inside its header")
        self.at += n
        return raw

    def need(self, n: int) -> None:
        if n > self.size - self.at:
            raise self.fail(f"ends inside its header (at byte {self.at:,})")
        if n > HEADER_CAP - self.at:
            raise self.fail(f"its header is longer than {HEADER_CAP:,} bytes")

    def number(self, code: str) -> int | float | bool:
        value: int | float | bool = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]
        return value

    def count(self, code: str = "Q") -> int:
        return int(self.number(code))

    def string(self, cap: int = _STRING_CAP) -> str:
        n = self.count()
        if n > cap:
            self.need(n)
            raise self.fail(f"a text claims {n:,} bytes")
        self.keep(n)
        try:
            return self.take(n).decode()
        except UnicodeDecodeError:
            raise self.fail(f"a text is not UTF-8 (at byte {self.at - n:,})") from None

    def keep(self, n: int) -> None:
        self.kept += n
        if self.kept > _KEPT_CAP:
            raise self.fail(f"its keys hold more than {_KEPT_CAP:,} bytes")

    def code(self, kind: int) -> str:
        if kind not in _NUMBERS:
            raise self.fail(f"unknown value type {kind}")
        return _NUMBERS[kind]

    def value(self, kind: int) -> Scalar | Listed:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array()
        if kind == BOOL:  # struct would take any byte
            return self.take(1) != b"\0"
        return self.number(self.code(kind))

    def array(self) -> Listed:
        item, n = self.count("I"), self.count()
        if item == ARRAY:
            raise self.fail("arrays inside arrays")
        each = 8 if item == STRING else struct.calcsize(self.code(item))
        if n * each > self.size - self.at:
            raise self.fail(f"an array claims {n:,} elements")
        if item == STRING:
            self.strings += n
            if self.strings > _STRINGS_CAP:
                raise self.fail(f"its arrays claim more than {_STRINGS_CAP:,} texts")
            for _ in range(n):
                length = self.count()
                if length > _STRING_CAP:
                    raise self.fail(f"a text claims {length:,} bytes")
                self.take(length)
            return Listed(n)
        raw = self.take(n * each)
        if n > _KEPT:
            return Listed(n)
        self.keep(len(raw))
        return Listed(n, struct.unpack(f"<{n}{self.code(item)}", raw))

    def tables(self) -> Tables:
        if self.size < 24 or self.take(4) != MAGIC:
            raise ExporterError(f"{self.path.name}: not a GGUF file ({self.size:,} bytes)", hint=AGAIN)
        version = self.count("I")
        if version not in (2, 3):
            what = "is big-endian" if version in (2 << 24, 3 << 24) else f"has version {version}, not 3"
            raise ExporterError(f"{self.path.name}: this GGUF {what}", hint="convert the model again")
        n_tensors, n_keys = self.count(), self.count()
        # A tensor takes 32 bytes at least, a key 13.
        if n_tensors * 32 + n_keys * 13 > self.size or max(n_tensors, n_keys) > _COUNT_CAP:
            raise self.fail(f"claims {n_tensors:,} tensors and {n_keys:,} metadata keys")
        metadata: dict[str, Scalar | Listed] = {}
        for _ in range(n_keys):
            key = self.string(1 << 16)
            if key in metadata:
                raise self.fail(f"the key {printable(key)} occurs twice")
            metadata[key] = self.value(self.count("I"))
        tensors = self.tensors(n_tensors, self.alignment(metadata))
        return Tables(self.path, self.size, metadata, tensors)

    def alignment(self, metadata: dict[str, Scalar | Listed]) -> int:
        value = metadata.get("general.alignment", 32)
        if type(value) is not int or not 8 <= value <= 1 << 20 or value & (value - 1):
            raise self.fail("general.alignment is no power of two from 8 up")
        return value

    def tensors(self, count: int, alignment: int) -> dict[str, Tensor]:
        found = [self.tensor(alignment) for _ in range(count)]
        start = -(-self.at // alignment) * alignment
        placed = [Tensor(t.name, t.shape, t.type, start + t.offset) for t in found]
        at, before = start, "the header"
        for t in sorted(placed, key=lambda t: t.offset):
            if t.offset < at:
                raise self.fail(f"tensor {t.name} overlaps {before}")
            at, before = t.offset + t.nbytes, f"tensor {t.name}"
            if at > self.size:
                raise self.fail(f"ends at {self.size:,} bytes, inside tensor {t.name}, which ends at {at:,}")
        by_name = {t.name: t for t in placed}
        if len(by_name) != len(placed):
            raise self.fail("a tensor name occurs twice")
        if self.size > -(-at // alignment) * alignment:  # another file behind this one, or what is left of one
            raise self.fail(f"has {self.size - at:,} bytes behind its last tensor")
        return by_name

    def tensor(self, alignment: int) -> Tensor:
        """One line of the table; the offset still counts from the start of the data."""
        name, n_dims = self.string(_NAME_CAP), self.count("I")
        where = f"tensor {printable(name)}"
        if not name.isprintable():
            raise self.fail(f"{where} has a name that cannot be printed")
        if not 1 <= n_dims <= _MAX_DIMS:
            raise self.fail(f"{where} claims {n_dims} dimensions")
        shape = tuple(reversed(struct.unpack(f"<{n_dims}Q", self.take(8 * n_dims))))
        kind, offset = self.count("I"), self.count()
        if kind not in TYPES:
            raise self.fail(f"{where} has type {kind}, which is none of a weight")
        found = Tensor(name, shape, TYPES[kind], offset)
        if not all(shape) or math.prod(shape) > _MAX_ELEMENTS:
            raise self.fail(f"{where} has the impossible shape {list(shape)}")
        if shape[-1] % found.type.block:
            raise self.fail(f"{where} has rows of {shape[-1]:,}, no whole blocks of {found.type.name}")
        if offset % alignment:
            raise self.fail(f"{where} is not aligned to {alignment} bytes")
        return found
