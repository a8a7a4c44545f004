"""Make an artifact: lay every file out, stream the leaves in, give it its name at the end.

Leaves that the store lacks are quantized on the way, so that the first format of a recipe reads the
checkpoint once. The digests that a file carries about itself are known only at the end: heads are laid
out with marks of the same length in their place, and stamped when all is done.

While it is made, an artifact lives in `<name>.partial/` with a journal of the leaves that were written.
A resumed run unpacks each of those again and compares digests with the store, so a torn write is
written anew; then the folder is renamed. Nothing half-done ever has the final name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import ExporterError
from exporter.formats.base import ExportJob, FileLayout, Format
from exporter.pipeline import leaves as parallel
from exporter.pipeline.files import flushing, reserve, sync_folder, write_at, write_whole
from exporter.pipeline.journal import Journal
from exporter.pipeline.manifest import MARK, total_digest
from exporter.pipeline.progress import Progress
from exporter.pipeline.quantize import obtain, tasks
from exporter.pipeline.store import Source, Store
from exporter.types import leaf_range
from exporter.types.recipe import Step

JOURNAL = "export.jsonl"


@dataclass(frozen=True)
class Place:
    """Where the leaves of one tensor go: an open file, the tensor's start, bytes per leading index."""

    descriptor: int
    offset: int
    stride: int


class _Partial:
    """The unfinished artifact: open files of the planned size, and which leaves were written."""

    def __init__(self, folder: Path, layouts: Sequence[FileLayout]) -> None:
        self.folder = folder
        # The journal begins with what was laid out; another layout starts afresh.
        self._plan = layout_key(layouts)
        resumed = self._resumable(layouts)
        if not resumed and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.descriptors = [os.open(folder / each.filename, os.O_RDWR | os.O_CREAT, 0o644) for each in layouts]
        self._journal = Journal(folder / JOURNAL)
        for descriptor, layout in zip(self.descriptors, layouts, strict=True):
            reserve(descriptor, layout.size)
        if not resumed:
            self._journal.append({"plan": self._plan})
        self.written = {(r["tensor"], r["leaf"]) for r in self._journal.records if "leaf" in r}

    def _resumable(self, layouts: Sequence[FileLayout]) -> bool:
        try:
            with open(self.folder / JOURNAL, "rb") as f:
                same = bool(json.loads(f.readline()) == {"plan": self._plan})
            return same and all((self.folder / each.filename).stat().st_size == each.size for each in layouts)
        except (OSError, ValueError):
            return False

    def stamp(self, layouts: Sequence[FileLayout], digests: Sequence[str]) -> None:
        """Write the heads, every mark replaced by the digest it stands for."""
        for descriptor, layout in zip(self.descriptors, layouts, strict=True):
            write_at(descriptor, [np.frombuffer(stamped(layout.head, digests), np.uint8)], 0)
            os.fsync(descriptor)

    def commit(self, name: str, leaf: int) -> None:
        self._journal.append({"tensor": name, "leaf": leaf})

    def release(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)
        self._journal.close()


def export(
    folder: Path,
    fmt: Format,
    job: ExportJob,
    layouts: Sequence[FileLayout],
    store: Store,
    source: Source,
    workers: int,
    progress: Progress,
) -> Path:
    """Write every file of the artifact into `<folder>.partial` and return that path. Resumes.

    `layouts` are of a job whose provenance carries marks for digests (`manifest.MARK`): the store need
    not be complete.
    """
    partial = _Partial(folder.with_name(folder.name + ".partial"), layouts)
    try:
        places = _places(fmt, job.steps, layouts, partial.descriptors)
        progress.stage(f"quantize, export {fmt.name}", sum(fmt.target(s).nbytes for s in job.steps))

        def work(task: tuple[Step, int]) -> None:
            step, leaf = task
            n = _export_leaf(fmt, step, leaf, places[step.name], store, source, partial)
            progress.advance(n, step.name)

        with store.writing(), flushing(partial.descriptors):
            parallel.each(tasks(job.steps), work, workers)
        digests = store.digests(job.steps)
        partial.stamp(layouts, [total_digest(digests), *digests.values()])
        progress.done()
    finally:
        partial.release()
    return partial.folder


def layout_key(layouts: Sequence[FileLayout]) -> str:
    """Names everything about an artifact but its numbers: names, sizes, metadata, tokenizer, order."""
    h = hashlib.sha256()
    for layout in layouts:
        h.update(f"{layout.filename} {layout.size}\n".encode() + layout.head)
    return h.hexdigest()


def stamped(head: bytes, digests: Sequence[str]) -> bytes:
    """`head` with its marks replaced by `digests`, in order. A head has all of the marks or none."""
    start = head.find(MARK.encode())
    if start < 0:
        return head
    pieces = head[start:].split(MARK.encode())
    if len(pieces) != len(digests) + 1:
        raise ValueError(f"{len(pieces) - 1} marks for {len(digests)} digests")
    filled = b"".join(piece + digest.encode() for piece, digest in zip(pieces[:-1], digests, strict=True))
    return head[:start] + filled + pieces[-1]


def _places(
    fmt: Format, steps: Sequence[Step], layouts: Sequence[FileLayout], descriptors: Sequence[int]
) -> dict[str, Place]:
    file_of = {name: i for i, layout in enumerate(layouts) for name in layout.offsets}
    places = {}
    for step in steps:
        i = file_of[step.name]
        stride = fmt.target(step).nbytes // step.spec.shape[0]
        places[step.name] = Place(descriptors[i], layouts[i].offsets[step.name], stride)
    return places


def _export_leaf(
    fmt: Format, step: Step, leaf: int, place: Place, store: Store, source: Source, partial: _Partial
) -> int:
    start, stop = leaf_range(step.spec.shape, leaf)
    offset, nbytes = place.offset + start * place.stride, (stop - start) * place.stride
    if (step.name, leaf) in partial.written and store.has(step, leaf):
        raw = np.frombuffer(os.pread(place.descriptor, nbytes, offset), np.uint8)
        if _intact(fmt, step, raw, store.leaf_digest(step, leaf)):
            return nbytes
    packed = fmt.pack(step, obtain(store, step, leaf, source))
    if packed.nbytes != nbytes:
        raise ExporterError(f"{fmt.name} packed {step.name} into {packed.nbytes:,} bytes instead of {nbytes:,}")
    write_at(place.descriptor, [packed], offset)
    partial.commit(step.name, leaf)
    return nbytes


def _intact(fmt: Format, step: Step, raw: np.ndarray[Any, Any], digest: bytes) -> bool:
    try:
        return fmt.unpack(step, raw).leaf_digest() == digest
    except ValueError:
        return False


def publish(partial: Path, folder: Path, manifest: Mapping[str, Any], replace: bool) -> None:
    """Write manifest.json and give the folder its final name; with `replace`, in place of an older artifact."""
    write_whole(partial / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if replace and folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    # Until here a killed run finds its journal and has only this to do again.
    clean(folder)
    sync_folder(folder.parent)


def clean(folder: Path) -> None:
    """Remove what a run that was killed while it gave names may have left."""
    (folder / JOURNAL).unlink(missing_ok=True)
    shutil.rmtree(folder.with_name(folder.name + ".old"), ignore_errors=True)
