"""What workers do: called on any machine of the cluster, by name, with arguments that travel."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import ExporterError
from exporter.pipeline.artifact import Maker
from exporter.pipeline.before import leaves_at_once, require_disk
from exporter.pipeline.cells import Cell, CellResult, Settings, described, run_cell
from exporter.pipeline.cluster.ticket import Ticket
from exporter.pipeline.plan import ArtifactPlan, Plan
from exporter.pipeline.profiles import load_profile
from exporter.pipeline.progress import Progress
from exporter.pipeline.quantize import quantize_apart
from exporter.pipeline.request import RunRequest, plan_request
from exporter.pipeline.run import Run
from exporter.pipeline.runtimes import resolve_device
from exporter.pipeline.source import OpenedModel, open_model
from exporter.pipeline.store import Store, open_store, store_key
from exporter.pipeline.store_data import StoreData
from exporter.pipeline.workers import joined
from exporter.types.recipe import Step

_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its value, or an error of cells.described."""

    value: Any = None
    error: Mapping[str, Any] | None = None


def perform(
    ticket: Ticket, folder: Path | None, name: str, call: Callable[..., Any], arguments: Sequence[Any]
) -> Outcome:
    """Do one job in a model's output folder; `name`: of what no two workers may do at once, "" for what they may."""
    ticket.settle()
    _end_with(os.getppid())
    try:
        with joined(folder, ticket.folders[folder], name) if folder else nullcontext():
            return Outcome(call(*arguments))
    except Exception as error:  # an error is an answer too, and Ray is to tell of lost workers only
        return Outcome(error=described(error))


@functools.cache  # once in a process
def _end_with(raylet: int) -> None:
    """End this process, and what it runs, when Ray's own process on this machine has: Ray lets jobs end first."""

    def watch() -> None:
        while os.getppid() == raylet:
            time.sleep(_LOOK_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="raylet", daemon=True).start()


# Numbers


def fill(request: RunRequest, numbers: str, store: Path, leaves: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    """Make some leaves of a store whose journal is the driver's; their records. numbers: the store_key of all."""
    model, plan = _planned(request)
    steps = plan.artifacts[0].steps
    by_name = {step.name: step for step in steps}
    wanted = [(by_name[name], leaf) for name, leaf in leaves]
    _require_numbers(model, steps, numbers)
    data = StoreData(store, steps, "write")
    try:
        records = quantize_apart(data, wanted, model.checkpoint.read, leaves_at_once(request, plan))
    finally:
        data.close()
    _require_numbers(model, steps, numbers)
    return records


def _require_numbers(model: OpenedModel, steps: Sequence[Step], numbers: str) -> None:
    if store_key(model.fingerprint(), steps) != numbers:
        raise ExporterError(f"{model.checkpoint.path} changed while it was read", hint="run the same command again")


@functools.lru_cache(maxsize=2)  # a process does many jobs, mostly of one plan
def _planned(request: RunRequest) -> tuple[OpenedModel, Plan]:
    model = open_model(request.model, Progress())
    return model, plan_request(request, load_profile(request.profile), model)


class _Numbers(Maker):
    """Makes what needs calibration; the folder is held by the driver."""

    def text(self, artifact: ArtifactPlan) -> None:
        """See to it that the text is there that the artifact's recipe is calibrated on."""
        self._calibrated(artifact)

    def whole(self, artifact: ArtifactPlan) -> None:
        """Finish the artifact's store."""
        require_disk(self.request, self.plan, {}, {self.store_of(artifact): artifact})
        store = self.open_store(artifact)
        try:
            self.fill(artifact, store)
        finally:
            store.release()


def _numbers(request: RunRequest) -> tuple[_Numbers, ArtifactPlan]:
    run = Run(request, Progress(), maker=_Numbers)
    assert isinstance(run.maker, _Numbers)
    return run.maker, run.plan.artifacts[0]


def write_text(request: RunRequest) -> None:
    """Write the calibration text that the model itself writes, once for all recipes."""
    maker, artifact = _numbers(request)
    maker.text(artifact)


def calibrate(request: RunRequest) -> None:
    """Fill the store of a calibrated recipe: layer by layer, so one worker does it all."""
    maker, artifact = _numbers(request)
    maker.whole(artifact)


# What cells share


def hash_sources(request: RunRequest) -> None:
    """Hash the checkpoint's files, and remember it for all cells."""
    maker, _ = _numbers(request)
    maker.source_hashes(maker.sources())


def refer(request: RunRequest, as_runtime: Sequence[bool]) -> None:
    """Make all that cells are measured against; `as_runtime` as in Reference.further."""
    from exporter.pipeline.reference import Reference

    run, progress = Run(request, Progress(), maker=_Numbers), Progress()
    device = resolve_device(request.device)
    reference = Reference(run.model, run.plan.profile, run.maker.folder / "reference", device, progress)
    for each in as_runtime:
        reference.further(as_runtime=each)
    run.maker.require_unchanged()


# Cells


class _Cell(Maker):
    """Makes one artifact of numbers that are all there, while others read them; the folder is held by the driver."""

    def open_store(self, artifact: ArtifactPlan) -> Store:
        key, name = self._store_key(artifact), artifact.recipe.name
        return open_store(self.folder, self.model, name, artifact.steps, key, read_only=True)

    def alone(self) -> AbstractContextManager[None]:
        return nullcontext()


def make_cell(cell: Cell, settings: Settings) -> CellResult:
    """Export, seal and prove."""
    return run_cell(cell, settings, Progress(), maker=_Cell)
