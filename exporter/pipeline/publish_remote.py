"""What a repository holds already, as far as publishing has to know: artifacts, what they consist of, its card."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from exporter.errors import ExporterError, Refused
from exporter.pipeline.integrity import is_expected_beside
from exporter.pipeline.publish_artifact import ROOT_ONLY
from exporter.pipeline.seal import OWN_CAP, OWN_FILES, proof_of, verdict
from exporter.publish.card import MARK
from exporter.publish.repository import Repository, Tree
from exporter.publish.upload import Upload

README = "README.md"
_PICTURE = re.compile(r"(?:\]\(|src=\"|srcset=\")(plots/[\w.-]+)")
_HEAD = re.compile(r"\A---\n(?:(?!---).*\n)*---\s*\Z")  # and nothing below it


@dataclass(frozen=True)
class There:
    """An artifact of ours in the repository. `names`: the files there that are of it, as paths in the repository."""

    prefix: str
    manifest: Mapping[str, Any]
    report: Mapping[str, Any] | None
    names: frozenset[str]


@dataclass(frozen=True)
class Present:
    """What is in a commit: artifacts by prefix, and the card, None where there is none."""

    tree: Tree
    artifacts: Mapping[str, There]
    card: str | None

    @property
    def card_is_ours(self) -> bool:
        """Written by exporter, or nothing but a head, which the Hub makes when a licence is chosen there."""
        return self.card is None or f"\n{MARK}\n" in self.card or bool(_HEAD.match(self.card)) or not self.card.strip()

    def pictures(self) -> set[str]:
        """Pictures that the card shows, where exporter wrote it."""
        ours = self.card is not None and f"\n{MARK}\n" in self.card
        return {name for name in _PICTURE.findall(self.card or "") if name in self.tree} if ours else set()


def look(repository: Repository, commit: str) -> Present:
    """Read a commit: its listing, and the small files that say what is in it, each checked by its hash."""
    tree = repository.tree(commit)
    found = {}
    for name in sorted(tree):
        path = PurePosixPath(name)
        if path.name == "manifest.json" and len(path.parts) <= 2:
            prefix = "" if len(path.parts) == 1 else path.parts[0]
            artifact = _artifact(repository, commit, tree, prefix)
            if artifact is not None:
                found[prefix] = artifact
    card = _small(repository, commit, tree, README)
    return Present(tree, found, card.decode("utf-8", "replace") if card is not None else None)


def _artifact(repository: Repository, commit: str, tree: Tree, prefix: str) -> There | None:
    """None: a manifest.json of some other tool's."""
    manifest = _json(repository, commit, tree, _at(prefix, "manifest.json"))
    if not isinstance(manifest, dict) or not {"exporter", "layout", "tensors", "files"} <= manifest.keys():
        return None
    files = manifest["files"]
    if not isinstance(files, dict) or not isinstance(manifest.get("source"), dict):
        return None
    # At the root others' files lie beside it; a folder is an artifact's alone.
    own = {n for n in tree if n.startswith(f"{prefix}/")} if prefix else {*files, *OWN_FILES} & tree.keys()
    return There(prefix, manifest, _report(repository, commit, tree, prefix, manifest), frozenset(own))


def _report(
    repository: Repository, commit: str, tree: Tree, prefix: str, manifest: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    """The report that the manifest's verdict is of; None: there is none."""
    report: Any = _json(repository, commit, tree, _at(prefix, "report.json")) if proof_of(manifest) else None
    try:
        same = verdict(report) == proof_of(manifest) and report["subject"]["digest"] == manifest["digest"]
    except (LookupError, TypeError, AttributeError):
        return None
    return report if same else None


def _at(prefix: str, name: str) -> str:
    return f"{prefix}/{name}" if prefix else name


def _json(repository: Repository, commit: str, tree: Tree, name: str) -> Any:
    raw = _small(repository, commit, tree, name)
    try:
        return json.loads(raw) if raw is not None else None
    except (ValueError, RecursionError):
        return None


def _small(repository: Repository, commit: str, tree: Tree, name: str) -> bytes | None:
    file = tree.get(name)
    if file is None:
        return None
    if file.size > OWN_CAP:
        raise ExporterError(f"{repository.repo}: {name} has {file.size:,} bytes", hint="remove it on the Hub")
    return repository.read(file, commit)


# What must not meet


def source_of(manifest: Mapping[str, Any]) -> str:
    """Which model an artifact is of: the repository that it was made from, else the name of the folder."""
    return str(manifest["source"].get("repo") or manifest.get("model"))


def require_room(present: Present, placed: Mapping[str, Mapping[str, Any]], repo: str, overwrite_card: bool) -> None:
    """Raises Refused where artifacts at these places (manifests by prefix) would not go with what is there."""
    if not present.card_is_ours and not overwrite_card:
        raise Refused(
            f"{repo} has a {README} that exporter did not write",
            hint="--overwrite-card puts the new card in its place; or publish to a repository of its own",
        )
    at_root = "" in placed
    alone = at_root and placed[""].get("format") in ROOT_ONLY
    cure = "" if alone else "--folder NAME puts this one in a folder too; or "
    for prefix, there in present.artifacts.items():
        if at_root and prefix:
            raise Refused(
                f"{repo} holds artifacts in folders ({prefix}), with which one at its root does not go",
                hint=f"{cure}publish to a repository of its own",
            )
        if not at_root and not prefix:
            raise Refused(
                f"{repo} holds an artifact at its root, with which others in folders do not go",
                hint="publish to a repository of its own",
            )
        for manifest in placed.values():
            mine, theirs = source_of(manifest), source_of(there.manifest)
            if mine != theirs:
                raise Refused(
                    f"{repo} holds an artifact of {theirs}, and this one is of {mine}",
                    hint="one model, one repository: publish to another",
                )
    for prefix in placed:
        if prefix and prefix not in present.artifacts and any(n.startswith(f"{prefix}/") for n in present.tree):
            raise Refused(
                f"{repo} has a folder {prefix} that exporter did not write",
                hint="remove or rename it on the Hub, or publish to another repository",
            )


def require_not_others(present: Present, uploads: Collection[Upload], repo: str) -> None:
    """Raises Refused where a file would take the place of one that is of no artifact of ours, and not of its card."""
    ours = {README, *present.pictures()}.union(*(artifact.names for artifact in present.artifacts.values()))
    folders = {name.split("/")[0] for name in present.tree if "/" in name}
    for upload in sorted(uploads, key=lambda each: each.name):
        name = upload.name
        if name in present.tree and name not in ours and not upload.same_as(present.tree[name]):
            raise Refused(
                f"{repo} has a file {name} that exporter did not put there",
                hint="remove or rename it on the Hub, or publish to another repository",
            )
        if name in folders or any(str(above) in present.tree for above in PurePosixPath(name).parents):
            raise Refused(
                f"{repo} has a file where {name} needs a folder, or a folder of that name",
                hint="remove it on the Hub, or publish to another repository",
            )


def require_alone_at_root(present: Present, manifest: Mapping[str, Any], repo: str) -> None:
    """Raises Refused where an artifact at the root would lie among files that `exporter verify` takes for its own."""
    known = {*manifest["files"], *OWN_FILES}.union(*(artifact.names for artifact in present.artifacts.values()))
    strange = sorted(name for name in present.tree if name not in known and not is_expected_beside(name))
    if strange:
        way = "" if manifest["format"] in ROOT_ONLY else ", or --folder NAME puts the artifact in a folder"
        raise Refused(
            f"{repo} has a file {strange[0]} that exporter did not put there: `exporter verify` would not accept it "
            "beside an artifact at the root",
            hint=f"remove it on the Hub{way}",
        )
