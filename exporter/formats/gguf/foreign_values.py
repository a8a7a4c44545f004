"""Numbers out of the blocks of any ggml type.

What our own files hold is decoded here, exactly; the many other types by gguf-py, the library of those who made them.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np

from exporter.errors import MissingExtra
from exporter.formats.gguf.blocks import BY_ID
from exporter.formats.gguf.foreign_tables import GgmlType
from exporter.numerics import decode
from exporter.numerics.floats import F32
from exporter.types import Scheme
from exporter.types.qtensor import U8

# gguf-py 0.19 decodes MXFP4's two smallest scales as 0, so that type is ours to decode too.
_OURS = {
    "F32": Scheme.parse("f32"),
    "F16": Scheme.parse("f16"),
    "BF16": Scheme.parse("bf16"),
    "MXFP4": Scheme.parse("mxfp4"),
}
_BLOCKS = {kind.name: kind for kind in BY_ID.values()}


def values(raw: U8, kind: GgmlType, name: str) -> F32:
    """float32 [n] of whole blocks, uint8 [n / block * bytes of a block]; exact.

    Raises MissingExtra for a type that needs gguf-py where that is not installed.
    """
    if kind.name == "F64":
        return raw.view("<f8").astype(np.float32)
    if kind.name in ("Q4_0", "Q8_0"):
        return _integers(raw.reshape(-1, kind.nbytes))
    scheme = _OURS.get(kind.name)
    if scheme is not None:
        q = _BLOCKS[kind.name].unpack(raw, name, scheme)
        if q.scales is not None:  # one block is one row: data [blocks, 16], scales [blocks, 1]
            q = replace(q, data=q.data.reshape(-1, 16), scales=q.scales.reshape(-1, 1))
        return decode.values(q).reshape(-1)
    library = _gguf_py(kind.name)
    with np.errstate(all="ignore"):
        found = library.quants.dequantize(raw.reshape(-1, kind.nbytes), library.GGMLQuantizationType[kind.name])
    return np.ascontiguousarray(found, np.float32).reshape(-1)


def _integers(blocks: U8) -> F32:
    """float32 [n * 32] of blocks [n, 18 or 34]: a float16 scale, then nibbles (k, k + 16) or signed bytes.

    Not by `blocks.unpack`, whose answer is a QTensor: a scale that is no number is none.
    """
    scales, body = np.ascontiguousarray(blocks[:, :2]).view(np.float16), blocks[:, 2:]
    if body.shape[1] == 16:
        codes = np.concatenate((body & 15, body >> 4), axis=1).astype(np.float32) - np.float32(8)
    else:
        codes = body.view(np.int8).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # a damaged scale may be infinite
        codes *= scales.astype(np.float32)
    return codes.reshape(-1)


@functools.cache
def _gguf_py(kind: str) -> Any:
    try:
        import gguf
        import gguf.quants
    except ModuleNotFoundError as missing:
        raise MissingExtra("gguf", "validate", f"reading {kind} tensors") from missing
    return gguf
