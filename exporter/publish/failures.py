"""What can go wrong while publishing, in plain words. No message carries a token or a signed address."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from json import JSONDecodeError

from exporter.errors import ExporterError, Refused, UsageError
from exporter.hub.settings import explain_settings
from exporter.publish.session import short

_AGAIN = "run the same command again: what has arrived is kept"
_ROOM = ("quota", "storage", "limit", "payment", "billing", "exceed")
# hf_xet reports a status in the text of a ConnectionError, and not what the Hub said with it.
_XET_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})\b")
# Statuses after which a request may have been carried out, or may be on its way still; so may every 5xx.
_UNCLEAR = (408, 409, 412, 425, 429)


@contextlib.contextmanager
def told(repo: str, endpoint: str) -> Iterator[None]:
    """Turn the client's errors into ExporterError."""
    try:
        yield
    except ExporterError:
        raise
    except Exception as error:
        meant = explain(error, repo, endpoint)
        if meant is None:
            raise
        raise meant from error


def clear(error: BaseException) -> bool:
    """Whether the Hub said no: nothing happened, and nothing will."""
    from huggingface_hub.errors import HfHubHTTPError

    error = cause_of(error)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return 400 <= status < 500 and status not in _UNCLEAR
    return isinstance(error, ExporterError) or (isinstance(error, ValueError) and not _garbled(error))


def cause_of(error: BaseException) -> BaseException:
    """What went wrong with a file, where the client says only that something did."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def explain(error: BaseException, repo: str, endpoint: str) -> ExporterError | None:
    """The error as a line and a cure; None for what is no failure of the Hub or the way to it."""
    import httpx2
    from huggingface_hub import errors

    error = cause_of(error)
    if isinstance(error, ExporterError):
        return error
    if isinstance(error, errors.LocalTokenNotFoundError):
        return Refused(f"publishing to {endpoint} needs a login, and there is none", hint="hf auth login")
    if isinstance(error, errors.HfHubHTTPError):
        if isinstance(error, errors.RevisionNotFoundError):
            return UsageError(f"{repo} has no such branch", hint="leave --revision out to publish to main")
        if isinstance(error, errors.RepositoryNotFoundError) and error.response.status_code != 401:
            return _unseen(repo, endpoint)
        return _of_status(error.response.status_code, error.server_message or "", repo, endpoint)
    if (wrong := explain_settings(error)) is not None:
        return wrong
    if isinstance(error, ConnectionError) and (status := _XET_STATUS.search(str(error))):
        return _of_status(int(status[1]), "", repo, endpoint)
    if isinstance(error, httpx2.TimeoutException):
        return ExporterError(f"{endpoint} does not answer in time", hint=_AGAIN)
    if isinstance(error, httpx2.ConnectError | httpx2.ProxyError | errors.OfflineModeIsEnabled):
        return ExporterError(f"cannot reach {endpoint} for {repo}", hint=f"check the network and proxy, then {_AGAIN}")
    if isinstance(error, httpx2.HTTPError | ConnectionError):
        return ExporterError(f"the connection to {endpoint} broke while publishing {repo}", hint=_AGAIN)
    if isinstance(error, ValueError):
        return _of_value(error, repo, endpoint)
    if isinstance(error, KeyError):
        return ExporterError(f"{endpoint} answers with no {short(error)} for {repo}", hint="check HF_ENDPOINT")
    if type(error) is RuntimeError:  # hf_xet reports whatever its Rust side met as this
        return _refused_room(str(error), repo, endpoint, ("quota", "storage limit", "payment")) or ExporterError(
            f"the Xet transfer to {repo} failed: {short(error)}",
            hint=f"{_AGAIN}; HF_HUB_DISABLE_XET=1 sends the same files without Xet",
        )
    return None


def _of_value(error: ValueError, repo: str, endpoint: str) -> ExporterError:
    text = str(error)
    if _garbled(error):
        return ExporterError(f"{endpoint} answers with no JSON for {repo}: a proxy's page?", hint=_AGAIN)
    if text.startswith("Invalid metadata in README.md"):
        return Refused(
            f"{endpoint} refuses the head of the card: {short(text.partition('.md.')[2])}",
            hint="--license and --base-model set what it says",
        )
    if text.startswith("LFS batch API"):
        reason = short(text.partition(":\n")[2].replace("`", ""))
        return _refused_room(text, repo, endpoint) or ExporterError(
            f"{endpoint} does not take a file for {repo}: {reason}", hint=_AGAIN
        )
    return ExporterError(f"publishing {repo} failed: {short(error)}", hint=_AGAIN)


def _unseen(repo: str, endpoint: str) -> UsageError:
    return UsageError(
        f"no model {repo} on {endpoint}, or your token may not see it", hint="check the name, or hf auth login"
    )


def _of_status(status: int, reason: str, repo: str, endpoint: str) -> ExporterError:
    said = f": {short(reason)}" if reason else f" ({status})"
    if status == 401:
        return Refused(f"{endpoint} does not accept your token for {repo}, or no longer", hint="hf auth login")
    if status in (402, 403, 413):
        return _refused_room(reason, repo, endpoint) or Refused(
            f"{endpoint} does not let you write to {repo}{said}",
            hint="a token with write access to it: hf auth login"
            + ("" if reason else f"; or the account is full: {endpoint}/settings/billing"),
        )
    if status == 429:
        return ExporterError(f"{endpoint} limits your requests for now (429)", hint=f"wait some minutes, then {_AGAIN}")
    if status >= 500:
        return ExporterError(f"{endpoint} is failing ({status}) while publishing {repo}", hint=_AGAIN)
    return ExporterError(
        f"{endpoint} answers {status} for {repo}{said if reason else ''}", hint="check the name and HF_ENDPOINT"
    )


def _refused_room(reason: str, repo: str, endpoint: str, words: tuple[str, ...] = _ROOM) -> Refused | None:
    if not any(word in reason.lower() for word in words):
        return None
    return Refused(
        f"{endpoint} has no room for {repo}: {short(reason)}",
        hint=f"free space there or get more ({endpoint}/settings/billing), then {_AGAIN}",
    )


def _garbled(error: BaseException) -> bool:
    """An answer that is not the one asked for: some machine on the way gave it."""
    return isinstance(error, JSONDecodeError)
