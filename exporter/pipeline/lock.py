"""One run at a time on an output folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from exporter.errors import Refused


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold `folder`; Refused when another run does, unless it is to `wait` for that.

    The kernel lets go when a process dies, however it dies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            raise Refused(
                f"{folder} is in use by another run (process {holder or 'unknown'})",
                hint="wait for it, or choose another --out",
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
