"""Processes of other machines on one output folder: let in by the run that leads, waited for by the next one.

The run that leads makes `<folder>/.workers-<token>/` and holds a shared lock on the file `lock` in it. A worker joins
by locking the same file. Whoever takes the folder next waits until no such lock is left, and removes the file, so
that nobody joins any more. The kernel, here or of the file server, lets go when a process dies: a worker that was
lost to its run, but lives, never writes beside another one. This takes a file system whose locks reach across
machines (NFSv4, most parallel ones); `require_reach` tries it. The name is new for every run because clients of NFS
remember for a while that a name was not there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from exporter.errors import ExporterError, Refused

_PREFIX = ".workers-"
_WAIT_SECONDS = 120.0  # for a lost worker; Ray ends those of a machine that it cannot reach after 60
_LAST_SECONDS = 5.0  # for workers that were told to stop
_LOOK_SECONDS = 0.1


@contextmanager
def leading(folder: Path) -> Iterator[str]:
    """Let workers into `folder`, which is locked, until the block ends; the token that they need."""
    token = secrets.token_hex(8)
    lock = _lock(folder, token)
    lock.parent.mkdir(parents=True)
    lock.touch()
    try:
        with _held(lock, fcntl.LOCK_SH):
            yield token
    finally:
        with suppress(TimeoutError), _held(lock, fcntl.LOCK_EX, _LAST_SECONDS):  # else the next run waits
            shutil.rmtree(lock.parent, ignore_errors=True)


def wait_for_workers(folder: Path) -> None:
    """Wait until no worker of an earlier run is in `folder`, which is locked. Refused when that takes two minutes."""
    for left in folder.glob(f"{_PREFIX}*"):
        lock = left / "lock"
        try:
            with _held(lock, fcntl.LOCK_EX, _WAIT_SECONDS):
                shutil.rmtree(left, ignore_errors=True)
        except FileNotFoundError:
            shutil.rmtree(left, ignore_errors=True)
        except TimeoutError:
            raise Refused(
                f"a worker of an earlier run is still at work in {folder}",
                hint="end it, or wait for it, and run the same command again",
            ) from None


def require_reach(folder: Path, token: str) -> None:
    """Refused unless this process sees the `folder` of the leading run, and the lock on it."""
    lock = _lock(folder, token)
    if not lock.is_file():
        raise Refused(f"{folder} is another folder there", hint="--out must be one that all machines share")
    if _free(lock):
        raise Refused(
            f"the lock on {folder} is not seen there",
            hint="--out must be on a file system whose locks reach across machines, as those of NFSv4 do",
        )


@contextmanager
def joined(folder: Path, token: str, name: str = "") -> Iterator[None]:
    """Be a worker in `folder`; with a `name`, the only one that does what is called so.

    Raises ExporterError where the run that sent this worker has gone, or a lost worker does not let go of `name`.
    """
    lock = _lock(folder, token)
    with ExitStack() as held:
        try:
            held.enter_context(_held(lock, fcntl.LOCK_SH))
        except FileNotFoundError:
            raise _gone(folder) from None
        if not lock.exists():
            raise _gone(folder)
        if name:
            try:
                held.enter_context(_held(lock.with_name(_slug(name)), fcntl.LOCK_EX, _WAIT_SECONDS))
            except TimeoutError:
                raise ExporterError(
                    "a worker that was lost is still at work on it", hint="end it, and run the same command again"
                ) from None
        yield


def _gone(folder: Path) -> ExporterError:
    return ExporterError(f"the run that sent a worker to {folder} has ended")


def _lock(folder: Path, token: str) -> Path:
    return folder / f"{_PREFIX}{token}" / "lock"


@contextmanager
def _held(path: Path, kind: int, seconds: float = 0.0) -> Iterator[None]:
    """A lock on a file. TimeoutError when it is not to be had within `seconds` (0: wait as long as it takes)."""
    create = 0 if path.name == "lock" else os.O_CREAT
    descriptor = os.open(path, os.O_RDWR | create, 0o644)
    try:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(descriptor, kind | (fcntl.LOCK_NB if seconds else 0))
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(str(path)) from None
            time.sleep(_LOOK_SECONDS)
        yield
    finally:
        os.close(descriptor)


def _free(path: Path) -> bool:
    """Whether nobody else holds a lock on the file."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _slug(name: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", name)[:80]
    return f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.lease"
