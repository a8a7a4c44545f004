"""A Hugging Face Hub on loopback, for tests with the real client.

It answers what huggingface_hub 2.4 asks when it lists and downloads files of models and datasets:
resolving a revision, listing a tree, HEAD and GET of /resolve with ranges, and large files behind a
redirect to another host name, as the CDN is. What it answers to a publisher is in loopback_writes.
`hub.requests` is the log; `hub.inject` plans faults.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.loopback_repos import (
    LFS_SIZE,
    LFS_SUFFIXES,
    Blob,
    Drop,
    Fault,
    Flip,
    Lost,
    NoRoom,
    Pull,
    Repo,
    Short,
    Slow,
    Status,
    Then,
    Tree,
    WholeFile,
    WrongSize,
    git_blob,
)
from tests.loopback_writes import Writes

__all__ = [
    "LFS_SIZE",
    "LFS_SUFFIXES",
    "Blob",
    "Drop",
    "Flip",
    "LoopbackHub",
    "Lost",
    "NoRoom",
    "Pull",
    "Repo",
    "Request",
    "Short",
    "Slow",
    "Status",
    "Then",
    "WholeFile",
    "WrongSize",
    "git_blob",
]


@dataclass(frozen=True)
class Request:
    """One line of the log. `host` is the Host header; `token` whether a token came along; `size` of the body."""

    method: str
    path: str
    query: dict[str, list[str]]
    byte_range: str | None
    host: str
    token: bool
    size: int = 0


class LoopbackHub(ThreadingHTTPServer):
    """`with LoopbackHub() as hub:` serves on a free port of 127.0.0.1; `hub.url` is the endpoint.

    `objects`: large files that were sent, by SHA-256, committed or not. `part_size`: larger ones are sent in parts.
    `xet`: a folder for the chunk store of hf_xet, which is then offered. `closed`: names of users and organisations
    in whose place a token may not write. `trusting`: repositories that take what a GitHub job publishes.
    """

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
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.part_size = 0
        self.xet = ""
        self.closed: set[str] = set()
        self.trusting: set[str] = set()
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

    def planned(self) -> list[tuple[str, str, Fault]]:
        """Faults that no request has met yet; clear it to forget them."""
        return self._faults

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


class _Handler(Writes):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer of headers and body waits 40 ms
    server: LoopbackHub

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        hub, url = self.server, urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        body = self.read_body()
        hub.requests.append(
            Request(
                self.command,
                path,
                query,
                self.headers.get("Range"),
                self.headers.get("Host", ""),
                bool(given),
                len(body),
            )
        )
        fault = self.fault = hub.take_fault(self.command, path)
        if isinstance(fault, Status) and fault.html:
            self._send(fault.code, b"<html><h1>Bad gateway</h1></html>", {"Content-Type": "text/html"})
        elif isinstance(fault, Status):
            reason = {"X-Error-Message": fault.message} if fault.message.isprintable() else {}
            answer = json.dumps({"error": fault.message}).encode()
            self._send(fault.code, answer, {"Content-Type": "application/json", **reason, **dict(fault.headers)})
        elif isinstance(fault, Drop):
            self.close_connection = True
        else:
            if isinstance(fault, Then):
                fault.action()
            if self.command in ("GET", "HEAD") and self._reads(url.path):
                self._route(path, query, given)
            else:
                with hub.lock:
                    self.write([unquote(part) for part in url.path.strip("/").split("/")], query, body, given)

    do_HEAD = do_POST = do_PUT = do_GET

    @staticmethod
    def _reads(path: str) -> bool:
        """Whether a GET is one of those that a download makes."""
        parts = path.strip("/").split("/")
        asked = parts[4:5] if parts[:1] == ["api"] else []
        about = (["refs"], ["commits"], ["discussions"], ["xet-write-token"], ["xet-read-token"])
        return parts != ["_id_token"] and asked not in about

    def _route(self, path: str, query: dict[str, list[str]], token: str) -> None:
        parts = path.strip("/").split("/")
        if parts[0] == "_cdn" and len(parts) == 2:
            blobs = (b for r in self.server.repos.values() for t in r.commits.values() for b in t.values())
            blob = next((b for b in blobs if b.sha256 == parts[1]), None)
            return self._body(blob.data, {}) if blob else self._error(404, "", "no such object")
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]  # refs%2Fpr%2F1 is one
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
            facts = {"id": name, "modelId": name, "sha": sha, "private": repo.private, "tags": [], "siblings": names}
            return self._json(facts)
        if verb == "tree":
            return self._tree(repo.commits[sha], query)
        if verb == "resolve":
            if repo.gated and not token:
                return self._error(401, "GatedRepo", "Access to this model is restricted")
            return self._resolve(repo.commits[sha], sha, "/".join(rest[1:]))
        return self._error(404, "", f"no verb {verb}")

    def _tree(self, tree: Tree, query: dict[str, list[str]]) -> None:
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

    def _resolve(self, tree: Tree, sha: str, name: str) -> None:
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

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], short: Short | None = None) -> None:
        if isinstance(self.fault, Lost):
            self.fault.action()
            self.close_connection = True
            return
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
