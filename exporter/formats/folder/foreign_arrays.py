"""Parts of stored matrices: their rows or columns, their words spread into codes, their numbers as float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from exporter.numerics import e2m1
from exporter.numerics.floats import F32, bf16_to_f32
from exporter.types import TensorRef
from exporter.types.qtensor import U8

# (path, offset, bytes) -> those bytes.
Fetch = Callable[[Path, int, int], U8]
Words = npt.NDArray[Any]
FLOATS = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E8M0": 1}


def view(raw: U8, dtype: str) -> Words:
    """Stored numbers; BF16 as its bits, F8 as its codes."""
    kinds = {"I32": "<u4", "I64": "<i8", "U8": "u1", "I8": "i1", "F8_E4M3": "u1", "F8_E8M0": "u1", **FLOATS}
    return raw.view(kinds[dtype])


def lines(fetch: Fetch, ref: TensorRef, start: int, stop: int) -> Words:
    """Leading indices [start, stop) of a stored tensor, [stop - start, ...]."""
    each = ref.nbytes // ref.shape[0]
    raw = fetch(ref.path, ref.offset + start * each, (stop - start) * each)
    return view(raw, ref.dtype).reshape(stop - start, *ref.shape[1:])


def columns(fetch: Fetch, ref: TensorRef, start: int, stop: int) -> Words:
    """Columns [start, stop) of a stored matrix [R, C], read row by row where they are not all of it."""
    rows, width = ref.shape
    if (start, stop) == (0, width):
        return lines(fetch, ref, 0, rows)
    size = ITEM_BYTES[ref.dtype]
    out = np.empty((rows, (stop - start) * size), np.uint8)
    for i in range(rows):
        out[i] = fetch(ref.path, ref.offset + (i * width + start) * size, (stop - start) * size)
    return view(out.reshape(-1), ref.dtype).reshape(rows, stop - start)


def floats(words: Words, dtype: str) -> F32:
    """Numbers of a stored float type, or e8m0 scales, as float32; exact."""
    if dtype in ("U8", "F8_E8M0"):  # a scale of a power of two
        return e2m1.scale_value(words)
    wide = bf16_to_f32(words) if dtype == "BF16" else words.astype(np.float32)
    return np.ascontiguousarray(wide)


def spread(words: Words, bits: int) -> U8:
    """uint32 [..., n] -> codes [..., n * 32 / bits], low bits first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = (words[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    return codes.astype(np.uint8).reshape(*words.shape[:-1], -1)


def grouped(codes: U8, scales: F32, zeros: Words, group: npt.NDArray[np.int64]) -> F32:
    """scale * (code - zero): codes [n, K], scales and zeros [n, G], the group of each input [K] -> float32 [n, K]."""
    out = codes.astype(np.float32)
    n, k, count = *out.shape, scales.shape[1]
    if k % count == 0 and np.array_equal(group, np.arange(k) // (k // count)):  # in order: nothing to look up
        parts = out.reshape(n, count, -1)
        parts -= zeros[..., None].astype(np.float32)
        parts *= scales[..., None]
        return out
    out -= zeros[:, group]
    out *= scales[:, group]
    return out


def _e4m3() -> F32:
    """The 256 numbers of FP8 E4M3 (OCP FP8 1.0): bias 7, no infinity, 0x7F and 0xFF are NaN."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    small = mantissa * 2.0**-9
    table = np.where(exponent == 0, small, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    table[127] = np.nan
    return np.concatenate([table, -table]).astype(np.float32)


E4M3 = _e4m3()
