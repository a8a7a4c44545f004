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
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

import numpy as np

from exporter.errors import ExporterError
from exporter.formats.base import ExportJob, FileLayout, Format, Part
from exporter.pipeline import leaves as parallel
from exporter.pipeline import regions
from exporter.pipeline.files import flushing, reserve, sync_folder, write_at, write_whole
from exporter.pipeline.journal import Journal
from exporter.pipeline.manifest import MARK, total_digest
from exporter.pipeline.progress import Progress
from exporter.pipeline.quantize import obtain, tasks
from exporter.pipeline.seal import OWN_FILES
from exporter.pipeline.store import Source, Store
from exporter.types import leaf_range
from exporter.types.qtensor import U8
from exporter.types.recipe import Step

JOURNAL = "export.jsonl"
# Names in an artifact's folder that no format may use.
OWN = (JOURNAL, *OWN_FILES)


@dataclass(frozen=True)
class Place:
    """Where the leaves of one tensor go: an open file, its lock (see `regions.write`), the tensor's parts."""

    descriptor: int
    lock: Lock
    parts: tuple[Part, ...]


class _Partial:
    """The unfinished artifact: open files of the planned size, and which leaves were written."""

    def __init__(self, folder: Path, layouts: Sequence[FileLayout]) -> None:
        self.folder = folder
        # The journal begins with what was laid out; another layout starts afresh.
        self._plan = layout_key(layouts)
        resumed = self._resumable(layouts)
        if not resumed and folder.exists():
            shutil.rmtree(folder)
        for each in layouts:
            (folder / each.filename).parent.mkdir(parents=True, exist_ok=True)
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
        """Write what is not a tensor's: fixed bytes, and the heads, every mark replaced by its digest."""
        for descriptor, layout in zip(self.descriptors, layouts, strict=True):
            for fixed in layout.fixed:
                write_at(descriptor, [fixed.make()], fixed.offset)
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
    not be complete. Raises ValueError for a name that is no path inside the folder.
    """
    require_names(layouts)
    partial = _Partial(folder.with_name(folder.name + ".partial"), layouts)
    try:
        places = _places(fmt, job.steps, layouts, partial.descriptors)
        nbytes = sum(s.spec.shape[0] * part.index_bytes for s in job.steps for part in places[s.name].parts)
        progress.stage(f"quantize, export {fmt.name}", nbytes)

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


def require_names(layouts: Sequence[FileLayout]) -> None:
    """Raises ValueError for names that leave the folder, are there twice, or are the pipeline's own."""
    seen = set(OWN)
    for layout in layouts:
        name = PurePosixPath(layout.filename)
        plain = layout.filename == str(name) and not {"..", "."} & set(name.parts) and "\\" not in layout.filename
        if name.is_absolute() or not name.parts or not plain or layout.filename in seen:
            raise ValueError(f"{layout.filename!r} cannot be the name of an artifact's file")
        seen.add(layout.filename)


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
    places: dict[str, Place] = {}
    for descriptor, layout in zip(descriptors, layouts, strict=True):
        lock = Lock()
        places |= {name: Place(descriptor, lock, parts) for name, parts in layout.parts.items()}
    if missing := [step.name for step in steps if step.name not in places]:
        raise ExporterError(f"{fmt.name} has no place for {missing[0]}")
    return places


def _export_leaf(
    fmt: Format, step: Step, leaf: int, place: Place, store: Store, source: Source, partial: _Partial
) -> int:
    """Returns the bytes written."""
    start, stop = leaf_range(step.spec.shape, leaf)
    nbytes = sum((stop - start) * part.index_bytes for part in place.parts)
    if (step.name, leaf) in partial.written and store.has(step, leaf):
        arrays = regions.read_all(place.descriptor, place.parts, start, stop)
        if arrays is not None and _intact(fmt, step, arrays, store.leaf_digest(step, leaf)):
            return nbytes
    packed = fmt.pack(step, obtain(store, step, leaf, source))
    if [a.size for a in packed] != [(stop - start) * part.index_bytes for part in place.parts]:
        sizes = ", ".join(f"{a.size:,}" for a in packed)
        raise ExporterError(f"{fmt.name} packed {step.name} into {sizes} bytes instead of {nbytes:,} as laid out")
    for part, array in zip(place.parts, packed, strict=True):
        regions.write(place.descriptor, part, start, array, place.lock)
    partial.commit(step.name, leaf)
    return nbytes


def _intact(fmt: Format, step: Step, arrays: Sequence[U8], digest: bytes) -> bool:
    try:
        return fmt.unpack(step, arrays).leaf_digest() == digest
    except ValueError:
        return False


def publish(partial: Path, folder: Path, manifest: Mapping[str, Any], replace: bool) -> None:
    """Write manifest.json and give the folder its final name; with `replace`, in place of an older artifact."""
    for inner in sorted(p for p in partial.rglob("*") if p.is_dir()):
        sync_folder(inner)
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
