"""Fill the store: every tensor becomes its final numbers, once, leaf by leaf."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from exporter.errors import ExporterError
from exporter.pipeline import leaves as parallel
from exporter.pipeline.progress import Progress
from exporter.pipeline.store import Source, Store, leaf_record
from exporter.pipeline.store_data import StoreData
from exporter.quantize.exact import from_floats, from_mxfp4
from exporter.quantize.rtn import repack, require_finite, round_to
from exporter.types import QTensor, leaf_count, leaf_range
from exporter.types.recipe import Step


def quantize(store: Store, steps: Sequence[Step], source: Source, workers: int, progress: Progress) -> None:
    """Bring every leaf of every step into the store; those that are there already are left alone."""
    progress.stage("quantize", sum(s.stored_bytes for s in steps))

    def work(task: tuple[Step, int]) -> None:
        step, leaf = task
        start, stop = leaf_range(step.spec.shape, leaf)
        if not store.has(step, leaf):
            obtain(store, step, leaf, source)
        progress.advance(step.stored_bytes * (stop - start) // step.spec.shape[0], step.name)

    with store.writing():
        parallel.each(tasks(steps), work, workers)
    progress.done()


def tasks(steps: Sequence[Step]) -> Iterator[tuple[Step, int]]:
    """Every leaf of every step, in order."""
    for step in steps:
        for leaf in range(leaf_count(step.spec.shape)):
            yield step, leaf


def obtain(store: Store, step: Step, leaf: int, source: Source) -> QTensor:
    """The final numbers of one leaf: from the store where they are intact, or made now and committed to it."""
    if (stored := store.intact(step, leaf)) is not None:
        return stored
    q, facts = make(step, source(step.name, *leaf_range(step.spec.shape, leaf)))
    store.append(step, leaf, q, facts)
    return q


def quantize_apart(
    data: StoreData, wanted: Sequence[tuple[Step, int]], source: Source, workers: int
) -> list[dict[str, Any]]:
    """Make leaves of a store that is another process's: write them, and return their records for its journal."""
    records: list[dict[str, Any]] = []

    def work(task: tuple[Step, int]) -> None:
        step, leaf = task
        q, facts = make(step, source(step.name, *leaf_range(step.spec.shape, leaf)))
        if not step.by_reference:
            data.write(step, leaf, q)
        records.append(leaf_record(step, leaf, q, facts))

    parallel.each(wanted, work, workers)
    os.fsync(data.descriptor)  # a record must not reach the journal before its leaf has reached the disk
    return records


def make(step: Step, q: QTensor) -> tuple[QTensor, dict[str, int]]:
    """The final numbers of some rows of what needs no calibration, and what is known of them."""
    if step.method == "repack" or (step.method == "exact" and q.scheme.kind == "float"):
        made = (repack if step.method == "repack" else from_floats)(q, step.scheme)
        return made.q, {"exact": made.exact, "blocks": made.blocks}
    if step.method == "exact":
        require_finite(q)
        return from_mxfp4(q, step.scheme), {}
    if step.method == "rtn":
        return round_to(q, step.scheme), {}
    if step.method == "gptq":
        raise ExporterError(f"{step.name} changed in the store", hint="`exporter quantize` makes it anew")
    require_finite(q)
    return q, {}
