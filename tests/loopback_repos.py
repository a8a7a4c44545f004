"""What a loopback Hub holds, and how it can fail: repositories, and faults that a test plans."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

LFS_SUFFIXES = (".safetensors", ".gguf", ".onnx", ".bin")
LFS_SIZE = 10 << 20


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


# --- faults: each is used once, on the first request that matches ----------------------------------


@dataclass(frozen=True)
class Status:
    """Answer with this status and nothing else. `message`: the Hub's own reason; `html`: a proxy's page instead."""

    code: int
    headers: tuple[tuple[str, str], ...] = ()
    message: str = "injected"
    html: bool = False


@dataclass(frozen=True)
class Drop:
    """Close the connection without an answer."""


@dataclass(frozen=True)
class Short:
    """Promise the whole body, send this share of it, wait `seconds`, and close."""

    share: float = 0.5
    seconds: float = 0


@dataclass(frozen=True)
class Flip:
    """Send the body with one bit of the byte at `offset` changed; its length stays right."""

    offset: int


@dataclass(frozen=True)
class Slow:
    """Wait before the body."""

    seconds: float


@dataclass(frozen=True)
class WrongSize:
    """Send a body that is this many bytes longer (or shorter), with headers that agree with it."""

    extra: int


@dataclass(frozen=True)
class WholeFile:
    """Ignore the Range header: status 200 and everything from the first byte."""


@dataclass(frozen=True)
class Then:
    """Call something, then answer normally: changes between two requests."""

    action: Callable[[], object]


@dataclass(frozen=True)
class Lost:
    """Do the work, call something, and close the connection without an answer."""

    action: Callable[[], object] = bool


@dataclass(frozen=True)
class NoRoom:
    """Answer a batch of large files with an error for each of them, as a full account does."""

    message: str = "Storage limit exceeded"


Fault = Status | Drop | Short | Flip | Slow | WrongSize | WholeFile | Then | Lost | NoRoom


# --- repositories ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blob:
    """A file of a commit. `oid` is the git id (of the pointer, for LFS); `sha256` is set for LFS."""

    data: bytes
    oid: str
    sha256: str | None
    listed_size: int

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


Tree = dict[str, Blob]


@dataclass
class Pull:
    """A pull request; its commits are on the branch refs/pr/NUMBER."""

    number: int
    title: str
    status: str = "draft"


@dataclass
class Repo:
    """Commits and the branches and tags that point at them. `history`: parent and title of each commit."""

    name: str
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Tree] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    read_only: bool = False
    tags: dict[str, str] = field(default_factory=dict)
    history: dict[str, tuple[str, str]] = field(default_factory=dict)
    pulls: list[Pull] = field(default_factory=list)

    def commit(self, files: Mapping[str, bytes], branch: str = "main", sizes: Mapping[str, int] | None = None) -> str:
        """A new commit with exactly these files; its id. `sizes` lists files with another size."""
        return self.put({n: _blob(n, data, (sizes or {}).get(n, len(data))) for n, data in files.items()}, branch)

    def put(self, tree: Tree, branch: str = "main", title: str = "") -> str:
        """A new commit with exactly this tree; its id."""
        parent = self.refs.get(branch, "")
        content = json.dumps([self.name, parent, title, sorted((n, b.etag) for n, b in tree.items())])
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = tree
        self.history[sha] = (parent, title)
        self.refs[branch] = sha
        return sha

    def find(self, revision: str) -> str | None:
        return self.refs.get(revision) or self.tags.get(revision) or (revision if revision in self.commits else None)

    def tree(self, revision: str = "main") -> Tree:
        return self.commits[self.find(revision) or ""]

    def made(self, branch: str = "main") -> list[str]:
        """The commits of a branch, newest first."""
        found, sha = [], self.refs.get(branch, "")
        while sha:
            found.append(sha)
            sha = self.history[sha][0]
        return found


def _blob(name: str, data: bytes, listed_size: int) -> Blob:
    if not name.endswith(LFS_SUFFIXES) and len(data) <= LFS_SIZE:
        return Blob(data, git_blob(data), None, listed_size)
    return large_blob(data, hashlib.sha256(data).hexdigest(), len(data), listed_size)


def large_blob(data: bytes, sha256: str, size: int, listed_size: int | None = None) -> Blob:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return Blob(data, git_blob(pointer.encode()), sha256, size if listed_size is None else listed_size)
