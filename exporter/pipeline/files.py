"""Files that appear whole or not at all, and the hashes that go with them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_HASH_CHUNK = 1 << 20


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
        view = part.data
        while view:
            n = os.pwrite(descriptor, view, offset)
            view, offset = view[n:], offset + n


def write_all(descriptor: int, raw: bytes) -> None:
    """Append all of `raw`; os.write may stop short."""
    while raw:
        raw = raw[os.write(descriptor, raw) :]
