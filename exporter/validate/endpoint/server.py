"""OpenAI's HTTP interface, by the standard library's server.

Each connection has a thread; the model answers one at a time. A browser's page cannot ask it: a request says that it
is JSON (which a page of another origin may not send unasked) and, on loopback, names this host.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from exporter.errors import UsageError
from exporter.validate.endpoint.generation import Abandoned
from exporter.validate.endpoint.requests import ApiError
from exporter.validate.endpoint.service import Chunks, Service

BODY = 16 << 20  # bytes
_CONNECTIONS = 256
_SECONDS = 30.0  # that a client may be silent in the middle of a request, or leave an answer unread
_POSTS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
_GETS = ("/v1/models", "/health", "/tokenizer_info")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Server(ThreadingHTTPServer):
    """Listens at once; `serve_forever` answers. Raises UsageError where it cannot listen."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, service: Service) -> None:
        self.service, self.host = service, host
        self._free = threading.BoundedSemaphore(_CONNECTIONS)
        try:
            self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            super().__init__((host, port), Handler)
        except (OSError, OverflowError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(
                f"cannot listen on {host} port {port}: {reason}", hint="--port 0 takes a free one"
            ) from None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_address[1]}/v1"

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def service_actions(self) -> None:
        """Between two looks at the socket: without its runtime, the endpoint ends."""
        if self.service.failed or not self.service.worker.alive:
            threading.Thread(target=self.shutdown, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that broke off: nothing to say, and no traceback."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "exporter", ""
    timeout = _SECONDS

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].rstrip("/")
        models = self.server.service.models()
        try:
            self._require_host()
            if path == "/health":
                self._send(200, {"status": "ok"})
            elif path == "/tokenizer_info":
                self._send(200, self.server.service.tokenizer_info())
            elif path == "/v1/models":
                self._send(200, models)
            elif path == f"/v1/models/{self.server.service.name}":
                self._send(200, models["data"][0])
            else:
                raise ApiError(405 if path in _POSTS else 404, f"no GET {path[:100]!a} here")
        except ApiError as error:
            self._send(error.status, error.json())

    def do_POST(self) -> None:
        try:
            self._require_host()
            path = self.path.partition("?")[0].rstrip("/")
            asked = self._body()  # read in any case: the next request comes after it
            if path not in _POSTS:
                raise ApiError(405 if path in _GETS else 404, f"no POST {path[:100]!a} here")
            found = self.server.service.answer(path, asked, self._gone)
            if isinstance(found, dict):
                self._send(200, found)
            else:
                self._stream(found)
        except ApiError as error:
            self._send(error.status, error.json())
        except Abandoned:
            self.close_connection = True
        except OSError:  # gone, or silent for too long
            self.close_connection = True
        except Exception as error:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self._send(500, _internal(error).json())

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library finds wrong with a request, as an error object too."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self._send(code, ApiError(code, message or "bad request").json())

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the answer says it all."""

    def _require_host(self) -> None:
        """On loopback, only requests that mean it: a page may let a name of its own lead here (DNS rebinding)."""
        host = (self.headers.get("Host") or "").rsplit(":", 1)[0].strip("[]")
        host = host or (self.headers.get("Host") or "").strip("[]")
        if self.server.host in _LOOPBACK and host not in _LOOPBACK:
            self.close_connection = True
            raise ApiError(403, "this endpoint is for this machine: ask it as 127.0.0.1")

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit()):
            self.close_connection = True
            raise ApiError(411, "a request needs its Content-Length")
        if int(length) > BODY:
            self.close_connection = True
            raise ApiError(413, f"the request has {int(length):,} bytes, at most {BODY:,} are taken")
        raw = self.rfile.read(int(length))
        if len(raw) < int(length):
            raise Abandoned
        if self.headers.get_content_type() != "application/json":
            raise ApiError(415, "a request is JSON: Content-Type: application/json")
        try:
            asked = json.loads(raw, parse_constant=_no_constant)
            json.dumps(asked, ensure_ascii=False).encode()  # "\\ud800" is half a character, and no text
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the request is not JSON ({error})"[:300]) from None
        if not isinstance(asked, dict):
            raise ApiError(400, "the request is not an object")
        return asked

    def _gone(self) -> bool:
        """Whether the client has closed its side. What it sends before the answer is its next request."""
        try:
            if not select.select([self.connection], [], [], 0)[0]:
                return False
            return not self.connection.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, chunks: Chunks) -> None:
        """Server-sent events until the connection closes; what fails before the first is an ordinary error."""
        with contextlib.closing(chunks):
            first = next(chunks)
            self.close_connection = True
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Cache-Control", "no-cache")
            self.send_header("Connection", "close")
            self.end_headers()
            self._event(first)
            try:
                for chunk in chunks:
                    self._event(chunk)
            except (Abandoned, OSError):
                raise
            except Exception as error:
                self._event((error if isinstance(error, ApiError) else _internal(error)).json())
            self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        self.wfile.flush()


def _internal(error: Exception) -> ApiError:
    return ApiError(500, " ".join(f"internal error: {type(error).__name__}: {error}".split())[:300])


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
