"""Symmetric integers with f16 scales: GGUF, MatMulNBits, TensorRT and GPTQ all hold them exactly.

The scale is rounded to float16 first and codes are chosen against the rounded scale, so what is
stored is what was meant.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from exporter.numerics.bits import pack_nibbles
from exporter.numerics.floats import F32
from exporter.types.qtensor import U8
from exporter.types.scheme import Scheme

F16_MAX = float(np.finfo(np.float16).max)
_CHUNK = 4096  # groups at a time: the intermediate arrays stay in the L2 cache


def quantize(values: F32, scheme: Scheme) -> tuple[U8, npt.NDArray[np.float16]]:
    """Round float32 [..., K] to symmetric integers: packed codes and float16 scales [..., K/group].

    scale = f16(amax / (2^(bits-1) - 1)), codes = round-half-even(value / scale) + zero, in float32. A group
    whose scale rounds to zero (amax under 2^-25 or so) becomes exact zeros with scale 0, as in
    ggml's quantize_row_q8_0. Raises ValueError for NaN, infinity or a scale beyond float16.
    """
    top = np.float32((1 << (scheme.bits - 1)) - 1)
    groups = values.reshape(-1, scheme.group)  # [rows * K/group, group]
    codes = np.empty(groups.shape, np.uint8)
    scales = np.empty(len(groups), np.float16)
    for i in range(0, len(groups), _CHUNK):
        part = groups[i : i + _CHUNK]
        # Transposed, the maximum runs along whole vectors: twice as fast as 32 numbers at a time.
        amax = np.abs(np.ascontiguousarray(part.T)).max(axis=0)
        if not np.isfinite(amax).all():
            raise ValueError(f"NaN or infinity cannot be stored as {scheme.name}")
        if float(amax.max()) / float(top) > F16_MAX:
            raise ValueError(f"magnitude {float(amax.max()):g} needs a scale beyond float16")
        scales[i : i + _CHUNK] = amax / top
        wide = scales[i : i + _CHUNK].astype(np.float32)
        # A true division: times the reciprocal is another code where a value lies between two.
        scaled = part / np.where(wide > 0, wide, np.float32(np.inf))[:, None]
        np.rint(scaled, out=scaled)
        # f16 rounding of the scale can push amax past the top code.
        np.clip(scaled, -top, top, out=scaled)
        scaled += np.float32(scheme.zero)
        codes[i : i + _CHUNK] = scaled
    shaped: U8 = codes.reshape(values.shape)
    data = pack_nibbles(shaped) if scheme.bits == 4 else shaped
    return data, scales.reshape(*values.shape[:-1], -1)


def dequantize(codes: U8, scales: npt.NDArray[np.float16], zeros: U8 | None, scheme: Scheme) -> F32:
    """codes uint8 [..., K] one to a byte -> float32 [..., K] = scale * (code - zero)."""
    shape = codes.shape
    groups = codes.reshape(*shape[:-1], -1, scheme.group).astype(np.float32)
    groups -= np.float32(scheme.zero) if zeros is None else zeros[..., None].astype(np.float32)
    groups *= scales.astype(np.float32)[..., None]
    return groups.reshape(shape)
