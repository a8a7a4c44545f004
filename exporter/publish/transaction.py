"""One commit, exactly once: what is missing is sent, and after an unclear answer the Hub is looked at before a retry.

A lost answer to the commit looks like a failure, and a second commit would be a duplicate. So whatever goes wrong once
the files are up, the branch is listed afresh and compared by hash; and every commit names the one that it builds on,
which the Hub checks.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from exporter.errors import ExporterError, Refused
from exporter.publish.failures import cause_of, clear
from exporter.publish.patience import pause_before
from exporter.publish.repository import Repository, Tree
from exporter.publish.upload import Changes, operations_of

# Seconds between attempts at the commit, and at the tag.
COMMIT_WAITS: tuple[float, ...] = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Sent:
    """`commit` holds what was asked for; `made` is whether this run made it, with `files` and `nbytes` of content."""

    commit: str
    made: bool
    files: int = 0
    nbytes: int = 0


def put(
    repository: Repository,
    branch: str,
    head: str,
    tree: Tree,
    changes: Changes,
    message: str,
    on_bytes: Callable[[int], None],
) -> Sent:
    """Make `changes` on `head`, the newest commit of `branch`, whose files are `tree`.

    Raises ExporterError where others committed in the meantime or a file changed, and the client's errors: in all
    cases nothing was published, though content may have arrived that a second run need not send.
    """
    left = changes.missing_from(tree)
    if not left:
        return Sent(head, made=False)
    operations = operations_of(left, on_bytes)
    repository.send(operations, branch)
    for each in left.uploads:
        each.require_unchanged()
    commit = _commit(repository, branch, head, left, operations, message)
    return Sent(commit, made=True, files=len(left.uploads), nbytes=left.nbytes)


def _commit(
    repository: Repository, branch: str, head: str, changes: Changes, operations: Sequence[Any], message: str
) -> str:
    waits = list(COMMIT_WAITS)
    while True:
        try:
            return repository.commit(operations, branch, head, message)
        except Exception as error:
            if clear(error):
                raise
            found = _look(repository, branch, head, changes)
            if found is not None:
                return found
            pause = _pause(error, waits)
            if pause is None:
                raise
            time.sleep(pause)


def _look(repository: Repository, branch: str, head: str, changes: Changes) -> str | None:
    """The commit after `head` that made `changes`; None where the branch is as it was."""
    try:
        state = repository.state(branch)
        if state is not None and state.head == head:
            return None
        for commit in repository.commits_after(head, branch):
            if not changes.missing_from(repository.tree(commit)):
                return commit
    except Exception as error:
        if clear(error):
            raise
        raise ExporterError(
            f"{repository.endpoint} does not say whether the commit to {repository.repo} was made",
            hint="run the same command again later: it looks first, and commits only what is missing",
        ) from error
    raise ExporterError(
        f"others have committed to {branch} of {repository.repo} in the meantime; nothing was published",
        hint="run the same command again: it starts from their commit, and what has arrived is kept",
    )


def _pause(error: Exception, waits: list[float]) -> float | None:
    """As for any request; and where the Hub says that something has changed, which was looked at and is not so."""
    from huggingface_hub.errors import HfHubHTTPError

    real = cause_of(error)
    if waits and isinstance(real, HfHubHTTPError) and real.response.status_code in (409, 412, 425):
        return waits.pop(0)
    return pause_before(real, waits)


def require_published(repository: Repository, commit: str, changes: Changes, kept: Tree) -> None:
    """Raises ExporterError unless a fresh listing of `commit` has every file as it is here, and `kept` as it was."""
    tree = repository.tree(commit)
    wrong = changes.differences(tree)
    wrong += [name for name, file in kept.items() if (there := tree.get(name)) is None or there.digest != file.digest]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ExporterError(
            f"{repository.repo}@{commit[:12]}: {wrong[0]}{more} is not on the Hub as it is here",
            hint="run the same command again: it sends what differs",
        )


def require_free_tag(repository: Repository, tag: str, changes: Changes, pending: bool) -> str | None:
    """The commit that the tag is on already, which must hold all of `changes`; None: there is no such tag.

    `pending`: whether a commit is still to be made, which an existing tag cannot be on.
    """
    commit = repository.tags().get(tag)
    if commit is not None and (pending or changes.missing_from(repository.tree(commit))):
        raise Refused(
            f"{repository.repo} has a tag {tag} already, on commit {commit[:12]}; nothing was published",
            hint="choose another --tag, or delete that one on the Hub",
        )
    return commit


def put_tag(repository: Repository, tag: str, commit: str) -> None:
    """Put a tag on a commit, once. Raises ExporterError where it is on another one by now."""
    waits = list(COMMIT_WAITS)
    while True:
        try:
            return repository.create_tag(tag, commit)
        except Exception as error:
            there = None
            with contextlib.suppress(Exception):  # the first error is the one to tell
                there = repository.tags().get(tag)
            if there == commit:
                return
            if there is not None:
                raise ExporterError(
                    f"{repository.repo}: tag {tag} was put on commit {there[:12]} by others in the meantime",
                    hint=f"the files are published as {commit[:12]}; run the command again with another --tag",
                ) from error
            pause = None if clear(error) else _pause(error, waits)
            if pause is None:
                raise
            time.sleep(pause)
