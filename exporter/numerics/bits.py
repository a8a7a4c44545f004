"""Two 4-bit codes to a byte, even index in the low nibble (the order gpt-oss is released in)."""

from __future__ import annotations

import numpy as np

from exporter.types.qtensor import U8


def pack_nibbles(codes: U8) -> U8:
    """uint8 codes 0..15 [..., K] -> uint8 [..., K / 2]. K must be even."""
    if codes.shape[-1] % 2:
        raise ValueError(f"{codes.shape[-1]} codes do not fill whole bytes")
    out: U8 = np.left_shift(codes[..., 1::2], 4, dtype=np.uint8)
    out |= codes[..., 0::2]
    return out


def unpack_nibbles(data: U8) -> U8:
    """uint8 [..., K / 2] -> uint8 codes 0..15 [..., K]."""
    out = np.empty((*data.shape[:-1], data.shape[-1] * 2), np.uint8)
    np.bitwise_and(data, 15, out=out[..., 0::2])
    np.right_shift(data, 4, out=out[..., 1::2])
    return out
