"""Talking to the Hub for one repository: listing, downloads that resume, errors in plain words.

Everything goes through huggingface_hub (its session, token, endpoint, cache layout, Xet). One thing
is ours: its downloads start again from nothing in a new process, since partial files have random
names (huggingface_hub 2.4 `_download_to_tmp_and_move`); here the partial file is named by content.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from exporter import __version__
from exporter.checkpoint.hub_files import RemoteFile
from exporter.errors import ExporterError, MissingExtra, Refused, UsageError

T = TypeVar("T")
Kind = Literal["model", "dataset"]

_CHUNK = 1 << 20
_RETRY_STATUS = (408, 429, 500, 502, 503, 504)
_LONGEST_WAIT = 120.0  # seconds; a Retry-After beyond this ends the attempt
# Waits between attempts, in seconds. A question fails fast, a download outlives a short outage.
ASK_WAITS: tuple[float, ...] = (1, 2)
DOWNLOAD_WAITS: tuple[float, ...] = (1, 2, 4, 8, 16)


def require() -> None:
    """Raise MissingExtra unless huggingface_hub can be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import huggingface_hub  # noqa: F401
    except ImportError:
        raise MissingExtra("huggingface_hub", "hub", "a model from the Hugging Face Hub") from None


def default_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def offline() -> bool:
    from huggingface_hub import constants

    return constants.is_offline_mode()


class HubClient:
    """One repository at one endpoint. Methods raise the client's own errors; see `explained`."""

    def __init__(self, repo: str, cache: Path, endpoint: str | None = None, kind: Kind = "model") -> None:
        from huggingface_hub import HfApi, constants

        self.repo, self.cache, self.kind = repo, cache, kind
        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self._api = HfApi(endpoint=self.endpoint, library_name="exporter", library_version=__version__)

    def resolve(self, revision: str) -> str:
        """The full commit id that a branch, tag or short id means now."""
        from huggingface_hub import constants

        timeout = constants.HF_HUB_ETAG_TIMEOUT
        info = _retry(
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

        return _retry(DOWNLOAD_WAITS, read)

    @contextlib.contextmanager
    def _stream(self, file: RemoteFile, revision: str, byte_range: str | None) -> Iterator[Any]:
        """GET through /resolve each time: the signed address that it redirects to expires."""
        from huggingface_hub import constants, get_session, hf_hub_url, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        headers = build_hf_headers(library_name="exporter", library_version=__version__)
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
                pause = _pause(error, waits)
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
                    library_name="exporter",
                    library_version=__version__,
                    tqdm_class=_reporter(on_bytes),
                )

        _retry(DOWNLOAD_WAITS, place)


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


# --- retries and errors ---------------------------------------------------------------------------


def _retry(waits: Sequence[float], call: Callable[[], T]) -> T:
    left = list(waits)
    while True:
        try:
            return call()
        except Exception as error:
            pause = _pause(error, left)
            if pause is None:
                raise
            time.sleep(pause)


def _pause(error: Exception, waits: list[float]) -> float | None:
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


@contextlib.contextmanager
def explained(what: str, client: HubClient) -> Iterator[None]:
    """Turn the client's errors into ExporterError, and keep its log lines off the screen.

    `what` is the repository as the user named it. No message carries a token or a signed address.
    """
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except ExporterError:
        raise
    except Exception as error:
        told = _explain(error, what, client)
        if told is None:
            raise
        raise told from error
    finally:
        logger.setLevel(level)


def _explain(error: BaseException, what: str, client: HubClient) -> ExporterError | None:
    import httpx2
    from huggingface_hub import errors

    repo, endpoint, kind = client.repo, client.endpoint, client.kind

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # the client wraps the real reason when it finds no cached copy
    again = "run the same command again: what has arrived is kept"
    if isinstance(error, errors.GatedRepoError):
        return Refused(
            f"{repo} is gated: its owner must grant you access",
            hint=f"accept the terms on {endpoint}/{'datasets/' * (kind == 'dataset')}{repo}, then: hf auth login",
        )
    if isinstance(error, errors.DisabledRepoError):
        return Refused(f"{repo} has been disabled on the Hub", hint="use another repository")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UsageError(
            f"no {kind} {repo} on {endpoint}, or it is private",
            hint=f"check the name; for a private {kind}: hf auth login",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError(f"{what}: no such branch, tag or commit", hint=f"leave @... out to use main of {repo}")
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_status(error.response.status_code, what, endpoint, again)
    if isinstance(error, errors.HFValidationError):
        return UsageError(f'"{repo}" cannot be a Hub id', hint="a Hub id is org/name or org/name@revision")
    if isinstance(error, httpx2.TimeoutException):
        return ExporterError(
            f"{endpoint} does not answer in time",
            hint=f"{again}; HF_HUB_DOWNLOAD_TIMEOUT=60 waits longer",
        )
    if isinstance(error, httpx2.ConnectError | httpx2.ProxyError | errors.OfflineModeIsEnabled):
        return ExporterError(
            f"cannot reach {endpoint} for {what}",
            hint="check the network and proxy; HF_HUB_OFFLINE=1 uses a copy that is already cached",
        )
    if isinstance(error, httpx2.HTTPError | ConnectionError):
        return ExporterError(f"the connection to {endpoint} broke while reading {what}", hint=again)
    if isinstance(error, RuntimeError):  # hf_xet reports whatever its Rust side met as this
        return ExporterError(
            f"the Xet transfer of {what} failed: {str(error)[:200]}",
            hint="HF_HUB_DISABLE_XET=1 downloads the same files without Xet",
        )
    return _explain_os(error, what, client.cache, again) if isinstance(error, OSError) else None


def _explain_status(status: int, what: str, endpoint: str, again: str) -> ExporterError:
    if status == 401:
        return Refused(f"{endpoint} does not accept your token for {what}", hint="hf auth login")
    if status == 403:
        return Refused(
            f"{endpoint} does not let you read {what}",
            hint="use a token with read access to this repository: hf auth login",
        )
    if status == 429:
        return ExporterError(
            f"{endpoint} limits your requests for now ({status})",
            hint=f"wait some minutes, then {again}; hf auth login raises the limit",
        )
    if status >= 500:
        return ExporterError(f"{endpoint} is failing ({status}) while serving {what}", hint=again)
    return ExporterError(f"{endpoint} answers {status} for {what}", hint="check the name and HF_ENDPOINT")


def _explain_os(error: OSError, what: str, cache: Path, again: str) -> ExporterError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ExporterError(
            f"the disk is full: downloading {what} to {cache}",
            hint=f"free space or set HF_HOME to a larger disk, then {again}",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ExporterError(f"cannot write to {cache}", hint="set HF_HOME to a folder that is yours")
    reason = error.strerror or type(error).__name__
    return ExporterError(f"downloading {what} to {cache} failed: {reason}", hint=again)
