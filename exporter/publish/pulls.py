"""A pull request in three requests (open, commit, publish), of which a second run makes only those that are missing."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

from exporter.errors import ExporterError
from exporter.publish.failures import clear
from exporter.publish.patience import pause_before
from exporter.publish.repository import Pull, Repository
from exporter.publish.transaction import COMMIT_WAITS
from exporter.publish.upload import Upload

_TITLE = 200  # characters; the Hub's limit


def pull_title(message: str, uploads: Sequence[Upload]) -> str:
    """The message, and twelve digits of what is published: by those a second run knows the pull request."""
    lines = "".join(f"{each.sha256}  {each.name}\n" for each in sorted(uploads, key=lambda u: u.name))
    mark = f"[{hashlib.sha256(lines.encode()).hexdigest()[:12]}]"
    return f"{message[: _TITLE - len(mark) - 1]} {mark}"


def open_pull(repository: Repository, title: str, description: str) -> Pull:
    """The pull request of this title: the one that is there, or a new draft."""
    waits = list(COMMIT_WAITS)
    mark = title.rpartition(" ")[2]
    while True:
        if (found := _find(repository, mark)) is not None:
            return found
        try:
            repository.open_pull(title, description)
        except Exception as error:
            pause = None if clear(error) else pause_before(error, waits)
            if pause is None:
                raise
            time.sleep(pause)
        else:
            if (found := _find(repository, mark)) is not None:
                return found
            raise ExporterError(
                f"{repository.endpoint} does not list the pull request that was opened for {repository.repo}",
                hint="run the same command again",
            )


def _find(repository: Repository, mark: str) -> Pull | None:
    ours = [each for each in repository.pulls() if each.title.endswith(mark)]
    return min(ours, key=lambda each: each.number, default=None)
