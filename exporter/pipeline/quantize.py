"""Fill the store: every tensor becomes its final numbers, once, leaf by leaf."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from exporter.pipeline import leaves as parallel
from exporter.pipeline.progress import Progress
from exporter.pipeline.store import Source, Store
from exporter.quantize.rtn import repack, require_finite, round_to
from exporter.types import leaves
from exporter.types.recipe import Step


def quantize(store: Store, steps: Sequence[Step], source: Source, workers: int, progress: Progress) -> None:
    """Bring every leaf of every step into the store; those that are there already are left alone."""
    total = sum(s.stored_bytes for s in steps)
    progress.stage("quantize", total)

    def work(task: tuple[Step, int]) -> None:
        step, leaf = task
        start, stop = leaves(step.spec.shape)[leaf]
        share = step.stored_bytes * (stop - start) // step.spec.shape[0]
        if not store.has(step, leaf):
            _commit(store, step, leaf, source)
        progress.advance(share, step.name)

    with store.writing():
        parallel.each(_tasks(steps), work, workers)
    progress.done()


def _tasks(steps: Sequence[Step]) -> Iterator[tuple[Step, int]]:
    for step in steps:
        for leaf in range(len(leaves(step.spec.shape))):
            yield step, leaf


def _commit(store: Store, step: Step, leaf: int, source: Source) -> None:
    q = source(step.name, *leaves(step.spec.shape)[leaf])
    if step.method == "repack":
        made = repack(q, step.scheme)
        store.append(step, leaf, made.q, (made.exact, made.blocks))
    elif step.method == "rtn":
        store.append(step, leaf, round_to(q, step.scheme))
    else:
        require_finite(q)
        store.append(step, leaf, q)
