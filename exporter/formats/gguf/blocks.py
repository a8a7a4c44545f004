"""GGUF block types: how ggml lays out 32 quantized numbers, and back.

Sources: ggml `ggml-common.h` (block_q4_0, block_q8_0, block_mxfp4) and `ggml-quants.c`.
Our codes are packed two to a byte with even k in the low nibble; ggml puts k = 0..15 of a block into
the low nibbles and k = 16..31 into the high ones. Every function moves bits only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from exporter.numerics.floats import narrowed, widened
from exporter.types import QTensor, Scheme
from exporter.types.qtensor import U8

BLOCK = 32
_LOW = np.uint64(0x0F0F0F0F0F0F0F0F)
_HIGH = np.uint64(0xF0F0F0F0F0F0F0F0)
_FOUR = np.uint64(4)
_CHUNK = 65536  # blocks at a time: the intermediate arrays stay in the L2 cache


@dataclass(frozen=True)
class BlockType:
    """A ggml tensor type: its id in the file, numbers per block, bytes per block."""

    name: str
    id: int
    block: int
    nbytes: int
    pack: Callable[[QTensor], U8]
    unpack: Callable[[U8, str, Scheme], QTensor]

    def row_bytes(self, k: int) -> int:
        return k // self.block * self.nbytes


def _to_split_nibbles(pairs: U8) -> U8:
    """[n, 16] bytes of (2j, 2j+1) pairs -> [n, 16] bytes of (j, j+16) pairs.

    With a = bytes 0..7 and c = bytes 8..15: out[2k] = a[k] low | c[k] low << 4 and
    out[2k+1] = a[k] high | c[k] high, done on eight bytes at a time.
    """
    words = pairs.view(np.uint64)  # [n, 2]
    a, c = words[:, 0].copy(), words[:, 1].copy()
    out = np.empty(pairs.shape, np.uint8)
    out[:, 0::2] = ((a & _LOW) | ((c & _LOW) << _FOUR)).view(np.uint8).reshape(-1, 8)
    out[:, 1::2] = (((a >> _FOUR) & _LOW) | (c & _HIGH)).view(np.uint8).reshape(-1, 8)
    return out


def _from_split_nibbles(split: U8) -> U8:
    """The inverse of `_to_split_nibbles`, [n, 16] -> [n, 16]."""
    even = np.ascontiguousarray(split[:, 0::2]).view(np.uint64)[:, 0]  # [n]
    odd = np.ascontiguousarray(split[:, 1::2]).view(np.uint64)[:, 0]
    out = np.empty(split.shape, np.uint8)
    words = out.view(np.uint64)
    words[:, 0] = (even & _LOW) | ((odd & _LOW) << _FOUR)
    words[:, 1] = ((even >> _FOUR) & _LOW) | (odd & _HIGH)
    return out


def _sixteens(blocks: U8, offset: int, count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.complex128]]:
    """A view of `count` x 16 bytes at `offset` of every block.

    complex128 only because it is numpy's 16-byte type: copying whole elements at a stride is several
    times faster than copying short rows of bytes, and moves bits untouched.
    """
    shape, strides = (len(blocks), count), (blocks.shape[1], 16)
    return np.ndarray(shape, np.complex128, blocks.data, offset, strides)


def _pack_nibble_blocks(data: U8, scales: U8, scale_bytes: int) -> U8:
    """data [n, 16], scales [n, scale_bytes] -> blocks [n, scale_bytes + 16]."""
    out = np.empty((len(data), scale_bytes + 16), np.uint8)
    out[:, :scale_bytes] = scales
    body = _sixteens(out, scale_bytes, 1)
    for i in range(0, len(data), _CHUNK):
        split = _to_split_nibbles(data[i : i + _CHUNK])
        body[i : i + _CHUNK] = split.view(np.complex128)
    return out


def _unpack_nibble_blocks(blocks: U8, scale_bytes: int) -> tuple[U8, U8]:
    data = np.empty((len(blocks), 16), np.uint8)
    for i in range(0, len(blocks), _CHUNK):
        data[i : i + _CHUNK] = _from_split_nibbles(blocks[i : i + _CHUNK, scale_bytes:])
    return data, np.ascontiguousarray(blocks[:, :scale_bytes])


def _pack_mxfp4(q: QTensor) -> U8:
    # The scale byte is moved unchanged: ggml halves while decoding, its table holds doubled values.
    assert q.scales is not None
    data = np.ascontiguousarray(q.data).reshape(-1, 16)
    return _pack_nibble_blocks(data, q.scales.view(np.uint8).reshape(-1, 1), 1).reshape(-1)


def _unpack_mxfp4(raw: U8, name: str, scheme: Scheme) -> QTensor:
    data, scales = _unpack_nibble_blocks(raw.reshape(-1, 17), 1)
    return QTensor(name, scheme, data, scales)


def _group_scales(q: QTensor) -> U8:
    """float16 scales as bytes [blocks, 2]; a scale of a longer group is repeated for each of its blocks."""
    assert q.scales is not None
    assert q.scales.dtype == np.float16
    scales = np.ascontiguousarray(q.scales).reshape(-1)
    return np.repeat(scales, q.scheme.group // BLOCK).view(np.uint8).reshape(-1, 2)


def _one_scale_per_group(scales: U8, scheme: Scheme) -> np.ndarray[tuple[int, ...], np.dtype[np.float16]]:
    """The inverse of `_group_scales`. Raises ValueError where blocks of one group differ."""
    grouped = scales.view(np.float16).reshape(-1, scheme.group // BLOCK)
    if not (grouped == grouped[:, :1]).all():
        raise ValueError(f"blocks of one group of {scheme.group} have different scales")
    return np.ascontiguousarray(grouped[:, 0])


def _pack_q4_0(q: QTensor) -> U8:
    data = np.ascontiguousarray(q.data).reshape(-1, 16)
    return _pack_nibble_blocks(data, _group_scales(q), 2).reshape(-1)


def _unpack_q4_0(raw: U8, name: str, scheme: Scheme) -> QTensor:
    data, scales = _unpack_nibble_blocks(raw.reshape(-1, 18), 2)
    return QTensor(name, scheme, data, _one_scale_per_group(scales, scheme))


def _pack_q8_0(q: QTensor) -> U8:
    codes = np.ascontiguousarray(q.data).reshape(-1, BLOCK)
    out = np.empty((len(codes), 34), np.uint8)
    out[:, :2] = _group_scales(q)
    body = _sixteens(out, 2, 2)
    for i in range(0, len(codes), _CHUNK):
        signed = codes[i : i + _CHUNK] ^ np.uint8(0x80)  # code - 128 as int8
        body[i : i + _CHUNK] = signed.view(np.complex128)
    return out.reshape(-1)


def _unpack_q8_0(raw: U8, name: str, scheme: Scheme) -> QTensor:
    blocks = raw.reshape(-1, 34)
    scales = np.ascontiguousarray(blocks[:, :2])
    return QTensor(name, scheme, blocks[:, 2:] ^ np.uint8(0x80), _one_scale_per_group(scales, scheme))


def _pack_raw(q: QTensor) -> U8:
    return np.ascontiguousarray(q.data).reshape(-1)


def _unpack_raw(raw: U8, name: str, scheme: Scheme) -> QTensor:
    return QTensor(name, scheme, raw)


def _pack_f32(q: QTensor) -> U8:
    return widened(_pack_raw(q), q.scheme.float_type)


def _unpack_f32(raw: U8, name: str, scheme: Scheme) -> QTensor:
    return QTensor(name, scheme, narrowed(raw, scheme.float_type))


F32 = BlockType("F32", 0, 1, 4, _pack_f32, _unpack_f32)
F16 = BlockType("F16", 1, 1, 2, _pack_raw, _unpack_raw)
BF16 = BlockType("BF16", 30, 1, 2, _pack_raw, _unpack_raw)
Q4_0 = BlockType("Q4_0", 2, BLOCK, 18, _pack_q4_0, _unpack_q4_0)
Q8_0 = BlockType("Q8_0", 8, BLOCK, 34, _pack_q8_0, _unpack_q8_0)
MXFP4 = BlockType("MXFP4", 39, BLOCK, 17, _pack_mxfp4, _unpack_mxfp4)

BY_ID = {t.id: t for t in (F32, F16, BF16, Q4_0, Q8_0, MXFP4)}
