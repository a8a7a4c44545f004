"""MXFP4: 32 numbers of FP4 (e2m1) that share one power-of-two scale (e8m0).

Source: OCP Microscaling Formats v1.0; openai/gpt-oss `torch/weights.py` for the released order.
`value = LEVELS[code] * 2^(scale - 127)`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from exporter.errors import UsageError, did_you_mean
from exporter.numerics.bits import pack_nibbles, unpack_nibbles
from exporter.numerics.floats import F32
from exporter.types.qtensor import U8

BLOCK = 32
MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
LEVELS = np.concatenate([MAGNITUDES, -MAGNITUDES])  # code 8 is -0.0
SCALE_NAN = 255  # e8m0 has no infinity; 255 is NaN and never valid in a weight
# Halfway points between magnitudes; a tie goes to the even code, as IEEE 754 rounding does.
_MIDPOINTS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)


class Blocks(NamedTuple):
    """Packed codes uint8 [..., K/2] and scales uint8 [..., K/32]."""

    data: U8
    scales: U8


def scale_value(scales: U8) -> F32:
    """2^(s - 127), float32. s = 0 gives the subnormal 2^-127, exactly; 255 gives NaN."""
    out = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
    return np.where(scales == SCALE_NAN, np.float32(np.nan), out).astype(np.float32)


def dequantize(data: U8, scales: U8) -> F32:
    """uint8 [..., K/2], uint8 [..., K/32] -> float32 [..., K]."""
    levels = LEVELS[unpack_nibbles(data)]
    blocks = levels.reshape(*scales.shape, BLOCK)  # [..., K/32, 32]
    blocks *= scale_value(scales)[..., None]
    return levels


def _floor_log2(amax: F32) -> npt.NDArray[np.int32]:
    """floor(log2(amax)), -200 for zero. Exact, subnormals included (frexp)."""
    return np.where(amax > 0, np.frexp(amax)[1] - 1, -200).astype(np.int32)


def _rule_floor(amax: F32) -> npt.NDArray[np.int32]:
    # gguf-py's and the OCP text's rule: amax lands in [4, 8) and saturates above 6.
    return _floor_log2(amax) - 2


def _rule_ceil6(amax: F32) -> npt.NDArray[np.int32]:
    # ceil(log2(amax / 6)): nothing saturates.
    mantissa, exponent = np.frexp(amax / np.float32(6))
    return np.where(amax > 0, exponent - (mantissa == 0.5), -200).astype(np.int32)


def _rule_round175(amax: F32) -> npt.NDArray[np.int32]:
    # compressed-tensors' rule: amax above 7/4 of a power of two counts as the next one.
    mantissa, exponent = np.frexp(amax)
    return np.where(amax > 0, exponent - 3 + (mantissa >= 0.875), -200).astype(np.int32)


SCALE_RULES = ("mse", "floor", "ceil6", "round175")


def _codes(blocks: F32, exponents: npt.NDArray[np.int32]) -> U8:
    """Nearest codes [..., G, 32] for given exponents [..., G]; saturates at 6."""
    # The division is by a power of two: exact unless it leaves float32's range, so do it in float64.
    scaled = blocks.astype(np.float64) / np.ldexp(1.0, exponents)[..., None]
    magnitude = np.abs(scaled)
    codes = np.searchsorted(_MIDPOINTS, magnitude, side="left").astype(np.uint8)
    tie = np.isin(magnitude, _MIDPOINTS) & (codes % 2 == 1)
    codes += tie.astype(np.uint8)
    codes |= np.left_shift(np.signbit(scaled), 3, dtype=np.uint8)
    return codes


def quantize(values: F32, rule: str = "mse") -> Blocks:
    """Round float32 [..., K] to MXFP4, K a multiple of 32, with a named scale rule.

    "mse" tries the exponents floor - 1, floor, floor + 1 of every block and keeps the one with the
    least squared error (the smaller exponent on a tie). Not a number or infinity raises ValueError.
    """
    if rule not in SCALE_RULES:
        raise UsageError(
            f'unknown MXFP4 scale rule "{rule}".{did_you_mean(rule, SCALE_RULES)}',
            hint=f"rules: {', '.join(SCALE_RULES)}",
        )
    if not np.isfinite(values).all():
        raise ValueError("NaN or infinity cannot be stored as MXFP4")
    blocks = values.reshape(*values.shape[:-1], -1, BLOCK)  # [..., K/32, 32]
    amax = np.abs(blocks).max(axis=-1)
    if rule == "mse":
        codes, exponents = _search(blocks, _rule_floor(amax))
    else:
        pick = {"floor": _rule_floor, "ceil6": _rule_ceil6, "round175": _rule_round175}[rule]
        exponents = np.clip(pick(amax), -127, 127)
        codes = _codes(blocks, exponents)
    return Blocks(pack_nibbles(codes.reshape(values.shape)), (exponents + 127).astype(np.uint8))


def _search(blocks: F32, floor: npt.NDArray[np.int32]) -> tuple[U8, npt.NDArray[np.int32]]:
    best_error: npt.NDArray[np.float64] | None = None
    for step in (-1, 0, 1):
        exponents = np.clip(floor + step, -127, 127)
        codes = _codes(blocks, exponents)
        value = LEVELS[codes].astype(np.float64) * np.ldexp(1.0, exponents)[..., None]
        error = np.square(value - blocks).sum(axis=-1)
        if best_error is None:
            best_codes, best_exponents, best_error = codes, exponents, error
            continue
        better = error < best_error
        best_codes = np.where(better[..., None], codes, best_codes)
        best_exponents = np.where(better, exponents, best_exponents)
        best_error = np.where(better, error, best_error)
    return best_codes, best_exponents


def repack_exact(values: F32) -> tuple[Blocks, npt.NDArray[np.bool_]]:
    """MXFP4 blocks of numbers that lie on the grid already, and which blocks do: bool [..., K/32].

    With e = floor(log2 amax) - 2 the largest magnitude sits at 4 or 6, and every coarser grid is a
    subset of that one within the range: a block is on the grid if and only if it is exact there.
    Codes of blocks that are not exact are the nearest ones at that exponent.
    """
    blocks = values.reshape(*values.shape[:-1], -1, BLOCK)
    finite = np.where(np.isfinite(blocks), blocks, np.float32(0))
    exponents = np.clip(_rule_floor(np.abs(finite).max(axis=-1)), -127, 127)
    codes = _codes(finite, exponents)
    back = LEVELS[codes].astype(np.float64) * np.ldexp(1.0, exponents)[..., None]
    exact = (back == blocks).all(axis=-1)
    packed = pack_nibbles(codes.reshape(values.shape))
    return Blocks(packed, (exponents + 127).astype(np.uint8)), exact
