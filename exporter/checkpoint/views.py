"""Stored bytes as slices of a canonical tensor: positional reads, strides and transposes, no arithmetic.

Reads use pread and never mmap: a file that shrinks while it is read gives an error and not a SIGBUS,
threads need no lock, and resident memory stays at the leaf being read.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from exporter.checkpoint.headers import DTYPE_BITS
from exporter.errors import ExporterError
from exporter.types import TensorRef
from exporter.types.qtensor import U8

_PIECE = 1 << 18  # bytes: well inside the L2 cache


class OpenFiles:
    """The weight files of a checkpoint, opened once each and read by position. Thread-safe."""

    def __init__(self, sizes: Mapping[Path, int]) -> None:
        self._sizes = dict(sizes)
        self._fds: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._local = threading.local()

    def read(self, path: Path, offset: int, nbytes: int) -> U8:
        """`nbytes` from `offset` on, uint8 [nbytes]. Raises ExporterError when they are not there."""
        out = np.empty(nbytes, np.uint8)
        self.read_into(path, offset, out)
        return out

    def scratch(self, nbytes: int) -> U8:
        """A buffer of this thread's own, valid until the thread asks again."""
        held: U8 | None = getattr(self._local, "buffer", None)
        if held is None or held.size < nbytes:
            held = self._local.buffer = np.empty(nbytes, np.uint8)
        return held[:nbytes]

    def read_into(self, path: Path, offset: int, out: U8) -> None:
        """Fill `out` from `offset` on. Raises ExporterError when the bytes are not there."""
        nbytes = out.size
        buffer, done = out.data, 0
        fd = self._open(path)
        while done < nbytes:
            try:
                got = os.preadv(fd, [buffer[done:]], offset + done)
            except OSError as e:
                raise ExporterError(
                    f"{path}: cannot read {nbytes:,} bytes at {offset:,} ({e.strerror})",
                    "check the disk, then run the same command again",
                ) from None
            if got == 0:
                raise ExporterError(
                    f"{path}: ended at {offset + done:,} while {nbytes:,} bytes at {offset:,} were read: "
                    "the file shrank after it was opened",
                    "restore the file, then run the same command again",
                )
            done += got

    def _open(self, path: Path) -> int:
        with self._lock:
            fd = self._fds.get(path)
            if fd is None:
                try:
                    fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                except OSError as e:
                    raise ExporterError(
                        f"{path}: cannot be opened ({e.strerror})", "restore the file, then run again"
                    ) from None
                size = os.fstat(fd).st_size
                if size != self._sizes[path]:
                    os.close(fd)
                    raise ExporterError(
                        f"{path}: has {size:,} bytes, had {self._sizes[path]:,} when its header was read",
                        "restore the file, then run the same command again",
                    )
                self._fds[path] = fd
            return fd

    def close(self) -> None:
        """Close every file; a later read opens it again."""
        with self._lock:
            for fd in self._fds.values():
                os.close(fd)
            self._fds.clear()


class View(Protocol):
    """Part of one or several stored tensors, seen as a canonical tensor."""

    def read(self, files: OpenFiles, start: int, stop: int) -> U8:
        """Leading indices [start, stop), C-contiguous uint8 [..., bytes of the last axis]."""

    def refs(self) -> tuple[TensorRef, ...]:
        """The stored tensors it reads."""


def _itemsize(ref: TensorRef) -> int:
    return DTYPE_BITS[ref.dtype] // 8


def _leading(files: OpenFiles, ref: TensorRef, start: int, stop: int) -> npt.NDArray[Any]:
    """Stored leading indices [start, stop): unsigned words [stop - start, *shape[1:]]."""
    size = _itemsize(ref)
    each = ref.nbytes // ref.shape[0]
    raw = files.read(ref.path, ref.offset + start * each, (stop - start) * each)
    return raw.view(f"<u{size}").reshape(stop - start, *ref.shape[1:])


def _as_bytes(words: npt.NDArray[Any]) -> U8:
    """Words [..., K] -> uint8 [..., K * itemsize], copied only when they are not contiguous."""
    return np.ascontiguousarray(words).view(np.uint8)


@dataclass(frozen=True)
class Rows:
    """Rows of a stored tensor from `first` on: all of it, or one of the fused q, k, v."""

    ref: TensorRef
    first: int = 0

    def read(self, files: OpenFiles, start: int, stop: int) -> U8:
        return _as_bytes(_leading(files, self.ref, self.first + start, self.first + stop))

    def refs(self) -> tuple[TensorRef, ...]:
        return (self.ref,)


@dataclass(frozen=True)
class Every:
    """[E, N * step, ...] -> [E, N, ...]: every `step`-th index of axis 1, from `phase` on.

    Axes after the second are one row: MXFP4 blocks [E, N, K/32, 16] become [E, N, K/2].
    """

    ref: TensorRef
    phase: int
    step: int

    def read(self, files: OpenFiles, start: int, stop: int) -> U8:
        """Piece by piece, so that what is dropped again stays in the cache."""
        rows, row = self.ref.shape[1], self.ref.nbytes // math.prod(self.ref.shape[:2])
        out = np.empty((stop - start, rows // self.step, row), np.uint8)
        piece = max(self.step, _PIECE // row // self.step * self.step)
        for i in range(start, stop):
            for first in range(0, rows, piece):
                n = min(piece, rows - first)
                raw = files.scratch(n * row)
                files.read_into(self.ref.path, self.ref.offset + (i * rows + first) * row, raw)
                kept = raw.reshape(n, row)[self.phase :: self.step]
                out[i - start, first // self.step : (first + n) // self.step] = kept
        # [e, N, bytes of a row]; where axes follow the second, they are one row.
        return out if len(self.ref.shape) > 2 else out.reshape(stop - start, -1)

    def refs(self) -> tuple[TensorRef, ...]:
        return (self.ref,)


@dataclass(frozen=True)
class Transposed:
    """[E, K, N * step] -> [E, N, K]: every `step`-th column from `phase` on, as rows."""

    ref: TensorRef
    phase: int
    step: int

    def read(self, files: OpenFiles, start: int, stop: int) -> U8:
        _, k, columns = self.ref.shape
        out = np.empty((stop - start, columns // self.step, k), f"<u{_itemsize(self.ref)}")
        for i in range(start, stop):  # one expert in memory at a time
            stored = _leading(files, self.ref, i, i + 1)[0]  # [K, N * step]
            out[i - start] = stored[:, self.phase :: self.step].T
        return out.view(np.uint8)

    def refs(self) -> tuple[TensorRef, ...]:
        return (self.ref,)


@dataclass(frozen=True)
class Listed:
    """One stored tensor for each leading index: [N * step, ...] each -> [E, N, ...]."""

    each: tuple[TensorRef, ...]
    phase: int
    step: int

    def read(self, files: OpenFiles, start: int, stop: int) -> U8:
        _, *tail = self.each[0].shape
        rows = self.each[0].shape[0] // self.step
        out = np.empty((stop - start, rows, *tail), f"<u{_itemsize(self.each[0])}")
        for i in range(start, stop):
            ref = self.each[i]
            out[i - start] = _leading(files, ref, 0, ref.shape[0])[self.phase :: self.step]
        return out.view(np.uint8)

    def refs(self) -> tuple[TensorRef, ...]:
        return self.each
