"""One file that goes to the Hub: where its bytes are, what they hash to, and whether the Hub has them."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from exporter.errors import ExporterError
from exporter.hub.files import RemoteFile, content_digest

# Size, time of change and inode: another file in the same place, or other bytes in the same file, shows in them.
Stamp = tuple[int, int, int]
_CHUNK = 1 << 20


def stamp_of(path: Path) -> Stamp:
    stat = path.lstat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


@dataclass(frozen=True)
class Upload:
    """`name` is its path in the repository. `stamp`: of a file on disk when `sha256` was taken of it."""

    name: str
    size: int
    sha256: str
    source: Path | bytes = field(repr=False)
    stamp: Stamp | None = None

    @staticmethod
    def of_bytes(name: str, data: bytes) -> Upload:
        return Upload(name, len(data), hashlib.sha256(data).hexdigest(), data)

    @cached_property
    def git_id(self) -> str:
        """SHA-1 of the git blob: what the Hub calls a file that it keeps in git itself."""
        if isinstance(self.source, bytes):
            return content_digest(self.source, "git")
        git = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        with self.source.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                git.update(chunk)
        return git.hexdigest()

    def same_as(self, remote: RemoteFile | None) -> bool:
        """Whether the Hub's file has these bytes."""
        if remote is None or remote.size != self.size:
            return False
        return remote.digest == (self.sha256 if remote.algorithm == "sha256" else self.git_id)

    def require_unchanged(self) -> None:
        """Raises ExporterError where the file is not the one that was hashed."""
        if isinstance(self.source, Path) and stamp_of(self.source) != self.stamp:
            raise ExporterError(
                f"{self.source} changed while it was published; nothing was published",
                hint="run the same command again when nothing writes there",
            )


@dataclass(frozen=True)
class Changes:
    """What one commit does: files that it adds or replaces, names that it deletes."""

    uploads: tuple[Upload, ...]
    deleted: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(each.size for each in self.uploads)

    def missing_from(self, tree: Mapping[str, RemoteFile]) -> Changes:
        """What of it a commit on `tree` would have to do."""
        return Changes(
            tuple(each for each in self.uploads if not each.same_as(tree.get(each.name))),
            tuple(name for name in self.deleted if name in tree),
        )

    def differences(self, tree: Mapping[str, RemoteFile]) -> list[str]:
        """Names that are not in `tree` as they should be."""
        left = self.missing_from(tree)
        return [*(each.name for each in left.uploads), *left.deleted]

    def __bool__(self) -> bool:
        return bool(self.uploads or self.deleted)


def operations_of(changes: Changes, on_bytes: Callable[[int], None]) -> Sequence[Any]:
    """The changes as the Hub client takes them; `on_bytes` counts what it reads to send."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    class Add(CommitOperationAdd):
        furthest = 0

        def as_file(self, with_tqdm: bool = False) -> Any:
            path = self.path_or_fileobj
            return _Counted(path, self.reached) if isinstance(path, str) else super().as_file(with_tqdm)

        def reached(self, position: int) -> None:
            """What is read again, for its hash or after a failed attempt, does not count twice."""
            ahead = max(0, position - self.furthest)
            self.furthest += ahead
            on_bytes(ahead)

    added = []
    for each in changes.uploads:
        source = each.source if isinstance(each.source, bytes) else os.fspath(each.source)
        operation = Add(each.name, source)
        operation.upload_info.sha256 = bytes.fromhex(each.sha256)  # else it reads the whole file for it once more
        added.append(operation)
    return [*added, *(CommitOperationDelete(name, is_folder=False) for name in changes.deleted)]


class _Counted(io.FileIO):
    """A file that tells how far it was read."""

    def __init__(self, path: str, reached: Callable[[int], None]) -> None:
        super().__init__(path, "rb")
        self._reached = reached

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size)
        self._reached(self.tell())
        return data or b""
