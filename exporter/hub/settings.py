"""What the environment says of the Hub and no client can use: an address, a proxy, a token."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from exporter.errors import ExporterError, UsageError


def require_endpoint() -> None:
    """Raises UsageError where HF_ENDPOINT is no address: the client fails at it much later, and in other words."""
    told = os.environ.get("HF_ENDPOINT")
    if told is None:
        return
    try:
        parts = urlsplit(told)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # no such port; half an IPv6 address
        good = False
    if not good:
        raise UsageError(
            f'HF_ENDPOINT is "{told[:96]}", which is no address',
            hint="unset HF_ENDPOINT, or set it to one as https://huggingface.co",
        )


def explain_settings(error: BaseException) -> ExporterError | None:
    """The error as a line and a cure; None for what is no fault of the environment. No token is shown."""
    import httpx2

    if isinstance(error, httpx2.InvalidURL) or "proxy URL" in str(error):
        return UsageError("the address of a proxy is none", hint="check HTTPS_PROXY, HTTP_PROXY and ALL_PROXY")
    if isinstance(error, ImportError) and "SOCKS" in str(error):
        return ExporterError("a SOCKS proxy is set, and socksio is missing", hint="pip install socksio")
    if isinstance(error, UnicodeEncodeError):  # the client sends it in a header
        return UsageError("your token has characters that no token has", hint="hf auth login, or check HF_TOKEN")
    return None
