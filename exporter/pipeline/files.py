"""Files that appear whole or not at all, and the hashes that go with them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_HASH_CHUNK = 1 << 20
_FLUSH_SECONDS = 0.5


def write_whole(path: Path, text: str) -> None:
    """Replace `path` with `text` in one step; a crash leaves the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_stamp(path: Path) -> tuple[int, int, int, int]:
    """Size, times and inode: what changes when a file does, without reading it."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def sha256_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, 1 MiB at a time."""
    h = hashlib.sha256()
    buffer = bytearray(_HASH_CHUNK)
    with open(path, "rb", buffering=0) as f:
        while n := f.readinto(buffer):
            h.update(memoryview(buffer)[:n])
            if on_bytes:
                on_bytes(n)
    return h.hexdigest()


def write_at(descriptor: int, parts: Sequence[np.ndarray[Any, Any]], offset: int) -> None:
    """Write arrays (flat uint8) one after another at `offset`."""
    for part in parts:
        n = os.pwrite(descriptor, part.data, offset)
        while n < part.nbytes:  # a signal, or a full disk, which the next write reports
            n += os.pwrite(descriptor, part.data[n:], offset + n)
        offset += n


def write_all(descriptor: int, raw: bytes) -> None:
    """Append all of `raw`; os.write may stop short."""
    while raw:
        raw = raw[os.write(descriptor, raw) :]


def reserve(descriptor: int, size: int) -> None:
    """Give a file its final size, and its disk space where the system can: a full disk shows now, not later."""
    stat = os.fstat(descriptor)
    if stat.st_size != size:
        os.ftruncate(descriptor, size)
    if stat.st_blocks * 512 >= size or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as e:
        if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # some network file systems, and musl on them
            raise


@contextlib.contextmanager
def flushing(descriptors: Sequence[int]) -> Iterator[None]:
    """Keep the disk busy while the block writes, and leave with everything on it.

    The kernel would start writing back only after gigabytes; one sync at the end would then wait for all
    of it. An error while syncing is raised at the end of the block.
    """
    stop = threading.Event()
    errors: list[OSError] = []

    def flush() -> None:
        while not stop.wait(_FLUSH_SECONDS):
            try:
                for descriptor in descriptors:
                    os.fsync(descriptor)
            except OSError as e:
                errors.append(e)
                return

    thread = threading.Thread(target=flush, name="flush", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if errors:
        raise errors[0]
    for descriptor in descriptors:
        os.fsync(descriptor)
