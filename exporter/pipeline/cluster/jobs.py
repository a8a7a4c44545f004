"""The jobs that cells need, each once, in the order of what takes longest alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from exporter.pipeline.before import require_disk
from exporter.pipeline.calibrate import calibrated_steps
from exporter.pipeline.cells import Cell, Settings, request_of
from exporter.pipeline.cluster import work
from exporter.pipeline.cluster.dispatch import Job
from exporter.pipeline.cluster.work import Outcome
from exporter.pipeline.plan import ArtifactPlan, Plan, require_fit
from exporter.pipeline.profiles import load_profile
from exporter.pipeline.quantize import tasks
from exporter.pipeline.request import RunRequest, calibration_setting, plan_request
from exporter.pipeline.source import OpenedModel
from exporter.pipeline.store import Store, open_store, store_folder, store_key
from exporter.types import leaf_range
from exporter.types.recipe import Step

_BATCH_BYTES = 256_000_000  # of a store, at most: what a lost worker loses
_BATCHES = 8  # of a smaller store, so that several machines have something to do


class Jobs:
    """`all` that `add` found to do; `cells`: the cell that a job makes, by the job's name. A context manager."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._files = settings, ExitStack()
        self._groups: dict[str, list[Job]] = {}
        self._fillings: dict[str, _Filling] = {}
        self.cells: dict[str, Cell] = {}

    def __enter__(self) -> Jobs:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._files.close()

    @property
    def all(self) -> list[Job]:
        """Texts and calibrations first: one machine each, and long. Cells last, though each starts when it can."""
        order = (work.write_text, work.calibrate, work.refer, work.hash_sources, work.fill, work.make_cell)
        return sorted((j for jobs in self._groups.values() for j in jobs), key=lambda job: order.index(job.call))

    def add(self, cell: Cell, model: OpenedModel) -> None:
        """Everything that a cell needs. Raises ExporterError where it cannot be made."""
        request = request_of(cell, self._settings)
        plan = plan_request(request, load_profile(request.profile), model)
        require_fit(plan)
        (artifact,) = plan.artifacts
        folder = self._settings.out / model.name
        require_disk(request, plan, {self._settings.out / cell.name: artifact}, {})
        if calibrated_steps(artifact.steps):
            numbers = self._calibrated(request, artifact, model, folder)
        else:
            numbers = self._filled(request, plan, model, folder)
        hashes = f"hashes of {model.name}"
        early = replace(request, until="quantize")
        self._add(Job(hashes, folder, work.hash_sources, (early,), group=hashes))
        reference = self._reference(request, plan, model, folder)
        needs = frozenset({numbers, hashes, reference})
        self._add(Job(cell.name, folder, work.make_cell, (cell, self._settings), group=cell.name, after=needs))
        self.cells[cell.name] = cell

    def take(self, job: Job, outcome: Outcome) -> None:
        """What became of a job that is no cell."""
        if job.group in self._fillings and outcome.error is None:
            self._fillings[job.group].take(outcome.value)

    def _add(self, job: Job) -> None:
        self._groups.setdefault(job.group, [job])

    def _calibrated(self, request: RunRequest, artifact: ArtifactPlan, model: OpenedModel, folder: Path) -> str:
        """The group that makes a calibrated store."""
        setting = calibration_setting(request, artifact)
        early, after = replace(request, until="quantize"), frozenset[str]()
        if setting.text == "self":
            text = f"calibration text of {model.name}, {setting.windows} x {setting.length} tokens"
            self._add(Job(text, folder, work.write_text, (early,), group=text))
            after = frozenset({text})
        key = store_key(model.fingerprint(), artifact.steps, f"{setting} {artifact.recipe.gptq}")
        group = f"numbers of {model.name}, {artifact.recipe.name} ({key[:6]})"
        self._add(Job(group, folder, work.calibrate, (early,), group=group, after=after))
        return group

    def _filled(self, request: RunRequest, plan: Plan, model: OpenedModel, folder: Path) -> str:
        """The group that fills a store batch by batch; its journal is written here."""
        (artifact,) = plan.artifacts
        recipe, steps = artifact.recipe.name, artifact.steps
        key = store_key(model.fingerprint(), steps)
        group = f"numbers of {model.name}, {recipe} ({key[:6]})"
        if group in self._groups:
            return group
        require_disk(request, plan, {}, {store_folder(folder, recipe, key): artifact})
        filling = _Filling(open_store(folder, model, recipe, steps, key), steps)
        self._files.callback(filling.close)
        batches = list(filling.batches())
        early = replace(request, until="quantize")
        self._groups[group] = [
            Job(
                f"{group}, part {i + 1} of {len(batches)}",
                folder,
                work.fill,
                (early, key, filling.store.folder, batch),
                group=group,
                twice=True,  # the same bytes in the same place
            )
            for i, batch in enumerate(batches)
        ]
        self._fillings[group] = filling
        if not batches:
            filling.close()
        return group

    def _reference(self, request: RunRequest, plan: Plan, model: OpenedModel, folder: Path) -> str:
        """The group that makes what the cell is measured against; every cell adds the arithmetic that it needs."""
        text = plan.profile.validate
        group = f"reference of {model.name}, {text.windows} x {text.length} tokens"
        as_runtime = plan.artifacts[0].format.prover == "llama.cpp"
        known = self._groups.get(group)
        wanted = {as_runtime, *(known[0].arguments[1] if known else ())}
        first = known[0].arguments[0] if known else request
        self._groups[group] = [Job(group, folder, work.refer, (first, tuple(sorted(wanted))), group=group)]
        return group


class _Filling:
    """A store that workers fill: data.bin is theirs, the journal is this process's."""

    def __init__(self, store: Store, steps: tuple[Step, ...]) -> None:
        self.store, self._steps = store, steps
        self._writing = ExitStack()
        self._writing.callback(store.release)
        self._writing.enter_context(store.writing())

    def batches(self) -> Iterator[tuple[tuple[str, int], ...]]:
        """What the store lacks, in order."""
        batch: list[tuple[str, int]] = []
        nbytes, enough = 0, min(_BATCH_BYTES, sum(step.stored_bytes for step in self._steps) // _BATCHES)
        for step, leaf in tasks(self._steps):
            if self.store.has(step, leaf):
                continue
            start, stop = leaf_range(step.spec.shape, leaf)
            batch.append((step.name, leaf))
            nbytes += step.stored_bytes * (stop - start) // step.spec.shape[0]
            if nbytes >= enough:
                yield tuple(batch)
                batch, nbytes = [], 0
        if batch:
            yield tuple(batch)

    def take(self, records: list[dict[str, object]]) -> None:
        """Commit what a worker wrote. The last of it makes the journal durable: other machines read it next."""
        for record in records:
            self.store.record(record)
        if self.store.complete(self._steps):
            self.close()

    def close(self) -> None:
        self._writing.close()
