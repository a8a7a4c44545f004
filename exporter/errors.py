"""Every failure a user can meet: one clear line, the command that cures it, an exit code.

Library code raises these; only `cli` turns them into text. Exit codes: 0 done, 1 failed, 2 usage,
3 a gate failed, 4 refused, 130 interrupted and resumable.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ExporterError(Exception):
    """Something failed while working: I/O, memory, a damaged file.

    `message` says what and where, `hint` names the command or the change that cures it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(ExporterError):
    """The request itself is wrong: an unknown name, key or value."""

    exit_code = 2


class Refused(ExporterError):
    """The work cannot give a right result, so it was not started."""

    exit_code = 4


class BadCheckpoint(Refused):
    """The input is not a sound gpt-oss checkpoint."""


class Interrupted(ExporterError):
    """Stopped by the user; the same command resumes."""

    exit_code = 130


class MissingExtra(ExporterError):
    """A library that this step needs is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs {package}, which is not installed",
            hint=f"pip install 'exporter[{extra}]'",
        )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' Did you mean "x"?' for the nearest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f' Did you mean "{close[0]}"?' if close else ""
