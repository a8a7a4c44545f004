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

I32 = npt.NDArray[np.int32]

BLOCK = 32
MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
LEVELS = np.concatenate([MAGNITUDES, -MAGNITUDES])  # code 8 is -0.0
_CHUNK = 2048  # blocks at a time: the intermediate arrays stay in the L2 cache
_POWERS = np.array([*(2.0 ** (s - 127) for s in range(255)), np.nan], np.float32)
SCALE_NAN = 255  # e8m0 has no infinity; 255 is NaN and never valid in a weight


class Blocks(NamedTuple):
    """Packed codes uint8 [..., K/2] and scales uint8 [..., K/32]."""

    data: U8
    scales: U8


def scale_value(scales: U8) -> F32:
    """2^(s - 127), float32. s = 0 gives the subnormal 2^-127, exactly; 255 gives NaN."""
    return _POWERS[scales]


def dequantize(data: U8, scales: U8) -> F32:
    """uint8 [..., K/2], uint8 [..., K/32] -> float32 [..., K]. Only scales of 253 and 254 can overflow, to infinity."""
    levels = LEVELS[unpack_nibbles(data)]
    blocks = levels.reshape(*scales.shape, BLOCK)  # [..., K/32, 32]
    with np.errstate(over="ignore"):
        blocks *= scale_value(scales)[..., None]
    return levels


def _floor_log2(amax: F32) -> I32:
    """floor(log2(amax)), -200 for zero. Exact, subnormals included (frexp)."""
    return np.where(amax > 0, np.frexp(amax)[1] - 1, -200).astype(np.int32)


def _rule_floor(amax: F32) -> I32:
    # gguf-py's and the OCP text's rule: amax lands in [4, 8) and saturates above 6.
    return _floor_log2(amax) - 2


def _rule_ceil6(amax: F32) -> I32:
    # ceil(log2(amax / 6)): nothing saturates.
    mantissa, exponent = np.frexp(amax / np.float32(6))
    return np.where(amax > 0, exponent - (mantissa == 0.5), -200).astype(np.int32)


def _rule_round175(amax: F32) -> I32:
    # compressed-tensors' rule: amax above 7/4 of a power of two counts as the next one.
    mantissa, exponent = np.frexp(amax)
    return np.where(amax > 0, exponent - 3 + (mantissa >= 0.875), -200).astype(np.int32)


_RULES = {"floor": _rule_floor, "ceil6": _rule_ceil6, "round175": _rule_round175}
SCALE_RULES = ("mse", *_RULES)


def _scaled(blocks: F32, exponents: I32) -> F32:
    """Magnitudes [n, 32] over 2^exponents [n]: exact, but for what underflows to code 0 or saturates anyway."""
    return np.abs(blocks) * np.ldexp(np.float32(1), -exponents)[:, None]


def _round_magnitude(m: F32) -> F32:
    """Codes 0..7 (as floats) of magnitudes in units of the scale; nearest, ties to the even code.

    The steps between levels are 1/2 below 2, 1 below 4 and 2 above; each line is right on its own range
    and too large outside it. Above 6 it saturates.
    """
    code = np.rint(m * 2)
    np.minimum(code, np.rint(m) + 2, out=code)
    np.minimum(code, np.rint(m * np.float32(0.5)) + 4, out=code)
    return np.minimum(code, 7, out=code)


def _signed(code: F32, blocks: F32) -> U8:
    codes = code.astype(np.uint8)
    codes |= np.left_shift(np.signbit(blocks), 3, dtype=np.uint8)
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
    blocks = values.reshape(-1, BLOCK)
    codes, scales = np.empty(blocks.shape, np.uint8), np.empty(len(blocks), np.uint8)
    for i in range(0, len(blocks), _CHUNK):
        part = blocks[i : i + _CHUNK]
        amax = np.abs(part).max(axis=-1)
        if not np.isfinite(amax).all():
            raise ValueError("NaN or infinity cannot be stored as MXFP4")
        chosen, exponents = _search(part, amax) if rule == "mse" else _round(part, _RULES[rule](amax))
        codes[i : i + _CHUNK] = chosen
        scales[i : i + _CHUNK] = exponents + 127
    return _packed(values.shape, codes, scales)


def _packed(shape: tuple[int, ...], codes: U8, scales: U8) -> Blocks:
    return Blocks(pack_nibbles(codes.reshape(shape)), scales.reshape(*shape[:-1], -1))


def _round(blocks: F32, exponents: I32) -> tuple[U8, I32]:
    exponents = np.clip(exponents, -127, 127)
    return _signed(_round_magnitude(_scaled(blocks, exponents)), blocks), exponents


def _search(blocks: F32, amax: F32) -> tuple[U8, I32]:
    middle = np.clip(_rule_floor(amax), -127, 127)
    best_error = np.full(len(blocks), np.inf, np.float32)
    best_code = np.empty(blocks.shape, np.float32)
    best_exponents = np.empty(len(blocks), np.int32)
    for step in (-1, 0, 1):
        exponents = np.clip(middle + step, -127, 127)
        m = _scaled(blocks, exponents)
        code = _round_magnitude(m)
        m -= MAGNITUDES[code.astype(np.uint8)]
        # In units of 4^middle, so that no magnitude overflows.
        error = np.einsum("nk,nk->n", m, m) * np.ldexp(np.float32(1), 2 * (exponents - middle))
        better = error < best_error
        best_code[better], best_exponents[better] = code[better], exponents[better]
        best_error[better] = error[better]
    return _signed(best_code, blocks), best_exponents


def repack_exact(values: F32) -> tuple[Blocks, npt.NDArray[np.bool_]]:
    """MXFP4 blocks of numbers that lie on the grid already, and which blocks do: bool [..., K/32].

    With e = floor(log2 amax) - 2 the largest magnitude sits at 4 or 6, and every coarser grid is a
    subset of that one within the range: a block is on the grid if and only if it is exact there.
    Codes of blocks that are not exact are the nearest ones at that exponent; NaN and infinity count as 0.
    """
    blocks = values.reshape(-1, BLOCK)
    codes, scales = np.empty(blocks.shape, np.uint8), np.empty(len(blocks), np.uint8)
    exact = np.empty(len(blocks), np.bool_)
    for i in range(0, len(blocks), _CHUNK):
        part = blocks[i : i + _CHUNK]
        finite = np.where(np.isfinite(part), part, np.float32(0))
        chosen, exponents = _round(finite, _rule_floor(np.abs(finite).max(axis=-1)))
        codes[i : i + _CHUNK] = chosen
        scales[i : i + _CHUNK] = exponents + 127
        back = LEVELS[chosen] * np.ldexp(np.float32(1), exponents)[:, None]
        exact[i : i + _CHUNK] = (back == part).all(axis=-1)
    return _packed(values.shape, codes, scales), exact.reshape(*values.shape[:-1], -1)
