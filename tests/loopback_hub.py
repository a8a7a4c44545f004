"""A Hugging Face Hub on loopback, for tests with the real client: the read side.

It answers what huggingface_hub 2.4 asks when it lists and downloads files of models and datasets:
resolving a revision, listing a tree, HEAD and GET of /resolve with ranges, and large files behind a
redirect to another host name, as the CDN is. `hub.requests` is the log; `hub.inject` plans faults.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".gguf", ".onnx", ".bin")
LFS_SIZE = 10 << 20


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


# --- faults: each is used once, on the first request that matches ----------------------------------


@dataclass(frozen=True)
class Status:
    """Answer with this status and nothing else."""

    code: int
    headers: tuple[tuple[str, str], ...] = ()


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


Fault = Status | Drop | Short | Flip | Slow | WrongSize | WholeFile | Then


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


@dataclass
class Repo:
    """Commits and the branches and tags that point at them."""

    name: str
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: Mapping[str, bytes], branch: str = "main", sizes: Mapping[str, int] | None = None) -> str:
        """A new commit with exactly these files; its id. `sizes` lists files with another size."""
        tree = {n: _blob(n, data, (sizes or {}).get(n, len(data))) for n, data in files.items()}
        parent = self.refs.get(branch, "")
        content = json.dumps([self.name, parent, sorted((n, b.etag) for n, b in tree.items())])
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = tree
        self.refs[branch] = sha
        return sha

    def find(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


def _blob(name: str, data: bytes, listed_size: int) -> Blob:
    if not name.endswith(LFS_SUFFIXES) and len(data) <= LFS_SIZE:
        return Blob(data, git_blob(data), None, listed_size)
    sha256 = hashlib.sha256(data).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n"
    return Blob(data, git_blob(pointer.encode()), sha256, listed_size)


@dataclass(frozen=True)
class Request:
    """One line of the log. `host` is the Host header; `token` whether a token came along."""

    method: str
    path: str
    query: dict[str, list[str]]
    byte_range: str | None
    host: str
    token: bool


class LoopbackHub(ThreadingHTTPServer):
    """`with LoopbackHub() as hub:` serves on a free port of 127.0.0.1; `hub.url` is the endpoint."""

    daemon_threads = True

    def __init__(self, tokens: tuple[str, ...] = ("hf_loopback",), page_size: int = 1000) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        port = self.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        self.cdn = f"http://localhost:{port}"  # another host name: tokens must not follow
        self.tokens = tokens
        self.page_size = page_size
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.lock = threading.RLock()
        self._faults: list[tuple[str, str, Fault]] = []

    def repo(self, name: str, files: Mapping[str, bytes]) -> Repo:
        """A repository with one commit on main; a dataset's name is "datasets/org/name"."""
        repo = self.repos[name] = Repo(name)
        repo.commit(files)
        return repo

    def inject(self, method: str, path: str, *faults: Fault) -> None:
        """Plan faults for requests with this method whose path contains `path`, one a request."""
        with self.lock:
            self._faults += [(method, path, f) for f in faults]

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for i, (m, p, fault) in enumerate(self._faults):
                if m == method and p in path:
                    del self._faults[i]
                    return fault
        return None

    def asked(self, method: str, path: str = "") -> list[Request]:
        """Requests so far with this method whose path contains `path`."""
        return [r for r in self.requests if r.method == method and path in r.path]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away mid-answer is part of the tests, not worth a traceback."""

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
        self.server_close()


# --- answers ---------------------------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer of headers and body waits 40 ms
    server: LoopbackHub
    fault: Fault | None = None

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    def do_HEAD(self) -> None:
        self._handle()

    def _handle(self) -> None:
        hub, url = self.server, urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        hub.requests.append(
            Request(
                self.command,
                path,
                query,
                self.headers.get("Range"),
                self.headers.get("Host", ""),
                bool(given),
            )
        )
        fault = self.fault = hub.take_fault(self.command, path)
        if isinstance(fault, Status):
            self._send(fault.code, b'{"error":"injected"}', dict(fault.headers))
        elif isinstance(fault, Drop):
            self.close_connection = True
        else:
            if isinstance(fault, Then):
                fault.action()
            self._route(path, query, given)

    def _route(self, path: str, query: dict[str, list[str]], token: str) -> None:
        parts = path.strip("/").split("/")
        if parts[0] == "_cdn" and len(parts) == 2:
            blobs = (b for r in self.server.repos.values() for t in r.commits.values() for b in t.values())
            blob = next((b for b in blobs if b.sha256 == parts[1]), None)
            return self._body(blob.data, {}) if blob else self._error(404, "", "no such object")
        dataset = "datasets/" if "datasets" in (parts[0], *parts[1:2]) else ""
        if parts[0] == "datasets":
            parts = parts[1:]
        if parts[0] == "api" and parts[1:2] in (["models"], ["datasets"]) and len(parts) >= 4:
            name, verb, rest = "/".join(parts[2:4]), (parts[4:5] or ["revision"])[0], parts[5:]
        elif len(parts) >= 5 and parts[2] == "resolve":
            name, verb, rest = "/".join(parts[:2]), "resolve", parts[3:]
        else:
            return self._error(404, "", f"no route {path}")
        if token and token not in self.server.tokens:
            return self._error(401, "", "Invalid credentials in Authorization header")
        repo = self.server.repos.get(dataset + name)
        if repo is None or (repo.private and not token):
            # The Hub does not say whether a repository that you cannot see exists.
            return self._error(404 if token else 401, "RepoNotFound", "Repository not found")
        revision = rest[0] if rest else "main"
        sha = repo.find(revision)
        if sha is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if verb == "revision":
            names = [{"rfilename": n} for n in sorted(repo.commits[sha])]
            return self._json({"id": name, "modelId": name, "sha": sha, "tags": [], "siblings": names})
        if verb == "tree":
            return self._tree(repo.commits[sha], query)
        if verb == "resolve":
            if repo.gated and not token:
                return self._error(401, "GatedRepo", "Access to this model is restricted")
            return self._resolve(repo.commits[sha], sha, "/".join(rest[1:]))
        return self._error(404, "", f"no verb {verb}")

    def _tree(self, tree: dict[str, Blob], query: dict[str, list[str]]) -> None:
        recursive = query.get("recursive", ["false"])[0].lower() == "true"
        entries: list[dict[str, Any]] = []
        folders = sorted({n.split("/")[0] for n in tree if "/" in n})
        entries += [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in folders]
        for name, blob in sorted(tree.items()):
            if recursive or "/" not in name:
                entry: dict[str, Any] = {
                    "type": "file",
                    "path": name,
                    "oid": blob.oid,
                    "size": blob.listed_size,
                }
                if blob.sha256:
                    entry["lfs"] = {"oid": blob.sha256, "size": blob.listed_size, "pointerSize": 134}
                entries.append(entry)
        start, step = int(query.get("cursor", ["0"])[0]), self.server.page_size
        headers = {}
        if start + step < len(entries):
            here = self.server.url + urlsplit(self.path).path
            headers["Link"] = f'<{here}?recursive={recursive}&expand=False&cursor={start + step}>; rel="next"'
        self._json(entries[start : start + step], headers)

    def _resolve(self, tree: dict[str, Blob], sha: str, name: str) -> None:
        blob = tree.get(name)
        if blob is None:
            return self._error(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.sha256 is None:
            return self._body(blob.data, headers)
        headers["X-Linked-Etag"] = f'"{blob.sha256}"'
        headers["X-Linked-Size"] = str(blob.listed_size)
        headers["Location"] = f"{self.server.cdn}/_cdn/{blob.sha256}"
        return self._send(302, b"", headers)

    def _body(self, data: bytes, headers: dict[str, str]) -> None:
        """A file or a range of it, with the fault in force."""
        fault = self.fault
        if isinstance(fault, Flip):
            data = data[: fault.offset] + bytes([data[fault.offset] ^ 1]) + data[fault.offset + 1 :]
        elif isinstance(fault, WrongSize):
            data = (data + b"\0" * fault.extra)[: len(data) + fault.extra]
        elif isinstance(fault, Slow):
            time.sleep(fault.seconds)
        status, wanted = 200, self.headers.get("Range")
        if wanted and not isinstance(fault, WholeFile):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1 if last else len(data), len(data))
            if start >= stop:
                return self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
            status, data = 206, data[start:stop]
        self._send(status, data, headers, fault if isinstance(fault, Short) else None)

    def _json(self, value: object, headers: Mapping[str, str] | None = None) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], short: Short | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if short is None:
            self.wfile.write(body)
            return
        self.wfile.write(body[: int(len(body) * short.share)])
        self.wfile.flush()
        time.sleep(short.seconds)
        self.close_connection = True
