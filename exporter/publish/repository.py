"""One model repository on the Hub, as publishing sees it: what is there, and the few requests that change it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from exporter import __version__
from exporter.errors import ExporterError, Refused
from exporter.hub.client import HubClient, default_cache, require
from exporter.hub.files import RemoteFile, content_digest
from exporter.publish.patience import retried

# Seconds between attempts. What asks may be asked again at once; an answer that was lost is looked for longer.
ASK_WAITS: tuple[float, ...] = (1, 2, 4, 8)
_LOOK_BACK = 50  # commits that may have come after ours while its answer was lost
Tree = dict[str, RemoteFile]


@dataclass(frozen=True)
class State:
    """A branch: its newest commit, and whether the repository is private."""

    head: str
    private: bool


@dataclass(frozen=True)
class Pull:
    """A pull request that is open, or a draft."""

    number: int
    title: str
    draft: bool

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.number}"


class Repository:
    """Methods raise the client's own errors: see failures.explain. Those that only ask try again by themselves."""

    def __init__(self, repo: str, endpoint: str | None = None) -> None:
        require()
        from huggingface_hub import HfApi

        self.repo = repo
        self._reader = HubClient(repo, default_cache(), endpoint, token=True)
        self.endpoint = self._reader.endpoint
        # True: a token must be there, and is asked for at each request, so that one that runs out is renewed.
        self._api = HfApi(endpoint=self.endpoint, token=True, library_name="exporter", library_version=__version__)

    # What is there

    def state(self, branch: str) -> State | None:
        """None: no such repository. Raises RevisionNotFoundError for a branch that is not there."""
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            info = retried(ASK_WAITS, lambda: self._api.repo_info(self.repo, revision=branch))
        except RepositoryNotFoundError as error:
            if error.response.status_code == 401:
                raise
            return None
        if not info.sha:
            raise ExporterError(f"{self.endpoint} gives no commit id for {self.repo}", hint="check HF_ENDPOINT")
        return State(info.sha, bool(info.private))

    def tree(self, commit: str) -> Tree:
        """Every file of a commit, by name."""
        return {each.name: each for each in self._reader.files(commit, recursive=True)}

    def read(self, file: RemoteFile, commit: str) -> bytes:
        """The bytes of a small file; they are what the listing says. Raises ExporterError where they are not."""
        for _ in range(3):
            data = self._reader.header_bytes(file, commit, file.size) if file.size else b""
            if content_digest(data, file.algorithm) == file.digest:
                return data
        raise ExporterError(
            f"{self.repo}: {file.name} arrives damaged: its bytes are not those that the Hub lists",
            hint="a proxy or mirror may alter downloads: check HF_ENDPOINT and HTTPS_PROXY, then run again",
        )

    def tags(self) -> dict[str, str]:
        """The commit of every tag."""
        refs = retried(ASK_WAITS, lambda: self._api.list_repo_refs(self.repo))
        return {tag.name: tag.target_commit for tag in refs.tags}

    def commits_after(self, commit: str, branch: str) -> list[str]:
        """What came after `commit` on a branch, the oldest first."""
        listed = retried(ASK_WAITS, lambda: self._api.list_repo_commits(self.repo, revision=branch))
        newer: list[str] = []
        for each in listed[:_LOOK_BACK]:
            if each.commit_id == commit:
                break
            newer.append(each.commit_id)
        return newer[::-1]

    def pulls(self) -> list[Pull]:
        """Pull requests that are not closed."""

        def ask() -> list[Pull]:
            found = self._api.get_repo_discussions(self.repo, discussion_type="pull_request")
            return [Pull(p.num, p.title, p.status == "draft") for p in found if p.status in ("open", "draft")]

        return retried(ASK_WAITS, ask)

    # What changes it

    def create(self, private: bool) -> None:
        """A new repository; one that has appeared in the meantime is as good."""
        # None: an organisation may have made private what is new there.
        retried(ASK_WAITS, lambda: self._api.create_repo(self.repo, private=private or None, exist_ok=True))

    def create_branch(self, branch: str, commit: str) -> None:
        """A new branch at `commit`; one that has appeared in the meantime is as good."""
        retried(
            ASK_WAITS,
            lambda: self._api.create_branch(self.repo, branch=branch, revision=commit, exist_ok=True),
        )

    def check_card(self, text: str) -> None:
        """Ask the Hub whether it takes the head of a card, before anything is sent. Raises ValueError."""
        retried(ASK_WAITS, lambda: self._api._validate_yaml(text))

    def send(self, operations: Sequence[Any], branch: str) -> None:
        """Bring the content of large files to the Hub's storage, where a commit will find it. It shows nowhere yet.

        What is there already is not sent, so that a second run goes on from where the first was stopped.
        """
        from huggingface_hub import CommitOperationAdd

        added = [each for each in operations if isinstance(each, CommitOperationAdd)]
        if added:
            self._api.preupload_lfs_files(self.repo, added, revision=branch, free_memory=False)
        ignored = [each.path_in_repo for each in added if getattr(each, "_should_ignore", False)]
        if ignored:
            raise Refused(
                f"{self.repo} has a .gitignore that leaves out {ignored[0]}; nothing was published",
                hint="remove that line there, then run the same command again",
            )

    def commit(self, operations: Sequence[Any], branch: str, parent: str, message: str) -> str:
        """One commit on `parent`; its id. Tried once: only who has looked knows whether a second is wanted."""
        done = self._api.create_commit(
            self.repo, operations, commit_message=message, revision=branch, parent_commit=parent
        )
        return done.oid

    def open_pull(self, title: str, description: str) -> None:
        """A new pull request, a draft. Tried once: look whether it is there before another try."""
        self._api.create_pull_request(self.repo, title=title, description=description)

    def publish_pull(self, pull: Pull) -> None:
        """Make a draft an open pull request; to do it twice does no harm."""
        if pull.draft:
            retried(ASK_WAITS, lambda: self._api.change_discussion_status(self.repo, pull.number, "open"))

    def create_tag(self, tag: str, commit: str) -> None:
        """Raises the client's error for a tag that is there. Tried once."""
        self._api.create_tag(self.repo, tag=tag, revision=commit)

    def url(self, *parts: str) -> str:
        """The address of a page of the repository."""
        return "/".join((self.endpoint, self.repo, *parts))
