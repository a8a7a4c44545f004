"""Talking to the Hub for one repository: listing, downloads that resume, waits that end.

Everything goes through huggingface_hub (its session, token, endpoint, cache layout, Xet). One thing
is ours: its downloads start again from nothing in a new process, since partial files have random
names (huggingface_hub 2.4 `_download_to_tmp_and_move`); here the partial file is named by content.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from exporter import __version__
from exporter.errors import ExporterError, MissingExtra, UsageError
from exporter.hub.files import RemoteFile
from exporter.hub.settings import require_endpoint

T = TypeVar("T")
Kind = Literal["model", "dataset"]

_CHUNK = 1 << 20
_RETRY_STATUS = (408, 429, 500, 502, 503, 504)
_LONGEST_WAIT = 120.0  # seconds; a Retry-After beyond this ends the attempt
# Waits between attempts, in seconds. A question fails fast, a download outlives a short outage.
ASK_WAITS: tuple[float, ...] = (1, 2)
DOWNLOAD_WAITS: tuple[float, ...] = (1, 2, 4, 8, 16)


def require() -> None:
    """Raise MissingExtra unless huggingface_hub can be imported, UsageError where it has no address to ask."""
    require_endpoint()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from huggingface_hub import constants  # noqa: F401  # the package itself loads nothing
    except ImportError:
        raise MissingExtra("huggingface_hub", "hub", "a model from the Hugging Face Hub") from None
    except ValueError as error:  # it reads its settings when it is imported
        raise UsageError(
            f"the Hub's client cannot read its settings: {error}", hint="check the HF_... variables"
        ) from None


def default_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def offline() -> bool:
    from huggingface_hub import constants

    return constants.is_offline_mode()


class HubClient:
    """One repository at one endpoint. Methods raise the client's own errors; see failures.explained.

    token: True sends the one that is there even where the environment says that no request should by itself.
    """

    def __init__(
        self,
        repo: str,
        cache: Path,
        endpoint: str | None = None,
        kind: Kind = "model",
        token: Literal[True] | None = None,
    ) -> None:
        from huggingface_hub import HfApi, constants

        self.repo, self.cache, self.kind = repo, cache, kind
        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self._token = token
        self._api = HfApi(endpoint=self.endpoint, token=token, library_name="exporter", library_version=__version__)

    def resolve(self, revision: str) -> str:
        """The full commit id that a branch, tag or short id means now."""
        from huggingface_hub import constants

        timeout = constants.HF_HUB_ETAG_TIMEOUT
        info = retried(
            ASK_WAITS,
            lambda: self._api.repo_info(self.repo, repo_type=self.kind, revision=revision, timeout=timeout),
        )
        sha = info.sha or ""
        if len(sha) != 40 or set(sha) - set("0123456789abcdef"):
            raise ExporterError(
                f"{self.endpoint} gives no commit id for {self.repo}@{revision}",
                hint="check HF_ENDPOINT: is it a Hub?",
            )
        return sha

    def files(self, revision: str, recursive: bool = False) -> list[RemoteFile]:
        """Files of a commit; folders are entered when `recursive`."""
        from huggingface_hub.hf_api import RepoFile

        # The client retries this itself.
        entries = self._api.list_repo_tree(self.repo, repo_type=self.kind, revision=revision, recursive=recursive)
        return [_remote(e) for e in entries if isinstance(e, RepoFile) and (recursive or "/" not in e.path)]

    def fetch(self, file: RemoteFile, revision: str, storage: Path, on_bytes: Callable[[int], None]) -> None:
        """Bring one file into the cache and into the snapshot of `revision`. Not verified here."""
        from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]
        from huggingface_hub.utils._runtime import is_xet_available

        if not (file.xet and is_xet_available()):
            blob = storage / "blobs" / file.digest
            blob.parent.mkdir(parents=True, exist_ok=True)
            lock = self.cache / ".locks" / storage.name / f"{file.digest}.lock"
            lock.parent.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(lock):  # the lock that the Hub client itself takes for this blob
                if not blob.exists():
                    partial = partial_path(storage, file)
                    self._resume(file, revision, partial, on_bytes)
                    os.replace(partial, blob)
        self._place(file, revision, on_bytes)

    def header_bytes(self, file: RemoteFile, revision: str, stop: int) -> bytes:
        """The first `stop` bytes of a file, by a ranged request."""

        def read() -> bytes:
            got = bytearray()
            with self._stream(file, revision, f"bytes=0-{stop - 1}") as response:
                for chunk in response.iter_bytes(_CHUNK):
                    got += chunk
                    if len(got) >= stop:
                        break
            return bytes(got[:stop])

        return retried(DOWNLOAD_WAITS, read)

    @contextlib.contextmanager
    def _stream(self, file: RemoteFile, revision: str, byte_range: str | None) -> Iterator[Any]:
        """GET through /resolve each time: the signed address that it redirects to expires."""
        from huggingface_hub import constants, get_session, hf_hub_url, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        headers = build_hf_headers(token=self._token, library_name="exporter", library_version=__version__)
        headers["Accept-Encoding"] = "identity"  # ranges count bytes of the file, not of a gzip stream
        if byte_range:
            headers["Range"] = byte_range
        url = hf_hub_url(self.repo, file.name, repo_type=self.kind, revision=revision, endpoint=self.endpoint)
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
            hf_raise_for_status(response)
            yield response

    def _resume(self, file: RemoteFile, revision: str, partial: Path, on_bytes: Callable[[int], None]) -> None:
        """Append to `partial` until it is complete; attempts count anew whenever bytes arrive."""
        waits = list(DOWNLOAD_WAITS)
        while True:
            before = _size(partial)
            try:
                return self._append(file, revision, partial, on_bytes)
            except Exception as error:
                if _size(partial) > before:
                    waits = list(DOWNLOAD_WAITS)
                pause = pause_before(error, waits)
                if pause is None:
                    raise
                time.sleep(pause)

    def _append(self, file: RemoteFile, revision: str, partial: Path, on_bytes: Callable[[int], None]) -> None:
        have = _size(partial)
        if have > file.size:
            partial.unlink()
            have = 0
        if have == file.size and have:
            return
        with self._stream(file, revision, f"bytes={have}-" if have else None) as response:
            if have and response.status_code != 206:
                partial.unlink()  # the server ignored the range: this is the whole file
                on_bytes(-have)
                have = 0
            _check_total(response.headers, have, file)
            with partial.open("ab") as out:
                for chunk in response.iter_bytes(_CHUNK):
                    out.write(chunk)
                    on_bytes(len(chunk))
                    have += len(chunk)
                    if have > file.size:
                        raise _wrong_size(file, have)
                out.flush()
                os.fsync(out.fileno())
        if have < file.size:
            raise ConnectionResetError(f"{file.name} ended after {have:,} of {file.size:,} bytes")

    def _place(self, file: RemoteFile, revision: str, on_bytes: Callable[[int], None]) -> None:
        """Let the Hub client link the blob into the snapshot; a Xet file it downloads itself."""
        from huggingface_hub import hf_hub_download

        def place() -> str:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return hf_hub_download(
                    self.repo,
                    file.name,
                    repo_type=self.kind,
                    revision=revision,
                    cache_dir=self.cache,
                    endpoint=self.endpoint,
                    token=self._token,
                    library_name="exporter",
                    library_version=__version__,
                    tqdm_class=_reporter(on_bytes),
                )

        retried(DOWNLOAD_WAITS, place)


def partial_path(storage: Path, file: RemoteFile) -> Path:
    """Where the bytes of an unfinished download wait."""
    return storage / "blobs" / f"{file.digest}.part"


def _remote(entry: Any) -> RemoteFile:
    if entry.lfs is not None:
        return RemoteFile(entry.path, entry.lfs.size, "sha256", entry.lfs.sha256, bool(entry.xet_hash)).check()
    return RemoteFile(entry.path, entry.size, "git", entry.blob_id).check()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _check_total(headers: Any, have: int, file: RemoteFile) -> None:
    total = None
    if "Content-Range" in headers:
        total = headers["Content-Range"].rpartition("/")[2]
    elif "Content-Length" in headers and "Content-Encoding" not in headers:
        total = str(have + int(headers["Content-Length"]))
    if total and total.isdigit() and int(total) != file.size:
        raise _wrong_size(file, int(total))


def _wrong_size(file: RemoteFile, found: int) -> ExporterError:
    return ExporterError(
        f"{file.name}: the Hub sends {found:,} bytes where its listing says {file.size:,}",
        hint="a proxy or mirror may alter downloads: check HF_ENDPOINT and HTTPS_PROXY, then run again",
    )


def _reporter(on_bytes: Callable[[int], None]) -> Any:
    """What the Hub client takes for a tqdm class; its bar draws nothing and counts bytes."""

    class Bar:
        n, total = 0, None

        def __init__(self, *_: object, **__: object) -> None:
            pass

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, n: float | None = 1) -> None:
            on_bytes(int(n or 0))

        def ignore(self, *_: object, **__: object) -> None:
            pass

        # Bytes on the wire, which Xet counts apart from bytes of the file.
        update_transfer = set_postfix_str = set_transfer_postfix_str = refresh = close = ignore

    return Bar


# --- retries ---------------------------------------------------------------------------


def pause_before(error: Exception, waits: list[float]) -> float | None:
    """Seconds to wait before the next attempt, taken off `waits`; None: do not try again."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    if not waits:
        return None
    if isinstance(error, HfHubHTTPError):
        if error.response.status_code not in _RETRY_STATUS:
            return None
        wait = waits.pop(0)
        after = error.response.headers.get("Retry-After", "")
        asked = float(after) if after.isdigit() else 0.0
        return max(wait, asked) if asked <= _LONGEST_WAIT else None
    passing = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
    if isinstance(error, (*passing, ConnectionResetError)):
        return waits.pop(0)
    return None


def retried(
    waits: Sequence[float],
    call: Callable[[], T],
    pause_before: Callable[[Exception, list[float]], float | None] = pause_before,
) -> T:
    """What `call` returns, asked again after each of `waits` (seconds) while what it meets may pass."""
    left = list(waits)
    while True:
        try:
            return call()
        except Exception as error:
            pause = pause_before(error, left)
            if pause is None:
                raise
            time.sleep(pause)
