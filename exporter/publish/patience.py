"""When a request to the Hub is made again, and after how long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from json import JSONDecodeError
from typing import TypeVar

from exporter.hub import client
from exporter.publish.failures import cause_of
from exporter.publish.session import LONGEST_WAIT

T = TypeVar("T")


def pause_before(error: BaseException, waits: list[float]) -> float | None:
    """Seconds to wait before the next attempt, taken off `waits`; None: do not try again."""
    from huggingface_hub.errors import HfHubHTTPError

    error = cause_of(error)
    if isinstance(error, JSONDecodeError | KeyError):  # a proxy's page in the place of the Hub's answer
        return waits.pop(0) if waits else None
    if waits and isinstance(error, HfHubHTTPError) and error.response.status_code in (429, 503):
        after = error.response.headers.get("Retry-After", "")
        if after.isdigit() and int(after) <= LONGEST_WAIT:
            return max(waits.pop(0), float(after))
    return client.pause_before(error, waits) if isinstance(error, Exception) else None


def retried(waits: Sequence[float], call: Callable[[], T]) -> T:
    """The answer to a request that may be made twice."""
    return client.retried(waits, call, pause_before)
