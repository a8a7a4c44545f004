"""Whether an artifact is whole, from its own files: no checkpoint, no network, no run.

Every byte that its lists name is hashed. What a change of the files and of all the lists together would hide, only a
signature shows (sign.py).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from exporter.errors import ExporterError
from exporter.pipeline.manifest import hash_files
from exporter.pipeline.progress import Progress
from exporter.pipeline.seal import OWN_CAP, OWN_FILES, proof_of, verdict
from exporter.pipeline.validate import Made, read_made

SUMS = "SHA256SUMS"
# What the root of a repository has beside an artifact: for people and for git, read by no runtime.
BESIDE = frozenset({"README.md", "LICENSE", ".gitattributes", ".gitignore"})
_PICTURES = (".svg", ".png")
_CLIENTS = (".git", ".cache")  # of git, and of the Hub's client
_DEPTH = 4  # OUT/model/profile/artifact, and one more
_AGAIN = "download it again"


@dataclass(frozen=True)
class Checked:
    """What was found of one artifact.

    made: None where manifest.json cannot be read. hashes: SHA-256 by name of the files that are there, data and own.
    problems: what is not as it should be; none: it is as it was sealed.
    """

    folder: Path
    made: Made | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[ExporterError, ...] = ()

    @property
    def proof(self) -> Mapping[str, Any] | None:
        """The verdict in manifest.json; None where there is none."""
        return proof_of(self.made.body) if self.made else None


def is_ours(path: Path) -> bool:
    """Whether `path` is a folder that exporter sealed, or lost its manifest.json of."""
    return path.is_dir() and any((path / name).exists() for name in ("manifest.json", SUMS))


def find_artifacts(path: Path) -> list[Path]:
    """`path`, where it is an artifact of ours; else those in its folders, sorted."""
    if is_ours(path):
        return [path]
    found: list[Path] = []
    for here, folders, _ in os.walk(path):
        folder = Path(here)
        if folder != path and is_ours(folder):
            found.append(folder)
        inside = folder == path or not is_ours(folder)
        deeper = inside and len(folder.relative_to(path).parts) < _DEPTH
        # "store" and the like have lists of their own, under other names.
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if deeper else []
    return found


def check_artifact(folder: Path, progress: Progress, listed: Collection[str] | None = None) -> Checked:
    """Compare everything in an artifact's folder with what its lists say.

    listed: names of all files that a repository has in the folder, where only those that matter were downloaded.
    """
    try:
        _require_own_hashes(folder)
        made = read_made(folder)
    except ExporterError as error:
        return Checked(folder, problems=(error,))
    own = [name for name in sorted(OWN_FILES) if (folder / name).is_file()]
    paths = {name: folder / name for name in [*made.files, *own]}
    found = hash_files(list(paths.values()), 2, progress)  # two at once keep a disk busy
    hashes = {name: found[path] for name, path in paths.items()}
    problems = [
        ExporterError(f"{folder / name} is not the file that {SUMS} names: its bytes changed", hint=_AGAIN)
        for name, digest in made.files.items()
        if hashes[name] != digest
    ]
    problems += _wrong_report(folder, made)
    problems += [
        ExporterError(
            f"{folder / name} is not of the artifact: no list names it",
            hint="remove it: nothing says where it comes from",
        )
        for name in sorted(names_in(folder) if listed is None else listed)
        if not _belongs(name, made)
    ]
    return Checked(folder, made, hashes, tuple(problems))


def names_in(folder: Path) -> Iterator[str]:
    """Names of all files below a folder, with "/"; links to folders are names, and are not entered."""
    for here, folders, files in os.walk(folder):
        base = Path(here).relative_to(folder)
        if not base.parts:
            folders[:] = [name for name in folders if name not in _CLIENTS]
        links = [name for name in folders if (Path(here) / name).is_symlink()]
        yield from ((base / name).as_posix() for name in [*files, *links])


def _belongs(name: str, made: Made) -> bool:
    return name in made.files or name in OWN_FILES or is_expected_beside(name)


def is_expected_beside(name: str) -> bool:
    """Whether a file may lie beside an artifact without being of it."""
    return name in BESIDE or is_picture(name) or PurePosixPath(name).parts[0] in _CLIENTS


def is_picture(name: str) -> bool:
    """Whether a file is one of those that the card of a repository shows."""
    path = PurePosixPath(name)
    return len(path.parts) == 2 and path.parts[0] == "plots" and path.suffix in _PICTURES


def _require_own_hashes(folder: Path) -> None:
    """Raises ExporterError where manifest.json or provenance.json is not the file that SHA256SUMS names.

    `read_made` refuses them too, but cannot say which of the lists it was.
    """
    sums = folder / SUMS
    changing = (folder / f"{SUMS}.next").exists()  # killed while it was proved: `read_made` finishes it
    if changing or not sums.is_file() or sums.stat().st_size > OWN_CAP:
        return
    known = dict(line.split("  ", 1)[::-1] for line in sums.read_text(errors="replace").splitlines() if "  " in line)
    for name in ("manifest.json", "provenance.json"):
        path = folder / name
        if not (path.is_file() or name in known):
            continue
        if not path.is_file():
            raise ExporterError(f"{path} is missing", hint=_AGAIN)
        if name not in known:
            raise ExporterError(f"{sums} does not name {name}", hint=_AGAIN)
        if path.stat().st_size > OWN_CAP or hashlib.sha256(path.read_bytes()).hexdigest() != known[name]:
            raise ExporterError(f"{path} is not the file that {SUMS} names: its bytes changed", hint=_AGAIN)


def _wrong_report(folder: Path, made: Made) -> Iterator[ExporterError]:
    """Where report.json does not say what the sealed verdict does. Its figures are measured, and no list has them."""
    path, proof = folder / "report.json", proof_of(made.body)
    if proof is None:
        return
    if not path.is_file():
        yield ExporterError(f"{path} is missing: manifest.json says that it was proved", hint=_AGAIN)
        return
    try:
        report = json.loads(path.read_bytes() if path.stat().st_size < OWN_CAP else b"")
        same = verdict(report) == proof and report["subject"]["digest"] == made.digest
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        yield ExporterError(f"{path} is damaged", hint=_AGAIN)
        return
    if not same:
        yield ExporterError(
            f"{path} says something else than manifest.json, where its verdict was sealed",
            hint=f"{_AGAIN}, or exporter validate proves it anew",
        )
