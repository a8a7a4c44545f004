"""bfloat16 as uint16 bits, since numpy has no such type."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
U16 = npt.NDArray[np.uint16]


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
