"""Pack the store into an artifact: lay every file out, stream the leaves in, give it its name at the end.

While it is made, an artifact lives in `<name>.partial/` with a journal of the leaves that were written.
A resumed run unpacks each of those again and compares digests with the store, so a torn write is
written anew; then the folder is renamed. Nothing half-done ever has the final name.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import ExporterError
from exporter.formats.base import ExportJob, FileLayout, Format
from exporter.pipeline import leaves as parallel
from exporter.pipeline.files import flushing, reserve, sync_folder, write_all, write_at, write_whole
from exporter.pipeline.progress import Progress
from exporter.pipeline.store import Store
from exporter.types import leaves
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
        self.resumed = self._same_heads(layouts)
        if not self.resumed and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.descriptors = [self._open(layout) for layout in layouts]
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        self._journal = os.open(folder / JOURNAL, flags, 0o644)
        self._lock = threading.Lock()
        self.written = self._load_journal()

    def _same_heads(self, layouts: Sequence[FileLayout]) -> bool:
        for layout in layouts:
            path = self.folder / layout.filename
            if not path.is_file() or path.stat().st_size != layout.size:
                return False
            with open(path, "rb") as f:
                if f.read(len(layout.head)) != layout.head:
                    return False
        return (self.folder / JOURNAL).is_file()

    def _open(self, layout: FileLayout) -> int:
        descriptor = os.open(self.folder / layout.filename, os.O_RDWR | os.O_CREAT, 0o644)
        if not self.resumed:
            reserve(descriptor, layout.size)
            write_at(descriptor, [np.frombuffer(layout.head, np.uint8)], 0)
        return descriptor

    def _load_journal(self) -> set[tuple[str, int]]:
        raw = (self.folder / JOURNAL).read_bytes()
        end = raw.rfind(b"\n") + 1
        os.ftruncate(self._journal, end)
        return {(r["tensor"], r["leaf"]) for r in map(json.loads, raw[:end].splitlines())}

    def commit(self, name: str, leaf: int) -> None:
        line = json.dumps({"tensor": name, "leaf": leaf}).encode() + b"\n"
        with self._lock:
            write_all(self._journal, line)

    def release(self) -> None:
        for descriptor in (*self.descriptors, self._journal):
            os.close(descriptor)


def export(
    folder: Path,
    fmt: Format,
    job: ExportJob,
    store: Store,
    workers: int,
    progress: Progress,
) -> Path:
    """Write every file of the artifact into `<folder>.partial` and return that path. Resumes."""
    layouts = fmt.layout(job)
    partial = _Partial(folder.with_name(folder.name + ".partial"), layouts)
    try:
        places = _places(fmt, job.steps, layouts, partial.descriptors)
        progress.stage(f"export {fmt.name}", sum(fmt.target(s).nbytes for s in job.steps))

        def work(task: tuple[Step, int]) -> None:
            step, leaf = task
            n = _export_leaf(fmt, step, leaf, places[step.name], store, partial)
            progress.advance(n, step.name)

        with flushing(partial.descriptors):
            parallel.each(_tasks(job.steps), work, workers)
        progress.done()
    finally:
        partial.release()
    return partial.folder


def _tasks(steps: Sequence[Step]) -> Iterator[tuple[Step, int]]:
    for step in steps:
        for leaf in range(len(leaves(step.spec.shape))):
            yield step, leaf


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


def _export_leaf(fmt: Format, step: Step, leaf: int, place: Place, store: Store, partial: _Partial) -> int:
    start, stop = leaves(step.spec.shape)[leaf]
    offset, nbytes = place.offset + start * place.stride, (stop - start) * place.stride
    if (step.name, leaf) in partial.written:
        raw = np.frombuffer(os.pread(place.descriptor, nbytes, offset), np.uint8)
        if _intact(fmt, step, raw, store.leaf_digests(step)[leaf]):
            return nbytes
    packed = fmt.pack(step, store.read(step, leaf))
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


def publish(partial: Path, folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write manifest.json and give the folder its final name, in place of an older artifact if there is one."""
    write_whole(partial / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    (partial / JOURNAL).unlink(missing_ok=True)
    os.replace(partial, folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
