"""Which initializers hold the numbers of a step, and the bits there: signed integers, FP4 as it was released.

Rows [N, K] stay rows: TensorRT multiplies by a transposed weight as well, and fuses decoding and the choice of
experts just the same, so nothing is turned about. Integer codes get their sign back (two's complement, low nibble
first); scales stay float16. FP4 and its e8m0 scales (UINT8) lie as they were released. q, k and v are rows of one
matrix; gate rows come before up rows, so that the activation takes halves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from exporter.errors import Refused
from exporter.formats.base import Part
from exporter.formats.onnx.arrays import (
    FLOATS,
    Array,
    HeadRows,
    Initializer,
    floats,
    graph_name,
    is_expert,
    kept_wide,
    rows,
)
from exporter.formats.onnx.external import BITS
from exporter.numerics.floats import widened
from exporter.types import QTensor
from exporter.types.qtensor import U8
from exporter.types.recipe import Step

# TensorRT refuses an INT8 scale that is not positive, so a group of zeros under scale zero is one of zeros under
# the least float16: the same numbers, and no quantizer of ours writes them so itself.
_STANDS_FOR_ZERO = np.float16(2.0**-24)


def arrays(step: Step, heads: HeadRows = (0, 0, 0)) -> list[Array]:
    """Where the arrays of `pack` go. Without `heads` sizes are right, places in a matrix of q, k and v are not."""
    scheme, shape, name = step.scheme, step.spec.shape, graph_name(step)
    if scheme.kind == "float":
        dtype = "float" if kept_wide(step.spec) else FLOATS[scheme.float_type]
        return [_place(step, name, dtype, shape[2:] if is_expert(step) else shape[1:], heads)]
    codes, scales = ("float4e2m1", "uint8") if scheme.kind == "e2m1" else (f"int{scheme.bits}", "float16")
    return [
        _place(step, f"{name}_codes", codes, (shape[-1],), heads),
        _place(step, f"{name}_scales", scales, (shape[-1] // scheme.group,), heads),
    ]


def _place(step: Step, name: str, dtype: str, inner: tuple[int, ...], heads: HeadRows) -> Array:
    """Rows of `inner` items; those of gate and up are the halves of one matrix of each expert."""
    if not (".experts.gate_proj." in step.name or ".experts.up_proj." in step.name):
        return rows(step, name, dtype, inner, heads)
    e, n = step.spec.shape[:2]
    half = n * math.prod(inner) * BITS[dtype] // 8
    start = half if ".up_proj." in step.name else 0
    return Array(Initializer(name, dtype, (e, 2 * n, *inner)), Part(start, 2 * half, half))


def pack(step: Step, q: QTensor) -> list[U8]:
    """The stored bytes of some leading indices. Raises Refused for a scale that TensorRT does not take."""
    raw = [np.ascontiguousarray(a).view(np.uint8) for a in (q.data, q.scales) if a is not None]
    if step.scheme.kind == "float" and kept_wide(step.spec):
        return [widened(raw[0].reshape(-1), step.scheme.float_type)]
    if step.scheme.kind != "int":
        return raw
    if step.scheme.bits == 8:
        raw[1] = _positive(step, q).view(np.uint8)
    return [raw[0] ^ _sign(step), raw[1]]


def unpack(step: Step, packed: Sequence[U8]) -> QTensor:
    """The inverse of `pack` for a whole number of leading indices. Raises ValueError where there is none."""
    scheme, shape = step.scheme, step.spec.shape
    lead = (len(packed[0]), *shape[1:-1]) if len(shape) > 1 else ()
    if scheme.kind == "float":
        return floats(step, packed[0], lead)
    data, scales = packed[0].reshape(*lead, -1), packed[1].reshape(*lead, -1)
    if scheme.kind == "e2m1":
        return QTensor(step.name, scheme, data, scales)
    codes, halves = data ^ _sign(step), scales.view(np.float16)
    if scheme.bits == 8:
        halves = np.where((halves == _STANDS_FOR_ZERO) & _empty(step, codes), np.float16(0), halves)
    return QTensor(step.name, scheme, codes, halves)


def _sign(step: Step) -> np.uint8:
    """What turns codes around their zero into two's complement and back."""
    return np.uint8(0x88 if step.scheme.bits == 4 else 0x80)


def _positive(step: Step, q: QTensor) -> npt.NDArray[np.float16]:
    assert q.scales is not None
    scales = q.scales.view(np.float16)
    if scales.min(initial=np.float16(1)) > _STANDS_FOR_ZERO:
        return scales
    empty = _empty(step, q.data)
    if (
        np.signbit(scales).any()
        or not np.isfinite(scales).all()
        or (~empty & (scales == 0)).any()
        or (empty & (scales == _STANDS_FOR_ZERO)).any()
    ):
        raise Refused(
            f"{step.name} has an INT8 scale that is not positive, which TensorRT does not take",
            hint="a recipe with scale rule absmax or mse has only positive ones",
        )
    return np.where(scales == 0, _STANDS_FOR_ZERO, scales)


def _empty(step: Step, codes: U8) -> npt.NDArray[np.bool_]:
    """Groups of zeros [..., K / group] among 8-bit codes [..., K]."""
    grouped = codes.reshape(*codes.shape[:-1], -1, step.scheme.group)
    empty: npt.NDArray[np.bool_] = (grouped == step.scheme.zero).all(axis=-1)
    return empty
