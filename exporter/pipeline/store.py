"""The store: what each tensor was quantized to, kept once and read by every format.

A folder with `store.json` (what it holds), `journal.jsonl` (one line a finished leaf, with its digest)
and `data.bin` (codes, scales, zeros of every tensor that the checkpoint does not hold as they are, each
leaf at an offset known from the plan). Released codes and floats that are kept are not copied, and MXFP4
that becomes integers exactly is made anew when it is read (19 GB of 20b): their lines only carry the digest.

Every leaf that is used is compared with its digest first and made again where it differs, so nothing
depends on the order in which a killed run's pages reached the disk, or on their staying as they were.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.errors import ExporterError
from exporter.pipeline.files import flushing, write_whole
from exporter.pipeline.journal import Journal, read_records
from exporter.pipeline.source import OpenedModel
from exporter.pipeline.store_data import StoreData
from exporter.quantize import NUMBERS
from exporter.quantize.exact import from_mxfp4
from exporter.types import QTensor, leaf_count, leaf_range, leaf_rows, tensor_digest
from exporter.types.recipe import Step

_JOURNAL = "journal.jsonl"
_RECORD = ("tensor", "leaf", "digest")  # of a journal line; its other keys are facts
Source = Callable[[str, int, int], QTensor]


class Store:
    """Finished leaves of the steps of one plan. `append` may be called from several threads."""

    def __init__(
        self,
        folder: Path,
        steps: Sequence[Step],
        source: Source,
        about: Mapping[str, Any],
        read_only: bool = False,
    ) -> None:
        """Create the store of these steps, or take up an earlier run's. `about` is written for readers.

        `read_only`: of a finished one, which others read at the same time; nothing in it is changed.
        """
        self.folder, self.steps, self._source = folder, {s.name: s for s in steps}, source
        self._digests: dict[tuple[str, int], str] = {}
        self._facts: dict[tuple[str, int], dict[str, Any]] = {}
        self._journal: Journal | None = None
        if not read_only:
            folder.mkdir(parents=True, exist_ok=True)
            if read_about(folder) != about:
                write_whole(folder / "store.json", json.dumps(about, indent=1) + "\n")
        self._data = StoreData(folder, steps, "read" if read_only else "make")
        if not read_only:
            self._journal = Journal(folder / _JOURNAL)
        for record in self._journal.records if self._journal else read_records(folder / _JOURNAL):
            self._take(record)

    def has(self, step: Step, leaf: int) -> bool:
        return (step.name, leaf) in self._digests

    def complete(self, steps: Sequence[Step]) -> bool:
        """Whether every leaf of every step is finished."""
        return all(self.has(s, i) for s in steps for i in range(leaf_count(s.spec.shape)))

    def append(self, step: Step, leaf: int, q: QTensor, facts: Mapping[str, Any] | None = None) -> None:
        """Commit one leaf, and what is known of how it was made (JSON values).

        Where nothing may be changed, what was made again must be what was committed: raises ExporterError.
        """
        record = leaf_record(step, leaf, q, facts)
        if self._journal is None:
            if record["digest"] != self._digests.get((step.name, leaf)):
                raise ExporterError(
                    f"{step.name} is not in {self.folder} as it was committed, nor made the same again",
                    hint=f"delete {self.folder} and run again",
                )
            return
        if not step.by_reference:
            self._data.write(step, leaf, q)
        self.record(record)

    def record(self, record: Mapping[str, Any]) -> None:
        """Commit a leaf that somebody else has written into data.bin: its `leaf_record`."""
        assert self._journal is not None
        self._journal.append(record)
        self._take(record)

    def _take(self, record: Mapping[str, Any]) -> None:
        name, i, digest = record.get("tensor"), record.get("leaf"), record.get("digest")
        if name in self.steps and isinstance(i, int) and isinstance(digest, str):
            self._digests[name, i] = digest
            self._facts[name, i] = {k: v for k, v in record.items() if k not in _RECORD}

    def writing(self) -> contextlib.AbstractContextManager[None]:
        """Fill the store in this block; what is in it at the end is durable."""
        if self._journal is None:
            return contextlib.nullcontext()
        return flushing([self._data.descriptor, self._journal.descriptor])

    def release(self) -> None:
        """Give the files back, finished or not."""
        self._data.close()
        if self._journal is not None:
            self._journal.close()

    def intact(self, step: Step, leaf: int) -> QTensor | None:
        """A finished leaf as it was committed; None when there is none or its bytes have changed."""
        if not self.has(step, leaf):
            return None
        q = self.read(step, leaf)
        return q if q.leaf_digest() == self.leaf_digest(step, leaf) else None

    def read(self, step: Step, leaf: int) -> QTensor:
        """A finished leaf, from the checkpoint or from `data.bin`."""
        if step.by_reference:
            q = self._source(step.name, *leaf_range(step.spec.shape, leaf))
            return from_mxfp4(q, step.scheme) if step.method == "exact" else q
        return self._data.read(step, leaf)

    def leaf_digest(self, step: Step, leaf: int) -> bytes:
        """The committed digest of a finished leaf."""
        return bytes.fromhex(self._digests[step.name, leaf])

    def digest(self, step: Step) -> str:
        """The tensor's digest; see `types.tensor_digest`."""
        every = [self.leaf_digest(step, i) for i in range(leaf_count(step.spec.shape))]
        return tensor_digest(step.scheme, step.spec.shape, every)

    def digests(self, steps: Sequence[Step]) -> dict[str, str]:
        """Digests of finished tensors by name, in order."""
        return {s.name: self.digest(s) for s in steps}

    def facts(self, step: Step) -> list[dict[str, Any]]:
        """What was recorded of each leaf of a finished tensor."""
        return [self._facts[step.name, i] for i in range(leaf_count(step.spec.shape))]

    def exact_share(self, step: Step) -> tuple[int, int]:
        """(blocks moved without loss, blocks) of a repacked tensor."""
        facts = self.facts(step)
        return sum(f.get("exact", 0) for f in facts), sum(f.get("blocks", 0) for f in facts)


def leaf_record(step: Step, leaf: int, q: QTensor, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The journal's line on a finished leaf."""
    return {"tensor": step.name, "leaf": leaf, "digest": q.leaf_digest().hex(), **(facts or {})}


def store_folder(out: Path, recipe: str, key: str) -> Path:
    """Where the store of a recipe lies in `out`, the model's folder; `key`: store_key."""
    return out / "store" / f"{recipe}-{key[:12]}"


def read_about(folder: Path) -> dict[str, Any] | None:
    """store.json of a store; None where there is none that can be read."""
    try:
        found = json.loads((folder / "store.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def find_stores(out: Path, recipe: str, numbers: str) -> list[Path]:
    """The stores of a recipe's steps in `out`, one for each calibration text. `numbers`: store_key without it."""
    folders = sorted((out / "store").glob(f"{glob.escape(recipe)}-*"))
    return [folder for folder in folders if (read_about(folder) or {}).get("numbers") == numbers]


def open_store(
    out: Path,
    model: OpenedModel,
    recipe: str,
    steps: Sequence[Step],
    key: str,
    calibration: Mapping[str, Any] | None = None,
    read_only: bool = False,
) -> Store:
    """The store of a recipe's steps on a model, new or taken up. `calibration` says what they were calibrated on."""
    about = {
        "model": model.name,
        "repo": model.checkpoint.repo,
        "revision": model.checkpoint.revision,
        "recipe": recipe,
        "numbers": store_key(model.fingerprint(), steps),
        "calibration": calibration,
    }
    return Store(store_folder(out, recipe, key), steps, model.checkpoint.read, about, read_only)


def store_key(fingerprint: str, steps: Sequence[Step], calibration: str = "") -> str:
    """Names the numbers: the checkpoint, what is done to each tensor and how it is cut, our own arithmetic.

    `calibration`: Calibrated.key(), where a step needs it.
    """
    h = hashlib.sha256(f"store-{NUMBERS} {fingerprint} {calibration}\n".encode())
    for s in steps:
        how = f"{s.scheme.scale_rule} {s.otherwise}"
        if s.by_reference and s.method == "exact":
            how += " by-reference"  # stores of before have its numbers in data.bin: another layout
        what = (s.name, s.method, s.source.name, s.scheme.name, how, str(leaf_rows(s.spec.shape)))
        h.update(" ".join(what).encode() + b"\n")
    return h.hexdigest()
