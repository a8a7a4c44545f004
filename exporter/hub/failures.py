"""What can go wrong on the way to the Hub, in plain words. No message carries a token or a signed address."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterator
from pathlib import Path

from exporter.errors import ExporterError, Refused, UsageError
from exporter.hub.client import HubClient
from exporter.hub.settings import explain_settings


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
    if (wrong := explain_settings(error)) is not None:
        return wrong
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
