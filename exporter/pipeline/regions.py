"""Arrays in and out of the parts of a file: as few reads and writes as their geometry allows.

A part may lie in one run (GGUF), in runs of a row (one of two interleaved matrices), or in pieces of four
bytes far apart (a few rows of a transposed matrix). All are strided views of one span of the file, so
the axes are sorted from far to near and neighbours that touch are merged; what is left is the runs.

Where two parts share their bytes, each has bits of its own (`Part.mask`) and leaves the other's alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from exporter.formats.base import Part
from exporter.pipeline.files import write_at
from exporter.types.qtensor import U8

# Runs shorter than this are not worth a system call each where they fill a good part of their span.
_SHORT = 1024
_DENSE = 4  # at least a quarter of the span
_ALL = 0xFF

Words = npt.NDArray[Any]


def array_shape(part: Part, count: int) -> tuple[int, ...]:
    """Shape of `count` leading indices of a part."""
    return (count, *(n for n, _ in part.axes), part.width)


def span(part: Part, count: int) -> int:
    """Bytes from the first to the last of `count` leading indices."""
    return (count - 1) * part.lead + sum((n - 1) * stride for n, stride in part.axes) + part.width


def write(descriptor: int, part: Part, start: int, array: U8, lock: Lock) -> None:
    """Write leading indices from `start` on. Raises ValueError for bits that are not the part's.

    `lock` is the file's: short pieces go in by reading what lies between, shared bytes by reading the other bits.
    """
    if part.mask != _ALL and bool((array & np.uint8(_ALL ^ part.mask)).any()):
        raise ValueError(f"an array has bits outside the mask {part.mask:#04x} of its part")
    count = array.size // part.index_bytes
    offset = part.offset + start * part.lead
    near, strides = _far_to_near(part, array.reshape(array_shape(part, count)))
    run = _run_axes(near.shape, strides)
    runs = np.ascontiguousarray(near).reshape(math.prod(near.shape[:run]), -1).view(np.uint8)
    if runs.shape[1] < _SHORT and len(runs) > 1 and runs.size * _DENSE >= span(part, count):
        with lock:
            raw = _pread(descriptor, span(part, count), offset)
            _put(_view(raw, near.dtype.itemsize, near.shape, strides), near, part.mask)
            write_at(descriptor, [raw], offset)
        return
    for at, piece in zip(_starts(offset, near.shape[:run], strides), runs, strict=True):
        if part.mask == _ALL:
            write_at(descriptor, [piece], at)
            continue
        with lock:
            raw = _pread(descriptor, piece.size, at)
            _put(raw, piece, part.mask)
            write_at(descriptor, [raw], at)


def read(descriptor: int, part: Part, start: int, stop: int) -> U8 | None:
    """Leading indices [start, stop), uint8 [stop - start, axes..., width]; None where the file ends before them.

    Of shared bytes only the part's own bits, the others zero.
    """
    array = _read(descriptor, part, start, stop)
    return array if array is None or part.mask == _ALL else array & np.uint8(part.mask)


def _read(descriptor: int, part: Part, start: int, stop: int) -> U8 | None:
    count = stop - start
    shape = array_shape(part, count)
    offset = part.offset + start * part.lead
    if math.prod(shape) * _DENSE >= span(part, count):
        try:
            raw = _pread(descriptor, span(part, count), offset)
        except EOFError:
            return None
        strides = (part.lead, *(s for _, s in part.axes), 1)
        return np.ascontiguousarray(as_strided(raw, shape, strides, writeable=False))
    out = np.empty(shape, np.uint8)
    near, strides = _far_to_near(part, out)
    run = _run_axes(near.shape, strides)
    for index in np.ndindex(near.shape[:run]):
        at = offset + sum(i * s for i, s in zip(index, strides, strict=False))
        try:
            raw = _pread(descriptor, near[index].nbytes, at)
        except EOFError:
            return None
        near[index] = raw.view(near.dtype).reshape(near.shape[run:])
    return out


def read_all(descriptor: int, parts: Sequence[Part], start: int, stop: int) -> list[U8] | None:
    """Leading indices [start, stop) of every part; None where the file ends inside one."""
    arrays = [read(descriptor, part, start, stop) for part in parts]
    found = [array for array in arrays if array is not None]
    return found if len(found) == len(parts) else None


def _far_to_near(part: Part, array: U8) -> tuple[Words, tuple[int, ...]]:
    """A view of `array` with its axes in the order of the file, and their strides there.

    The last axis becomes whole words where the width is one of numpy's: moving those is many times faster.
    """
    words: Words = array
    strides = [part.lead, *(s for _, s in part.axes)]
    size = part.width if part.width in (2, 4, 8) else 1
    if size > 1:
        words = array.view(f"<u{size}")
    order = sorted(range(len(strides)), key=lambda axis: -strides[axis])
    moved = words.transpose(*order, len(strides))
    return moved, (*(strides[axis] for axis in order), words.dtype.itemsize)


def _run_axes(shape: Sequence[int], strides: Sequence[int]) -> int:
    """How many leading axes lie apart; the axes after them are one run of bytes."""
    axis = len(shape) - 1
    nbytes = shape[axis] * strides[axis]
    while axis and (strides[axis - 1] == nbytes or shape[axis - 1] == 1):
        axis -= 1
        nbytes *= shape[axis]
    return axis


def _starts(offset: int, shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Where each index of axes of these strides begins, in order."""
    starts = np.full(1, offset, np.int64)
    for count, stride in zip(shape, strides, strict=False):
        starts = np.add.outer(starts, np.arange(count) * stride).reshape(-1)
    found: list[int] = starts.tolist()
    return found


def _put(there: Words, words: Words, mask: int) -> None:
    """Set the bits of `mask` in every byte of `there` to those of `words`; the others stay."""
    if mask == _ALL:
        there[...] = words
        return
    others = int.from_bytes(bytes([_ALL ^ mask]) * there.dtype.itemsize, "little")
    there &= there.dtype.type(others)
    there |= words


def _view(raw: U8, size: int, shape: Sequence[int], strides: Sequence[int]) -> Words:
    """`raw` as words of `size` bytes at any stride; numpy takes unaligned ones."""
    return np.ndarray(tuple(shape), f"<u{size}", raw.data, 0, tuple(strides))


def _pread(descriptor: int, nbytes: int, offset: int) -> U8:
    """Raises EOFError where the file ends before `nbytes` were read."""
    out, done = np.empty(nbytes, np.uint8), 0
    while done < nbytes:
        got = os.preadv(descriptor, [out.data[done:]], offset + done)
        if not got:
            raise EOFError
        done += got
    return out
