"""bfloat16 as uint16 bits, since numpy has no such type; narrow floats as float32 and back."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
U16 = npt.NDArray[np.uint16]
U8 = npt.NDArray[np.uint8]


def bf16_to_f32(bits: U16) -> F32:
    """Exact. uint16 [...] -> float32 [...]."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def f32_to_bf16(values: F32) -> U16:
    """Round to nearest, ties to even; NaN stays NaN (its payload may change)."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    out = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        out[nan] = 0x7FC0
    return out


def f32_is_bf16(values: F32) -> bool:
    """Whether every number is a bfloat16 already."""
    return not bool((np.ascontiguousarray(values).view(np.uint32) & 0xFFFF).any())


def widened(raw: U8, float_type: str) -> U8:
    """Floats of type "f32", "f16" or "bf16" as float32; exact. Both are bytes, uint8 [n]."""
    if float_type == "bf16":
        return bf16_to_f32(raw.view(np.uint16)).view(np.uint8)
    if float_type == "f16":
        return raw.view(np.float16).astype(np.float32).view(np.uint8)
    return raw


def narrowed(raw: U8, float_type: str) -> U8:
    """The inverse of `widened`. Raises ValueError where a number is not of that type."""
    values = raw.view(np.float32)
    if float_type == "bf16":
        if not f32_is_bf16(values):
            raise ValueError("holds numbers that are not bfloat16")
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    if float_type == "f16":
        half = values.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), values, equal_nan=True):
            raise ValueError("holds numbers that are not float16")
        return half.view(np.uint8)
    return raw
