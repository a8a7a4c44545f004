"""A QTensor back to codes or to numbers."""

from __future__ import annotations

import numpy as np

from exporter.numerics import e2m1, intq
from exporter.numerics.bits import unpack_nibbles
from exporter.numerics.floats import F32, bf16_to_f32
from exporter.types.qtensor import U8, QTensor


def codes(q: QTensor) -> U8:
    """One code to a byte: uint8 [..., K]. Integer and e2m1 schemes only."""
    if q.scheme.kind == "float":
        raise ValueError(f"{q.name} is {q.scheme.name}: floats have no codes")
    return unpack_nibbles(q.data) if q.scheme.bits == 4 else q.data


def values(q: QTensor) -> F32:
    """The numbers, float32 [..., K]; exact."""
    if q.scheme.kind == "float":
        raw = np.ascontiguousarray(q.data)
        if q.scheme.float_type == "bf16":
            return bf16_to_f32(raw.view(np.uint16))
        return raw.view(np.float32 if q.scheme.float_type == "f32" else np.float16).astype(np.float32)
    assert q.scales is not None
    if q.scheme.kind == "e2m1":
        return e2m1.dequantize(q.data, q.scales.view(np.uint8))
    return intq.dequantize(codes(q), q.scales.view(np.float16), q.zeros, q.scheme)
