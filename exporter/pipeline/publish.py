"""Put artifacts on the Hub in one commit: what is refused, what the commit holds, and that it got there.

`plan_publish` needs no network. `publish` looks at the repository first, makes one commit on what it saw, compares a
fresh listing with the files here, and tags. Stopped anywhere, it goes on from there when it runs again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from exporter import __version__
from exporter.errors import ExporterError, Refused, UsageError
from exporter.pipeline.card import Card, Entry, make_card
from exporter.pipeline.integrity import is_picture
from exporter.pipeline.progress import Progress
from exporter.pipeline.publish_artifact import ROOT_ONLY, Ready, ready
from exporter.pipeline.publish_remote import (
    README,
    Present,
    look,
    require_alone_at_root,
    require_not_others,
    require_room,
    source_of,
)
from exporter.pipeline.seal import REPORTS
from exporter.publish.failures import told
from exporter.publish.pulls import open_pull, pull_title
from exporter.publish.repository import Pull, Repository, State
from exporter.publish.session import quiet_client, require_login
from exporter.publish.transaction import Sent, put, put_tag, require_free_tag, require_published
from exporter.publish.upload import Changes, Upload

_REPO = re.compile(r"(?!.*(?:\.\.|--|\.git$|\.$))(?=.{3,96}$)[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_REF = re.compile(r"[A-Za-z0-9_][\w./-]{0,199}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
MAIN = "main"


@dataclass(frozen=True)
class PublishAsk:
    """Which artifacts go where.

    repo: USER/NAME. revision: a branch, made when it is not there. message: of the commit, "" for one that names the
    artifacts. folder: what the folder of the only artifact is called, "" for its own name. root: whether it lies at the
    root instead; None: it does, unless it has a README.md of its own or `folder` is given.
    """

    artifacts: tuple[Path, ...]
    repo: str
    revision: str = MAIN
    private: bool = False
    create_pr: bool = False
    tag: str = ""
    message: str = ""
    license: str = ""
    base_model: str = ""
    allow_unproven: bool = False
    overwrite_card: bool = False
    root: bool | None = None
    folder: str = ""


@dataclass(frozen=True)
class PublishPlan:
    """What would be published, known before the Hub is asked. artifacts: by the folder that they get, "" for the root.

    card: of these artifacts alone; `publish` makes it of those in the repository too.
    """

    ask: PublishAsk
    artifacts: Mapping[str, Ready]
    card: Card

    @property
    def uploads(self) -> tuple[Upload, ...]:
        """Every file, the card included."""
        return (*_data(self.artifacts), *_card_files(self.card))

    @property
    def nbytes(self) -> int:
        return sum(each.size for each in self.uploads)

    @property
    def message(self) -> str:
        """Of the commit."""
        names = ", ".join(sorted(each.name for each in self.artifacts.values()))
        model = next(iter(self.artifacts.values())).made.model
        return self.ask.message or f"{names} of {model}, by exporter {__version__}"[:200]


@dataclass(frozen=True)
class Published:
    """Where it is. made: whether this run made the commit, with `files` of `nbytes`; already: files that were there."""

    repo: str
    commit: str
    url: str
    made: bool
    files: int
    nbytes: int
    already: int
    tag: str
    pull: int | None
    verify: str


def plan_publish(ask: PublishAsk, progress: Progress) -> PublishPlan:
    """Hash every file and refuse what can be refused without the Hub; UsageError for names that cannot be."""
    _require_names(ask)
    folders = [path.resolve() for path in ask.artifacts]
    for path, count in Counter(folders).items():
        if count > 1:
            raise UsageError(f"{path} is named twice", hint="name each artifact once")
    found = [ready(path, progress, ask.allow_unproven) for path in ask.artifacts]
    for each in found[1:]:
        if _made_of(each) != _made_of(found[0]):
            raise Refused(
                f"{found[0].folder} is of {source_of(found[0].manifest)}, and {each.folder} is of "
                f"{source_of(each.manifest)} or of another revision",
                hint="one model, one repository: publish them one by one",
            )
    placed = _places(found, ask)
    return PublishPlan(ask, placed, _card(ask, placed, {}))


def publish(plan: PublishPlan, progress: Progress) -> Published:
    """Make it so, exactly once. Raises Refused, UsageError and ExporterError; nothing is half published."""
    ask = plan.ask
    repository = Repository(ask.repo)
    with quiet_client(progress.advance), told(ask.repo, repository.endpoint):
        require_login(ask.repo, repository.endpoint)
        progress.stage("look at the repository", 0)
        state = _opened(repository, ask)
        present = look(repository, state.head)
        changes = _changes(plan, present)
        left = changes.missing_from(present.tree)
        tagged = require_free_tag(repository, ask.tag, changes, bool(left)) if ask.tag else None
        card = next((each for each in left.uploads if each.name == README), None)
        if card is not None and isinstance(card.source, bytes):
            repository.check_card(card.source.decode())
        progress.done()
        progress.stage("upload", left.nbytes)
        pull, sent = _put(repository, plan, state, present, changes, progress)
        progress.done()
        if ask.tag and tagged is None:
            put_tag(repository, ask.tag, sent.commit)
    where = ask.tag or (pull.ref if pull else ask.revision)
    commit = tagged or sent.commit
    return Published(
        repo=ask.repo,
        commit=commit,
        url=repository.url("discussions", str(pull.number)) if pull else repository.url("commit", commit),
        made=sent.made,
        files=sent.files,
        nbytes=sent.nbytes,
        already=len(changes.uploads) - sent.files,
        tag=ask.tag,
        pull=pull.number if pull else None,
        verify=f"exporter verify {ask.repo}{'' if where == MAIN else f'@{where}'}",
    )


def _put(
    repository: Repository, plan: PublishPlan, state: State, present: Present, changes: Changes, progress: Progress
) -> tuple[Pull | None, Sent]:
    """The commit, on the branch or in a pull request, and the proof that it holds what is here."""
    branch, head, tree, pull = plan.ask.revision, state.head, present.tree, None
    if plan.ask.create_pr and changes.missing_from(tree):
        title = pull_title(plan.message, changes.uploads)
        pull = open_pull(repository, title, f"Made with exporter {__version__}; `exporter verify` checks it.")
        opened = repository.state(pull.ref)
        if opened is None:
            raise ExporterError(f"{plan.ask.repo} has gone while it was published", hint="run the same command again")
        branch, head, tree = pull.ref, opened.head, repository.tree(opened.head)
    sent = put(repository, branch, head, tree, changes, plan.message, progress.advance)
    touched = {*(each.name for each in changes.uploads), *changes.deleted}
    require_published(repository, sent.commit, changes, {n: f for n, f in tree.items() if n not in touched})
    if pull is not None:
        repository.publish_pull(pull)
    return pull, sent


def _opened(repository: Repository, ask: PublishAsk) -> State:
    """The branch as it is, made where it was not there."""
    from huggingface_hub.errors import RevisionNotFoundError

    state = repository.state(MAIN)
    if state is None:
        if ask.create_pr:
            raise UsageError(
                f"no model {ask.repo} on {repository.endpoint}, or your token may not see it",
                hint="a pull request needs a repository that is there; without --create-pr it is made",
            )
        repository.create(ask.private)
        state = repository.state(MAIN)
        if state is None:
            raise ExporterError(
                f"{repository.endpoint} made {ask.repo} and does not show it", hint="run the same command again"
            )
    if ask.private and not state.private:
        raise Refused(
            f"{ask.repo} is there already, and public",
            hint="leave --private out, or make it private in its settings on the Hub first",
        )
    if ask.revision == MAIN:
        return state
    if ask.revision in repository.tags():
        raise UsageError(f"{ask.revision} is a tag of {ask.repo}, and no branch", hint="another --revision")
    try:
        branch = repository.state(ask.revision)
    except RevisionNotFoundError:
        repository.create_branch(ask.revision, state.head)
        branch = repository.state(ask.revision)
    return branch or state


def _changes(plan: PublishPlan, present: Present) -> Changes:
    """What the commit does to what is there. Raises Refused where the two do not go together."""
    manifests = {prefix: each.manifest for prefix, each in plan.artifacts.items()}
    require_room(present, manifests, plan.ask.repo, plan.ask.overwrite_card)
    others = {prefix: each for prefix, each in present.artifacts.items() if prefix not in plan.artifacts}
    entries = {prefix: Entry(prefix, each.manifest, each.report) for prefix, each in others.items()}
    uploads = (*_data(plan.artifacts), *_card_files(_card(plan.ask, plan.artifacts, entries)))
    require_not_others(present, uploads, plan.ask.repo)
    if "" in manifests:
        require_alone_at_root(present, manifests[""], plan.ask.repo)
    stale = present.pictures()
    for prefix in plan.artifacts.keys() & present.artifacts.keys():
        stale |= present.artifacts[prefix].names
    return Changes(uploads, tuple(sorted(stale - {each.name for each in uploads})))


def _data(artifacts: Mapping[str, Ready]) -> tuple[Upload, ...]:
    return tuple(upload for prefix, each in artifacts.items() for upload in each.uploads(prefix))


def _card(ask: PublishAsk, artifacts: Mapping[str, Ready], others: Mapping[str, Entry]) -> Card:
    entries = dict(others)
    entries |= {prefix: Entry(prefix, each.manifest, each.report) for prefix, each in artifacts.items()}
    ordered = [entries[prefix] for prefix in sorted(entries)]
    return make_card(ask.repo, ordered, license=ask.license, base_model=ask.base_model)


def _card_files(card: Card) -> tuple[Upload, ...]:
    pictures = (Upload.of_bytes(name, data) for name, data in sorted(card.pictures.items()))
    return (Upload.of_bytes(README, card.text.encode()), *pictures)


def _made_of(artifact: Ready) -> tuple[Any, ...]:
    return source_of(artifact.manifest), artifact.made.revision, artifact.made.model


_ROLES = {
    README: "model card",
    "manifest.json": "what it is made of",
    "provenance.json": "the same as an in-toto statement",
    "SHA256SUMS": "hashes",
    "model.sig": "signature",
}


def role(name: str) -> str:
    """What a file is, for the list that is shown before publishing."""
    path = PurePosixPath(name)
    if path.name in _ROLES:
        return _ROLES[path.name]
    if path.name in REPORTS:
        return "proof"
    return "picture of the card" if is_picture(name) else "data"


def _places(found: Sequence[Ready], ask: PublishAsk) -> dict[str, Ready]:
    """The artifacts by folder. Raises Refused where they cannot share a repository."""
    # The card is the README.md of the root.
    own = next((each for each in found if README in each.made.files), None)
    root = len(found) == 1 and own is None and not ask.folder if ask.root is None else ask.root
    if (root or ask.folder) and len(found) > 1:
        raise UsageError("only one artifact can have that place", hint="publish them one by one, or leave it out")
    if root and own is not None:
        raise Refused(f"{own.folder} has a {README} of its own, where the card would be", hint="give it a folder")
    alone = next((each for each in found if each.made.format in ROOT_ONLY), None)
    if alone and not root:
        raise Refused(
            f"{alone.folder}: what loads {alone.made.format} reads the root of a repository, so it is published alone",
            hint="give it a repository of its own",
        )
    if root:
        return {"": found[0]}
    often = Counter(each.name for each in found)
    placed: dict[str, Ready] = {}
    for each in found:
        name = ask.folder or (each.name if often[each.name] == 1 else f"{each.profile}-{each.name}")
        if name in placed:
            raise Refused(
                f"{placed[name].folder} and {each.folder} would both be {name} in the repository",
                hint="publish one of them to another repository",
            )
        placed[name] = each
    return placed


def _require_names(ask: PublishAsk) -> None:
    if not ask.artifacts:
        raise UsageError("no artifact named", hint="give an artifact's folder: OUT/MODEL/PROFILE/ARTIFACT")
    if not _REPO.fullmatch(ask.repo):
        raise UsageError(f'"{ask.repo}" is no name of a repository', hint="--repo USER/NAME")
    for option, value in (("--revision", ask.revision), ("--tag", ask.tag)):
        bad = not _REF.fullmatch(value) or ".." in value or value.endswith(("/", ".", ".lock")) or "//" in value
        if option == "--tag" and not value:
            continue
        if bad or value == "HEAD" or value.startswith("refs/") or _COMMIT.fullmatch(value):
            raise UsageError(
                f'{option}: "{value}" is no name of a {option[2:].replace("revision", "branch")}', "a word"
            )
    if ask.tag in (MAIN, ask.revision):
        raise UsageError(f"--tag: {ask.tag} is the name of a branch", hint="another name, as v1")
    if not ask.message.isprintable():
        raise UsageError("--message: one line, please", hint="the rest belongs on the card")
    if ask.create_pr and (ask.tag or ask.revision != MAIN):
        option = "--tag" if ask.tag else "--revision"
        raise UsageError(f"{option} does not go with --create-pr", hint="a pull request asks for a change of main")
