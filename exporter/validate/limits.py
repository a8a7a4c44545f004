"""A child process that may take so many bytes and no more, as on a machine that has no more.

Best is a control group of the kernel: it counts all that the child and its children hold, pages of files that they
read among it, and ends the child at the limit. Where none can be made, RLIMIT_DATA bounds private memory alone; else
the parent looks, and ends the child once it is beyond.

Pages of a file belong to the group that read them first: a file that somebody else left in the cache would be free.
So `files` are dropped from the cache before the child starts. Inside a group such pages are not fatal, they are
dropped and read again; `limit_read_again_bytes` says how much of that there was. On a device, weights that do not fit
are an error, so a run with many pages read again shows a model that would not have fitted.

Sources: the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst; setrlimit(2).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from exporter.errors import ExporterError

By = Literal["cgroup", "rlimit", "watch"]

WORDS: Mapping[str, str] = {
    "cgroup": "the process and the pages of files that it read, together",
    "rlimit": "private memory only, mapped files not counted",
    "watch": "looked at 20 times a second: resident memory without the pages of files",
    "cuda": "what the runtime takes of the device, by its own count",
}

_PREFIX = "exporter-"
_NAME = re.compile(_PREFIX + r"(\d+)-\d+")  # the process that made it, and a count
_SHELL = "/bin/sh"
_REMOVE_SECONDS = 5.0
# How runtimes say that an allocation failed.
_FAILED = (
    "bad_alloc",
    "bad allocation",
    "MemoryError",
    "nable to allocate",
    "ailed to allocate",
    "annot allocate memory",
    "ut of memory",
)
_count = itertools.count()


@dataclass(frozen=True)
class Limit:
    """`bytes` for a child. reason: whose they are: "the 15.9 GiB of profile 16gb". by: only so, "" for the best here.

    files: what the child will read, to be counted as its own. device: bytes of a GPU, for a child that runs on one: it
    takes that in place of `bytes`.
    """

    bytes: int
    reason: str
    files: tuple[Path, ...] = ()
    by: By | Literal[""] = ""
    device: int = 0


class Enforced:
    """A limit while a child runs under it; this one is the parent's watch."""

    by: By = "watch"

    def __init__(self, limit: Limit) -> None:
        self.limit = limit

    @property
    def watched(self) -> int:
        """Resident bytes at which the parent ends the child; 0: the system does."""
        return self.limit.bytes

    def command(self, command: Sequence[str]) -> Sequence[str]:
        """What to start in place of `command`."""
        return command

    def exceeded(self, said: str) -> bool:
        """Whether a child that ended badly did so for this limit. said: its last words, and its own error."""
        return False

    def figures(self) -> dict[str, Any]:
        """limit_bytes, limit_by; limit_peak_bytes, limit_read_again_bytes where the system counts them."""
        return {"limit_bytes": self.limit.bytes, "limit_by": self.by}


@contextlib.contextmanager
def enforced(limit: Limit) -> Iterator[Enforced]:
    """The limit made ready for one child, and taken away after it. Raises ExporterError where `limit.by` cannot be."""
    drop_from_cache(limit.files)
    with contextlib.ExitStack() as stack:
        found: Enforced | None = None
        if limit.by in ("", "cgroup"):
            group = _make_group(limit)
            found = stack.enter_context(contextlib.closing(group)) if group else None
        if found is None and limit.by in ("", "rlimit"):
            found = _Rlimit(limit) if _Rlimit.is_here(limit) else None
        if found is None and limit.by in ("", "watch"):
            found = Enforced(limit)
        if found is None:
            raise ExporterError(f"this system lets us set no memory limit by {limit.by}", hint="leave it to the system")
        yield found


def drop_from_cache(files: Sequence[Path]) -> None:
    """Pages of these files leave the system's cache, unless somebody has them mapped. Where it cannot be, they stay."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in files:
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # only what is on disk can be dropped
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


class _Rlimit(Enforced):
    """RLIMIT_DATA: since Linux 4.7 all private writable memory, also what was asked for and never touched."""

    by: By = "rlimit"

    @property
    def watched(self) -> int:
        return 0

    def command(self, command: Sequence[str]) -> Sequence[str]:
        return (_SHELL, "-c", 'ulimit -d "$0" && exec "$@"', str(self.limit.bytes >> 10), *command)

    def exceeded(self, said: str) -> bool:
        return any(words in said for words in _FAILED)

    @staticmethod
    def is_here(limit: Limit) -> bool:
        return sys.platform == "linux" and _runs(_Rlimit(limit).command(("true",)))


class _Group(Enforced):
    """A control group of our own, version 2 or 1."""

    by: By = "cgroup"
    limits: Sequence[tuple[str, str]] = ()  # (file, value); the first must be taken
    kills: tuple[str, str] = ("", "")  # (file, word before the count)
    full: tuple[str, str] = ("", "")  # the same of failed tries to get more
    peaks: str = ""

    def __init__(self, limit: Limit, path: Path) -> None:
        super().__init__(limit)
        self.path = path

    @property
    def watched(self) -> int:
        return 0

    def set_up(self) -> None:
        """Raises OSError where the kernel does not take the limit, or nothing may enter."""
        for number, (name, value) in enumerate(self.limits):
            try:
                (self.path / name).write_text(value.format(self.limit.bytes))
            except OSError:
                if number == 0:
                    raise
        if not _runs(self.command(("true",))):
            raise OSError(f"{self.path} lets nothing in")

    def command(self, command: Sequence[str]) -> Sequence[str]:
        # The child enters before it is anything else: what it held before would be counted elsewhere.
        return (_SHELL, "-c", 'echo $$ >"$0" && exec "$@"', str(self.path / "cgroup.procs"), *command)

    def exceeded(self, said: str) -> bool:
        # The system's own lack of memory ends members as well: then the group was never full.
        return self._number(*self.kills) > 0 and self._number(*self.full) > 0

    def figures(self) -> dict[str, Any]:
        found = super().figures()
        if peak := self._number(self.peaks):
            found["limit_peak_bytes"] = peak
        again = self._number("memory.stat", "workingset_refault_file")
        return {**found, "limit_read_again_bytes": again * os.sysconf("SC_PAGE_SIZE")}

    def _number(self, name: str, word: str = "") -> int:
        """The number in a file of the group, or after a word of it; 0 where there is none."""
        try:
            fields = (self.path / name).read_text().split()
            return int(fields[fields.index(word) + 1] if word else fields[0])
        except (OSError, ValueError, IndexError):
            return 0

    def close(self) -> None:
        """End what is left in it and remove it."""
        ends = time.monotonic() + _REMOVE_SECONDS
        while True:
            with contextlib.suppress(OSError):
                for pid in (self.path / "cgroup.procs").read_text().split():
                    with contextlib.suppress(OSError):
                        os.kill(int(pid), signal.SIGKILL)
            try:
                self.path.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:  # a member that is not quite gone; what stays is swept by the next run
                if time.monotonic() > ends:
                    return
            time.sleep(0.02)


class _Group2(_Group):
    limits = (("memory.max", "{}"), ("memory.swap.max", "0"), ("memory.oom.group", "1"))
    kills, full, peaks = ("memory.events", "oom_kill"), ("memory.events", "max"), "memory.peak"


class _Group1(_Group):
    # Here 0 rules swapping out. An equal limit of memory.memsw would as well, but then memory.failcnt stays 0.
    limits = (("memory.limit_in_bytes", "{}"), ("memory.swappiness", "0"))
    kills, full, peaks = ("memory.oom_control", "oom_kill"), ("memory.failcnt", ""), "memory.max_usage_in_bytes"


def _make_group(limit: Limit) -> _Group | None:
    """The first group that can be made and takes the limit; None where there is none."""
    if sys.platform != "linux":
        return None
    for kind, parent in _parents():
        sweep(parent)
        group = kind(limit, parent / f"{_PREFIX}{os.getpid()}-{next(_count)}")
        try:
            group.path.mkdir()
        except OSError:
            continue
        try:
            group.set_up()
        except OSError:
            group.close()
            continue
        except BaseException:
            group.close()
            raise
        return group
    return None


def sweep(parent: Path) -> None:
    """Remove groups of exporters that were killed. One with a process still in it stays."""
    try:
        names = [path for path in parent.iterdir() if _NAME.fullmatch(path.name)]
    except OSError:
        return
    for path in names:
        match = _NAME.fullmatch(path.name)
        if match and not _alive(int(match[1])):
            with contextlib.suppress(OSError):
                path.rmdir()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _runs(command: Sequence[str]) -> bool:
    try:
        done = subprocess.run(command, capture_output=True, timeout=10, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0


# Where groups are


def _parents() -> Iterator[tuple[type[_Group], Path]]:
    """Groups in which one of ours may be made, the nearest first: never outside of the one that we are in.

    In version 2 a group with processes in it gives no memory limits to those below, so it is one further up that
    does; a user's own session has such ones.
    """
    for version, own, top in own_groups():
        if version == 1:
            yield _Group1, own
            continue
        for group in (own, *own.parents):
            with contextlib.suppress(OSError):
                if "memory" in (group / "cgroup.subtree_control").read_text().split():
                    yield _Group2, group
            if group == top:
                break


def own_groups(proc: Path = Path("/proc/self")) -> list[tuple[int, Path, Path]]:
    """(version, the folder of our own group, the topmost that is mounted), for control of memory. Linux; else none."""
    try:
        mounts, member = (proc / "mountinfo").read_text(), (proc / "cgroup").read_text()
    except OSError:
        return []
    ours: dict[int, str] = {}
    for line in member.splitlines():
        number, names, path = line.split(":", 2)
        if number == "0" and not names:
            ours[2] = path
        elif "memory" in names.split(","):
            ours[1] = path
    found = []
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        root, mounted = left.split()[3:5]
        kind, _, options = right.split()[:3]
        version = {"cgroup2": 2, "cgroup": 1}.get(kind, 0)
        if version not in ours or (version == 1 and "memory" not in options.split(",")):
            continue
        inside = ours[version].removeprefix(root.rstrip("/")).lstrip("/")
        found.append((version, Path(mounted) / inside, Path(mounted)))
    return sorted(found, key=lambda each: -each[0])


def allowed_bytes() -> int | None:
    """Memory that the groups we are in leave us; None where none of them says."""
    known = []
    for version, own, top in own_groups():
        name = "memory.max" if version == 2 else "memory.limit_in_bytes"
        for group in (own, *own.parents):
            with contextlib.suppress(OSError, ValueError):
                known.append(int((group / name).read_text()))  # "max" is no number
            if group == top:
                break
    return min(known, default=None)


# On a GPU


def cuda_options(limit_bytes: int) -> dict[str, str]:
    """Of onnxruntime's CUDA provider: its arena, weights in it, takes so many bytes of the GPU; {} for 0, no limit."""
    if not limit_bytes:
        return {}
    return {"gpu_mem_limit": str(limit_bytes), "arena_extend_strategy": "kSameAsRequested"}


def limit_torch(limit_bytes: int, device: int = 0) -> float:
    """torch may take so many bytes of a GPU and no more; the share of it that this is. torch raises beyond it."""
    import torch

    total = int(torch.cuda.get_device_properties(device).total_memory)
    share = min(1.0, limit_bytes / total)
    torch.cuda.set_per_process_memory_fraction(share, device)
    return share
