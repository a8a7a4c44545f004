"""One artifact as it is published: everything that can be refused without the Hub is refused here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import ExporterError, Refused, UsageError
from exporter.pipeline.card_facts import artifact_name
from exporter.pipeline.integrity import check_artifact
from exporter.pipeline.progress import Progress
from exporter.pipeline.seal import REPORTS, SIGNATURE, proof_of
from exporter.pipeline.sign import signed_files, unlike_signed
from exporter.pipeline.validate import Made
from exporter.publish.upload import Stamp, Upload, stamp_of

LARGEST = 50_000_000_000  # bytes of a file; the Hub takes no larger one
ROOT_ONLY = frozenset({"mxfp4", "gptq", "compressed-tensors"})  # what loads them reads the root of a repository alone
_IGNORED = (".cache", ".git")  # folders of the Hub's client and of git, where the artifact was downloaded


@dataclass(frozen=True)
class Ready:
    """An artifact that may be published. `files`: by name, of its data and its own, with SHA-256 and stamp."""

    folder: Path
    made: Made
    files: Mapping[str, tuple[str, Stamp]]
    report: Mapping[str, Any] | None

    @property
    def manifest(self) -> Mapping[str, Any]:
        return self.made.body

    @property
    def name(self) -> str:
        """What its folder is called where several artifacts share a repository."""
        return artifact_name(self.manifest)

    @property
    def profile(self) -> str:
        """What it was proved for, else where it lies."""
        proof = proof_of(self.manifest)
        return str(proof["profile"]["name"]) if proof else self.folder.resolve().parent.name

    def uploads(self, prefix: str) -> Iterator[Upload]:
        """Its files below a folder of the repository, "" for the root."""
        for name, (sha256, stamp) in self.files.items():
            place = f"{prefix}/{name}" if prefix else name
            yield Upload(place, stamp[0], sha256, self.folder / name, stamp)


def ready(folder: Path, progress: Progress, allow_unproven: bool = False) -> Ready:
    """Look at an artifact and hash its files.

    Raises UsageError for a folder that is none, Refused for one that is not as it was sealed, not proved (unless
    `allow_unproven`), signed before it changed, or holds what cannot be published.
    """
    if not folder.is_dir():
        raise UsageError(f"no folder {folder}", hint="give an artifact's folder: OUT/MODEL/PROFILE/ARTIFACT")
    stamps = dict(_regular_files(folder))
    checked = check_artifact(folder, progress)
    made = checked.made
    if checked.problems or made is None:
        raise checked.problems[0]
    _require_proof(folder, made.body, allow_unproven)
    proved = proof_of(made.body) is not None
    names = [n for n in sorted(checked.hashes) if proved or n not in REPORTS]  # of no proof: nothing vouches for them
    for name in names:
        if stamps.get(name) != stamp_of(folder / name):
            raise ExporterError(f"{folder / name} changes while it is read", hint="wait until nothing writes there")
        if stamps[name][0] > LARGEST:
            raise Refused(
                f"{folder / name} has {stamps[name][0] / 1e9:.1f} GB, above the {LARGEST / 1e9:.0f} GB of a file there",
                hint='`split_size = "48G"` beside the artifact in its profile splits it',
            )
    _require_signature(folder, {name: checked.hashes[name] for name in names})
    report = json.loads((folder / "report.json").read_bytes()) if proved else None
    return Ready(folder, made, {n: (checked.hashes[n], stamps[n]) for n in names}, report)


def _regular_files(folder: Path, below: str = "") -> Iterator[tuple[str, Stamp]]:
    """Name and stamp of each file. Raises Refused for a link, which would be sent as what it leads to."""
    with os.scandir(folder / below) as entries:
        for entry in sorted(entries, key=lambda each: each.name):
            name = f"{below}{entry.name}"
            if not below and entry.name in _IGNORED:
                continue
            if entry.is_symlink():
                raise Refused(
                    f"{folder / name} is a link, which would be published as what it leads to",
                    hint="put the file itself in its place, or remove it",
                )
            if entry.is_dir():
                yield from _regular_files(folder, f"{name}/")
            elif entry.is_file():
                yield name, stamp_of(folder / name)
            else:
                raise Refused(f"{folder / name} is no file", hint="remove it")


def _require_proof(folder: Path, manifest: Mapping[str, Any], allow_unproven: bool) -> None:
    proof = proof_of(manifest)
    if allow_unproven or (proof is not None and proof["status"] == "passed"):
        return
    if proof is None:
        raise Refused(
            f"{folder} was never proved",
            hint=f"exporter validate {folder}; --allow-unproven publishes it with a card that says so",
        )
    failed = [gate["name"] for gate in proof["gates"] if not gate["passed"]]
    raise Refused(
        f"{folder} failed its proof: {', '.join(failed[:4])}{', ...' if len(failed) > 4 else ''}",
        hint=f"see {folder}/report.html; --allow-unproven publishes it with a card that says so",
    )


def _require_signature(folder: Path, hashes: Mapping[str, str]) -> None:
    """Raises Refused where model.sig is not of the files that are published, all of them and no others."""
    signed = signed_files(folder)
    if signed is None:
        return
    hint = f"exporter sign {folder} --key KEY.pem signs it anew, or remove {SIGNATURE}"
    for problem in unlike_signed(folder, signed, hashes):
        raise Refused(f"{folder / SIGNATURE} is of other files: {problem.message}", hint=hint)
    for name in sorted(signed.keys() - hashes.keys()):
        raise Refused(f"{folder / SIGNATURE} is of {name} too, which is not published", hint=hint)
