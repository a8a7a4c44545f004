"""The model card of artifacts: reads what their files say, and draws the pictures of their proofs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exporter.errors import ExporterError, UsageError
from exporter.pipeline.card_facts import HUB_ID, PLOTS, Entry, artifact_name, item_of
from exporter.pipeline.compare import read_report
from exporter.pipeline.files import write_whole
from exporter.pipeline.integrity import BESIDE
from exporter.pipeline.seal import OWN_FILES
from exporter.pipeline.validate import read_made
from exporter.publish.card import Picture, Repository, page
from exporter.publish.card.markup import cleaned
from exporter.validate.report import comparison
from exporter.validate.report.html import alone
from exporter.validate.report.reading import table
from exporter.validate.report.reading import words as said

__all__ = ["PLOTS", "README", "Card", "Entry", "make_card", "read_entries", "read_entry", "write_card"]

_FOLDER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
README = "README.md"
_TAKEN = frozenset(name.lower() for name in (PLOTS, *BESIDE))  # at a repository's root; some disks ignore case


@dataclass(frozen=True)
class Card:
    """text: README.md. pictures: bytes by path in the repository."""

    text: str
    pictures: Mapping[str, bytes]


def read_entry(folder: Path, prefix: str) -> Entry:
    """What an artifact's folder says of itself: its files must be as long as they were sealed; none is hashed.

    Raises UsageError for a folder that is no artifact, ExporterError for a damaged one.
    """
    sealed = (folder / "SHA256SUMS").exists()
    manifest = read_made(folder).body if sealed else _unsealed(folder)
    path = folder / "report.json"
    if not path.exists():
        return Entry(prefix, manifest, None)
    report = read_report(path)
    if said(report, "subject.digest") not in ("", said(manifest, "digest")):
        raise ExporterError(f"{path} is the proof of other numbers", hint=f"exporter validate {folder} proves these")
    return Entry(prefix, manifest, report)


def _unsealed(folder: Path) -> Mapping[str, Any]:
    """manifest.json of an artifact that was exported only, with the files that are there."""
    try:
        body = json.loads((folder / "manifest.json").read_bytes())
        if not {"exporter", "layout", "tensors"} <= body.keys():
            raise KeyError
    except (OSError, ValueError, LookupError, AttributeError, RecursionError):
        raise UsageError(
            f"{folder} is no artifact of exporter's",
            hint="a folder that `exporter quantize` made: it has manifest.json",
        ) from None
    found = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in OWN_FILES
    }
    return {**body, "files": found}


def read_entries(artifacts: Sequence[Path]) -> list[Entry]:
    """What artifacts say, each where `exporter publish` puts it: one at the root, several in folders.

    Raises UsageError for two that would have one folder, and as `read_entry` does.
    """
    found = [read_entry(path, "") for path in artifacts]
    if len(found) == 1 and README not in table(found[0].manifest, "files"):  # TensorRT's has a README.md of its own
        return found
    names = [artifact_name(entry.manifest) for entry in found]
    profiles = [
        said(e.manifest, "proof.profile.name") or p.resolve().parent.name for e, p in zip(found, artifacts, strict=True)
    ]
    named = [n if names.count(n) == 1 else f"{profile}-{n}" for n, profile in zip(names, profiles, strict=True)]
    if clash := next((name for name in named if named.count(name) > 1), None):
        raise UsageError(f'two of the artifacts would lie in "{clash}"', hint="give each once, or make two cards")
    return [replace(entry, prefix=name) for entry, name in zip(found, named, strict=True)]


def make_card(repo: str, entries: Sequence[Entry], *, license: str = "", base_model: str = "") -> Card:
    """The card of a repository that holds `entries`. The same ones give the same bytes.

    Raises UsageError for what the Hub would not take, and for a layout that is not one.
    """
    _require(repo, entries, license, base_model)
    drawn: dict[str, bytes] = {}
    items = [item_of(entry, drawn) for entry in entries]
    bases = [base_model] if base_model else _bases(entries)
    overview, compared = None, ""
    warnings: tuple[str, ...] = ()
    if len(entries) > 1:
        reports = [(item, entry.report) for item, entry in zip(items, entries, strict=True) if entry.report is not None]
        found = comparison.compare([comparison.Entry(item.label, item.prefix, report) for item, report in reports])
        best = {row.label for row in found.rows if row.best}
        items = [replace(item, best=item.label in best and item.status == "passed") for item in items]
        items.sort(key=lambda item: (item.size, item.label))
        warnings = tuple(found.warnings)
        if svg := comparison.picture(found):
            drawn[f"{PLOTS}/size.svg"] = alone(svg).encode()
            overview = Picture(f"{PLOTS}/size.svg", "Size against KL", "Lower and farther left is better.")
            # Without its count: those that were not proved are in the table too.
            compared = comparison.page(found).sentence.partition(". ")[2]
    repository = Repository(repo, tuple(items), license, tuple(bases), overview, compared, warnings)
    return Card(page(repository), drawn)


def write_card(folder: Path, card: Card) -> list[Path]:
    """README.md and the pictures, in a folder; the paths."""
    files = {README: card.text, **{name: raw.decode() for name, raw in card.pictures.items()}}
    paths = []
    for name, content in files.items():
        path = folder / name
        os.makedirs(path.parent, exist_ok=True)
        write_whole(path, content)
        paths.append(path)
    return paths


def _require(repo: str, entries: Sequence[Entry], license: str, base_model: str) -> None:
    for what, name in (("--repo", repo), ("--base-model", base_model)):
        if name and not HUB_ID.fullmatch(name):
            raise UsageError(f'{what}: "{cleaned(name, 96)}" is no repository of the Hub', hint="USER/NAME")
    if license and not _LICENSE.fullmatch(license):
        raise UsageError(f'--license: "{cleaned(license, 64)}" is no license that the Hub knows', hint="as apache-2.0")
    prefixes = [entry.prefix for entry in entries]
    if not prefixes:
        raise UsageError("a card is of one artifact at least", hint="exporter card ARTIFACT...")
    for entry in entries:
        if entry.prefix and (entry.prefix.lower() in _TAKEN or not _FOLDER.fullmatch(entry.prefix)):
            raise UsageError(f'"{cleaned(entry.prefix, 96)}" is no name for a folder of a repository', hint="rename it")
        if not entry.prefix and README in table(entry.manifest, "files"):
            raise UsageError(
                f"the artifact has a {README} of its own, which the card would replace", hint="publish it in a folder"
            )
    if len(set(prefixes)) < len(prefixes) or ("" in prefixes and len(prefixes) > 1):
        raise UsageError(
            "an artifact at the root of a repository stands alone, and no two lie in one folder",
            hint="one folder for each of several",
        )


def _bases(entries: Sequence[Entry]) -> list[str]:
    """Repositories that the weights come from; a name that is none of the Hub's is left out."""
    found = (said(entry.manifest, "source.repo") for entry in entries)
    return list(dict.fromkeys(repo for repo in found if HUB_ID.fullmatch(repo)))
