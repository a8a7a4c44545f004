"""Round to nearest, and the exact return of dequantized MXFP4 to its blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from exporter.errors import BadCheckpoint
from exporter.numerics import decode, e2m1, intq
from exporter.numerics.floats import F32, f32_to_bf16
from exporter.types import QTensor, Scheme

_DOCTOR = "exporter doctor names every damaged tensor"
_CHUNK = 1 << 20  # numbers at a time
# Exponent bits all set: infinity or NaN.
_EXPONENT = {"bf16": (np.uint16, 0x7F80), "f16": (np.uint16, 0x7C00), "f32": (np.uint32, 0x7F800000)}


def require_finite(q: QTensor) -> None:
    """Raises BadCheckpoint naming the tensor when numbers that are moved as they are hold NaN or infinity."""
    if q.scheme.kind == "float":
        kind, mask = _EXPONENT[q.scheme.float_type]
        bits = np.ascontiguousarray(q.data).view(kind).reshape(-1)
        for i in range(0, bits.size, _CHUNK):
            if bool(((bits[i : i + _CHUNK] & kind(mask)) == mask).any()):
                raise BadCheckpoint(f"{q.name} holds NaN or infinity", hint=_DOCTOR)
    elif q.scheme.kind == "e2m1" and q.scales is not None and bool((q.scales == e2m1.SCALE_NAN).any()):
        raise BadCheckpoint(f"{q.name} has an MXFP4 scale of 255, which is not a number", hint=_DOCTOR)


def round_to(q: QTensor, scheme: Scheme) -> QTensor:
    """`q`'s numbers, rounded to `scheme`. Raises BadCheckpoint naming the tensor for NaN, infinity or overflow."""
    values = decode.values(q)
    try:
        if scheme.kind == "float":
            return QTensor(q.name, scheme, _floats(values, scheme).view(np.uint8))
        if scheme.kind == "e2m1":
            data, scales = e2m1.quantize(values, scheme.scale_rule)
            return QTensor(q.name, scheme, data, scales)
        codes, f16_scales = intq.quantize(values, scheme)
        return QTensor(q.name, scheme, codes, f16_scales)
    except ValueError as e:
        raise BadCheckpoint(f"{q.name}: {e}", hint=_DOCTOR) from None


def _floats(values: F32, scheme: Scheme) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    if scheme.float_type == "f32":
        return np.ascontiguousarray(values)
    if scheme.float_type == "bf16":
        return f32_to_bf16(values)
    if float(np.abs(values).max(initial=0)) > intq.F16_MAX:
        raise ValueError(f"magnitude {float(np.abs(values).max()):g} is beyond float16")
    return values.astype(np.float16)


@dataclass(frozen=True)
class Repacked:
    """Numbers from floats; `exact` of `blocks` blocks were on the MXFP4 grid and moved without loss."""

    q: QTensor
    exact: int
    blocks: int


def repack(q: QTensor, scheme: Scheme) -> Repacked:
    """Floats -> MXFP4: blocks on the grid exactly, the others rounded by `scheme.scale_rule`.

    Checkpoints that were only dequantized come back without loss this way.
    """
    values = decode.values(q)
    if not np.isfinite(values).all():
        raise BadCheckpoint(f"{q.name}: NaN or infinity cannot be stored as MXFP4", hint=_DOCTOR)
    packed, exact = e2m1.repack_exact(values)
    if not exact.all():
        # Only the blocks off the grid need the search, which is slow.
        blocks = values.reshape(*exact.shape, e2m1.BLOCK)[~exact]  # [n, 32]
        data, scales = e2m1.quantize(blocks, scheme.scale_rule)
        packed.data.reshape(*exact.shape, e2m1.BLOCK // 2)[~exact] = data
        packed.scales[~exact] = scales[:, 0]
    return Repacked(QTensor(q.name, scheme, packed.data, packed.scales), int(exact.sum()), exact.size)
