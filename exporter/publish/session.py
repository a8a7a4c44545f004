"""The Hub client as publishing needs it: a login, waits that end, nothing drawn on the screen."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from exporter.errors import ExporterError, Refused, UsageError
from exporter.hub.client import offline

# Seconds. The Hub's limits count in windows of five minutes; a wait beyond two of them is told, not slept through.
LONGEST_WAIT = 600.0
# Seconds without a byte, where the client itself would wait for ever. A large commit takes the Hub a while.
TIMEOUT = 300.0


def require_login(repo: str, endpoint: str) -> None:
    """Raises Refused where the Hub's client knows no token. The token is never looked at here.

    A job of GitHub's that may prove who it is needs none of its own: the client exchanges the proof for a token that
    is good for one repository, which it must be told.
    """
    from huggingface_hub import errors, get_token

    if offline():
        raise UsageError("publishing needs the Hub, and HF_HUB_OFFLINE is set", hint="unset HF_HUB_OFFLINE")
    in_trusted_job = os.environ.get("HF_OIDC_ID_TOKEN") or (
        os.environ.get("GITHUB_ACTIONS") == "true" and os.environ.get("ACTIONS_ID_TOKEN_REQUEST_URL")
    )
    try:
        known = get_token() is not None
        if not known and in_trusted_job:
            os.environ["HF_OIDC_RESOURCE"] = repo
            known = get_token() is not None
    except (errors.OIDCError, errors.HfHubHTTPError) as error:
        reason = getattr(error, "server_message", None) or str(error)
        raise Refused(
            f"{endpoint} gives this job no token for {repo}: {short(reason)}",
            hint=f"name this workflow as a trusted publisher in the settings of {repo}; "
            "its job needs `permissions: id-token: write`",
        ) from None
    if not known:
        raise Refused(f"publishing to {endpoint} needs a login, and there is none", hint="hf auth login")


@contextlib.contextmanager
def quiet_client(on_bytes: Callable[[int], None]) -> Iterator[None]:
    """The client without bars, log lines and warnings, and with time limits, while the block runs.

    `on_bytes` counts what a transfer through Xet has read, which the client tells to its own bars only.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger = logging.getLogger("huggingface_hub")
    level, bars, factory = logger.level, not are_progress_bars_disabled(), _http._GLOBAL_CLIENT_FACTORY
    with warnings.catch_warnings(), _xet_told_to(on_bytes) as told:
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        if not told:
            disable_progress_bars()
        set_client_factory(lambda: _limited(factory()))
        try:
            yield
        finally:
            set_client_factory(factory)
            logger.setLevel(level)
            if bars:
                enable_progress_bars()


def _limited(client: Any) -> Any:
    import httpx2

    client.timeout = httpx2.Timeout(TIMEOUT, connect=30.0)
    hooks = client.event_hooks
    client.event_hooks = {**hooks, "response": [*hooks.get("response", []), _refuse_long_wait]}
    return client


def _refuse_long_wait(response: Any) -> None:
    """The client sleeps as long as a server says, which may be a day."""
    after = response.headers.get("Retry-After", "")
    if response.status_code in (429, 503) and after.isdigit() and int(after) > LONGEST_WAIT:
        raise ExporterError(
            f"the Hub limits your requests: it asks to wait {int(after) / 60:,.0f} minutes",
            hint="run the same command again then: what has arrived is kept",
        )


@contextlib.contextmanager
def _xet_told_to(on_bytes: Callable[[int], None]) -> Iterator[bool]:
    """Put a counter in the place of the bars that the client draws for Xet; whether that could be done."""
    from huggingface_hub.utils._runtime import is_xet_available
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled

    try:
        bars: Any = importlib.import_module("huggingface_hub.utils._xet_progress_reporting")
        drawn = bars.XetUploadProgressReporter
    except (ImportError, AttributeError):
        drawn = None
    if drawn is None or not is_xet_available() or are_progress_bars_disabled():
        yield False
        return

    class Counter:
        def __init__(self, *_: object, **__: object) -> None:
            self.done = 0

        def update_progress(self, group: Any, *_: object, **__: object) -> None:
            now = int(group.total_bytes_completed)
            on_bytes(max(0, now - self.done))
            self.done = max(now, self.done)

        def close(self, *_: object, **__: object) -> None:
            pass

    bars.XetUploadProgressReporter = Counter
    try:
        yield True
    finally:
        bars.XetUploadProgressReporter = drawn


def short(text: object, limit: int = 200) -> str:
    """Words of a server on one line, without line ends, tokens and signed addresses."""
    line = " ".join(str(text).split())
    line = re.sub(r"\b(hf|api_org)_\w+", r"\1_...", line)
    line = re.sub(r"(https?://[^\s?\"']+)\?[^\s\"']+", r"\1", line)
    line = "".join(c if c.isprintable() else "?" for c in line)
    return line if len(line) <= limit else f"{line[: limit - 3]}..."
