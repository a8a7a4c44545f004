"""What an artifact is made of: source, recipe, digests. Nothing in it depends on the time or the machine."""

from __future__ import annotations

import json
import platform
import threading
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from blake3 import blake3

import exporter
from exporter.formats.base import Provenance
from exporter.pipeline import leaves as parallel
from exporter.pipeline.files import file_stamp, sha256_file, write_whole
from exporter.pipeline.plan import ArtifactPlan
from exporter.pipeline.progress import Progress
from exporter.pipeline.source import OpenedModel
from exporter.pipeline.store import Store

# Stands for a digest while it is not known; of a digest's length.
MARK = "known-when-every-tensor-is-written".center(64, "-")


def total_digest(digests: Mapping[str, str]) -> str:
    """One BLAKE3 over the names and digests of all tensors, in order."""
    return blake3("".join(f"{n} {d}\n" for n, d in digests.items()).encode()).hexdigest()


def provenance(model: OpenedModel, artifact: ArtifactPlan, digests: Mapping[str, str] | None = None) -> Provenance:
    """The facts that go into the artifact's own metadata; marks in the place of digests where there are none yet."""
    return Provenance(
        exporter_version=exporter.__version__,
        source_repo=model.checkpoint.repo or "",
        source_revision=model.checkpoint.revision or "",
        recipe=artifact.recipe.name,
        recipe_sha256=artifact.recipe.sha256,
        digest=total_digest(digests) if digests else MARK,
        tensor_digests=digests or {s.name: MARK for s in artifact.steps},
    )


def manifest(
    model: OpenedModel,
    artifact: ArtifactPlan,
    store: Store,
    facts: Provenance,
    layout: str,
    command: str,
    calibration: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """manifest.json as a value, before its files were hashed: see `seal`.

    `layout`: export.layout_key. `command`: what makes this artifact, and no other, of the same source.
    """
    return {
        "exporter": facts.exporter_version,
        "command": command,
        "versions": _versions(calibrated=calibration is not None),
        "model": model.name,
        "format": artifact.format.name,
        "target": artifact.spec.target,
        "recipe": {"name": facts.recipe, "title": artifact.recipe.title, "sha256": facts.recipe_sha256},
        "calibration": calibration,
        "source": {
            "repo": facts.source_repo or None,
            "revision": facts.source_revision or None,
            "layout": model.checkpoint.layout,
            "files": {},
        },
        "files": {},
        "layout": layout,
        "digest": facts.digest,
        "digest_algorithm": "blake3",
        "tensors": {s.name: _tensor(artifact, store, facts, s.name) for s in artifact.steps},
    }


def _versions(calibrated: bool) -> dict[str, str]:
    """Of what computed the numbers, and of Python, whose own documentation is the default text for calibration."""
    names = ("numpy", "torch") if calibrated else ("numpy",)
    found = {"exporter": exporter.__version__, "python": platform.python_version()}
    return found | {name: metadata.version(name) for name in names}


def _tensor(artifact: ArtifactPlan, store: Store, facts: Provenance, name: str) -> dict[str, Any]:
    step = store.steps[name]
    entry: dict[str, Any] = {
        "digest": facts.tensor_digests[name],
        "scheme": step.scheme.name,
        "method": step.method,
        "type": artifact.format.target(step).type,
    }
    if step.scheme.kind != "float":
        entry["scale_rule"] = step.scheme.scale_rule
    if step.method in ("repack", "exact") and step.source.kind == "float":
        entry["exact_blocks"], entry["blocks"] = store.exact_share(step)
    if step.method == "gptq":
        leaves = store.facts(step)
        # One number for each expert; a matrix that all tokens meet is calibrated as one.
        entry["calibration"] = {
            key: [facts.get(key) for facts in (leaves if step.spec.role == "expert" else leaves[:1])]
            for key in ("tokens", "added", "damp", "error")
        }
    return entry


def hash_files(paths: Sequence[Path], workers: int, progress: Progress) -> dict[Path, str]:
    """SHA-256 of every file."""
    progress.stage("hash", sum(p.stat().st_size for p in paths))
    found: dict[Path, str] = {}
    lock = threading.Lock()

    def work(path: Path) -> None:
        digest = sha256_file(path, progress.advance)
        with lock:
            found[path] = digest

    parallel.each(sorted(paths, key=lambda p: -p.stat().st_size), work, workers)
    progress.done()
    return found


class HashMemory:
    """Hashes of source files that were read before, kept by size, time and inode."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            known = json.loads(path.read_text())
        except (OSError, ValueError):
            known = None
        self.known: dict[str, list[Any]] = known if isinstance(known, dict) else {}

    def get(self, path: Path) -> str | None:
        entry = self.known.get(str(path.resolve()))
        good = isinstance(entry, list) and len(entry) == 2 and entry[0] == list(file_stamp(path))
        return str(entry[1]) if entry and good else None

    def add(self, hashes: Mapping[Path, str]) -> None:
        for path, digest in hashes.items():
            self.known[str(path.resolve())] = [file_stamp(path), digest]
        write_whole(self.path, json.dumps(self.known, indent=1) + "\n")
