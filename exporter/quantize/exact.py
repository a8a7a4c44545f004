"""MXFP4 numbers as 8-bit integers with power-of-two f16 scales: every number equal, no calibration.

Twice an FP4 magnitude is one of 0, 1, 2, 3, 4, 6, 8, 12, so `code - 128 = 2 * fp4` under the scale
2^(e8m0 - 128) is the same number. Where float16 cannot hold that power of two, codes take up the
difference as far as they reach (12 * 8 < 128); the released exponents lie well inside.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from exporter.errors import BadCheckpoint, Refused
from exporter.numerics import decode, e2m1, intq
from exporter.numerics.bits import unpack_nibbles
from exporter.quantize.rtn import Repacked
from exporter.types import QTensor, Scheme
from exporter.types.qtensor import U8

I32 = npt.NDArray[np.int32]

_TWICE = (e2m1.LEVELS * 2).astype(np.int8)
_LOWEST, _HIGHEST = -24, 15  # powers of two that float16 holds exactly


def from_mxfp4(q: QTensor, scheme: Scheme) -> QTensor:
    """MXFP4 [..., K] as int8 with groups that are a multiple of 32. Raises Refused naming the tensor."""
    assert q.scales is not None
    if scheme.group == e2m1.BLOCK and (usual := _usual(q.data, q.scales.view(np.uint8), scheme)) is not None:
        return QTensor(q.name, scheme, *usual)
    codes, exponents, lossless = _codes(q.data, q.scales.view(np.uint8), scheme)
    if not lossless.all():
        raise Refused(
            f"{q.name}: {int((~lossless).sum())} groups have exponents that {scheme.name} cannot hold exactly",
            hint='method = "pass" with scheme = "mxfp4" holds them',
        )
    return QTensor(q.name, scheme, codes, _scales(exponents))


def from_floats(q: QTensor, scheme: Scheme) -> Repacked:
    """Floats: groups on the MXFP4 grid exactly, the others rounded to nearest with `absmax` scales."""
    values = decode.values(q)
    try:
        rounded, scales = intq.quantize(values, scheme)
    except ValueError as e:
        raise BadCheckpoint(f"{q.name}: {e}", hint="exporter doctor names every damaged tensor") from None
    packed, on_grid = e2m1.repack_exact(values)
    codes, exponents, lossless = _codes(packed.data, packed.scales, scheme)
    lossless &= on_grid.reshape(*lossless.shape, -1).all(axis=-1)
    grouped = rounded.reshape(*lossless.shape, scheme.group)
    grouped[lossless] = codes.reshape(grouped.shape)[lossless]
    scales[lossless] = _scales(exponents)[lossless]
    return Repacked(QTensor(q.name, scheme, rounded, scales), int(lossless.sum()), lossless.size)


def _usual(data: U8, scales: U8, scheme: Scheme) -> tuple[U8, npt.NDArray[np.float16]] | None:
    """What `_codes` and `_scales` give where float16 holds every block's own exponent, ten times as fast; else None."""
    # Two words of 16 codes each; the sign of a zero says nothing.
    blocks = np.ascontiguousarray(data).reshape(-1, e2m1.BLOCK // 2).view("<u8")
    empty = ~(blocks & np.uint64(0x7777_7777_7777_7777)).any(axis=-1).reshape(scales.shape)
    exponents = np.where(empty, 0, scales.astype(np.int32) - 128)
    if exponents.min(initial=0) < _LOWEST or exponents.max(initial=0) > _HIGHEST:
        return None
    levels = (_TWICE.astype(np.int16) + scheme.zero).astype("<u2")
    table = np.tile(levels, 16) | np.repeat(levels << 8, 16)  # of a byte: its low nibble's code, then its high one's
    # Without mode="clip" numpy looks at every index first, and takes ten times as long.
    pairs = np.take(table, data, mode="clip")
    return pairs.view(np.uint8).reshape(*data.shape[:-1], -1), _scales(exponents)


def _codes(data: U8, scales: U8, scheme: Scheme) -> tuple[U8, I32, npt.NDArray[np.bool_]]:
    """Codes [..., K], exponents of the group scales [..., K / group], and whether each group is exact."""
    per_group = scheme.group // e2m1.BLOCK
    twice = _TWICE[unpack_nibbles(data)].reshape(*scales.shape[:-1], -1, per_group, e2m1.BLOCK).astype(np.int32)
    own = scales.astype(np.int32).reshape(*twice.shape[:-1]) - 128  # exponent of each block's integers
    # Blocks of zeros say nothing about the scale of their group.
    empty = ~twice.any(axis=-1)
    lowest = np.where(empty, 1 << 20, own).min(axis=-1, keepdims=True)
    own = np.where(empty, np.where(lowest == 1 << 20, 0, lowest), own)
    exponents = np.clip(own.min(axis=-1), _LOWEST, _HIGHEST)
    shift = own - exponents[..., None]
    integers = twice * np.ldexp(1.0, np.clip(shift, -8, 8))[..., None]
    lossless = ((np.abs(integers) <= 127) & (integers == np.rint(integers))).all(axis=(-1, -2))
    lossless &= ((np.abs(shift) <= 8) | empty).all(axis=-1)
    clipped = np.where(lossless[..., None, None], integers, 0)
    codes = (clipped.astype(np.int16) + scheme.zero).astype(np.uint8)
    return codes.reshape(*data.shape[:-1], -1), exponents, lossless


def _scales(exponents: I32) -> npt.NDArray[np.float16]:
    return np.ldexp(np.float32(1), exponents).astype(np.float16)
