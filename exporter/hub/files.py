"""Files of one Hub commit in the local cache: what each must hash to, and what was found.

A record beside the cache remembers size, mtime and inode of every file whose bytes were checked, so
that 13 GB are hashed once and not at every start. Any change of the three means hashing again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from exporter.errors import ExporterError

_HEX = {"sha256": re.compile(r"[0-9a-f]{64}"), "git": re.compile(r"[0-9a-f]{40}")}
_CHUNK = 1 << 22
_RECORDS = "exporter"  # folder inside the repository's cache folder; the Hub client ignores it


class FileDigest(NamedTuple):
    """Size in bytes and SHA-256 of the content, as hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class RemoteFile:
    """One file of a commit. `digest` is what the Hub names it by, and what it calls its ETag.

    `algorithm` "sha256" hashes the content (large files), "git" is the SHA-1 of a git blob: "blob",
    size and a zero byte go before the content. `xet`: the Hub offers it through its chunk store too.
    """

    name: str
    size: int
    algorithm: Literal["sha256", "git"]
    digest: str
    xet: bool = False

    def check(self) -> RemoteFile:
        """Self, when the digest can be one: it becomes a file name. Raises ExporterError."""
        if not _HEX[self.algorithm].fullmatch(self.digest) or self.size < 0:
            raise ExporterError(
                f"the Hub lists {self.name} with an impossible size or hash",
                hint="check HF_ENDPOINT: is it a Hub?",
            )
        return self


def content_digest(data: bytes, algorithm: Literal["sha256", "git"]) -> str:
    """What the Hub names a file of these bytes by; see RemoteFile."""
    if algorithm == "sha256":
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def hash_file(path: Path, file: RemoteFile, on_bytes: Callable[[int], None] | None = None) -> FileDigest | None:
    """Digest of `path` when it is the listed file byte for byte, else None. Reads it once."""
    size = path.stat().st_size
    content = hashlib.sha256()
    git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False) if file.algorithm == "git" else None
    with path.open("rb", buffering=0) as f:
        while chunk := f.read(_CHUNK):
            content.update(chunk)
            if git:
                git.update(chunk)
            if on_bytes:
                on_bytes(len(chunk))
    found = (git or content).hexdigest()
    return FileDigest(size, content.hexdigest()) if (size, found) == (file.size, file.digest) else None


def discard(path: Path, within: Path) -> None:
    """Remove a cached file and what its links lead to, as far as that lies inside `within`.

    A snapshot entry is a link to a blob, which can be a link into a store that repositories share:
    leaving any of the three would serve the same bad bytes again.
    """
    top = within.resolve()
    while path.parent.resolve().is_relative_to(top):
        target = path.parent / path.readlink() if path.is_symlink() else None
        path.unlink(missing_ok=True)
        if target is None:
            return
        path = target


def _inside(name: str) -> bool:
    """Whether a name leads to a place in the snapshot's folder."""
    return not name.startswith("/") and "\\" not in name and not {"", ".", ".."} & set(name.split("/"))


def _stamp(path: Path) -> list[int]:
    s = path.stat()
    return [s.st_size, s.st_mtime_ns, s.st_ino]


@dataclass
class Record:
    """What is known about one commit: the files needed, and which of them were hashed when.

    Lives in `storage`, the repository's folder in the Hub cache. Losing it costs time, never safety.
    """

    storage: Path
    revision: str
    files: dict[str, RemoteFile] = field(default_factory=dict)
    checked: dict[str, tuple[str, list[int]]] = field(default_factory=dict)  # name -> sha256, stamp

    @property
    def path(self) -> Path:
        return self.storage / _RECORDS / f"{self.revision}.json"

    @staticmethod
    def load(storage: Path, revision: str) -> Record:
        """The stored record, or an empty one when there is none that can be read."""
        record = Record(storage, revision)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            raw = json.loads(record.path.read_bytes())
            files = {n: RemoteFile(n, **f).check() for n, f in raw["files"].items() if _inside(n)}
            checked = {n: (str(c["sha256"]), list(c["stamp"])) for n, c in raw["checked"].items()}
            record.files, record.checked = files, checked
        return record

    def save(self) -> None:
        files = {
            n: {"size": f.size, "algorithm": f.algorithm, "digest": f.digest, "xet": f.xet}
            for n, f in sorted(self.files.items())
        }
        checked = {n: {"sha256": sha, "stamp": s} for n, (sha, s) in sorted(self.checked.items())}
        _write_json(self.path, {"files": files, "checked": checked})

    def known(self, path: Path, file: RemoteFile) -> FileDigest | None:
        """Digest found earlier, when the file has not changed since."""
        sha256, stamp = self.checked.get(file.name, ("", []))
        return FileDigest(file.size, sha256) if sha256 and stamp == _stamp(path) else None

    def remember(self, path: Path, file: RemoteFile, digest: FileDigest) -> None:
        self.checked[file.name] = (digest.sha256, _stamp(path))
        self.save()

    def forget(self, file: RemoteFile) -> None:
        if self.checked.pop(file.name, None):
            self.save()


def remember_revision(storage: Path, name: str, revision: str) -> None:
    """Note which commit a branch or tag meant, for work without a network."""
    path = storage / _RECORDS / "refs.json"
    refs = _refs(path)
    if refs.get(name) != revision:
        _write_json(path, {**refs, name: revision})


def recall_revision(storage: Path, name: str) -> str | None:
    """The commit that `name` meant when it was last asked of the Hub."""
    value = _refs(storage / _RECORDS / "refs.json").get(name)
    return value if isinstance(value, str) and _HEX["git"].fullmatch(value) else None


def _refs(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        raw = json.loads(path.read_bytes())
        if isinstance(raw, dict):
            return raw
    return {}


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=1))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
