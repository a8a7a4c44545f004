"""The process that leads: from cells to jobs, and from what jobs answer to results."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from exporter.errors import ExporterError, UsageError
from exporter.pipeline.artifact import alone
from exporter.pipeline.cache import cache_folder
from exporter.pipeline.cells import Cell, CellResult, Settings, described, finished, request_of
from exporter.pipeline.cluster.connect import connected, require_ray
from exporter.pipeline.cluster.dispatch import Dispatcher, Job
from exporter.pipeline.cluster.jobs import Jobs
from exporter.pipeline.cluster.machines import Machines, new_mark
from exporter.pipeline.cluster.ticket import Ticket, environment, versions
from exporter.pipeline.cluster.work import Outcome
from exporter.pipeline.profiles import load_profile
from exporter.pipeline.progress import Progress
from exporter.pipeline.run import Run
from exporter.pipeline.source import OpenedModel, open_model
from exporter.pipeline.workers import leading


def run_on_ray(
    cells: Sequence[Cell],
    settings: Settings,
    progress: Progress,
    address: str | None = None,
    told: Callable[[CellResult], None] = lambda result: None,
) -> list[CellResult]:
    """Make and prove cells on the Ray cluster at `address`, else $RAY_ADDRESS, else one of this machine alone.

    Results are in the order of `cells`, `told` hears of each as it comes; what fails is a result's error. Raises
    Refused where a machine differs from this one, or a folder is in use, and ExporterError where there is no cluster.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    require_ray(address)
    if ":" in settings.device:
        raise UsageError(f"--device {settings.device} is one machine's", hint="--device cuda takes every GPU there is")
    run = _ClusterRun({_anywhere(cell): cell for cell in cells}, settings, progress, told)
    with ExitStack() as held:
        run.open(held)
        if run.left:
            run.work(held, address)
    return run.in_order()


def _anywhere(cell: Cell) -> Cell:
    """The cell with paths that mean the same in every folder."""
    model = os.path.abspath(cell.model) if Path(cell.model).is_dir() else cell.model
    profile = os.path.abspath(cell.profile) if cell.profile.endswith(".toml") else cell.profile
    return replace(cell, model=model, profile=profile)


class _ClusterRun:
    """`given`: cells with absolute paths -> the cells that were asked for. `left`: those that are to be made."""

    def __init__(
        self, given: Mapping[Cell, Cell], settings: Settings, progress: Progress, told: Callable[[CellResult], None]
    ) -> None:
        self._given, self._out, self._progress, self._told = given, settings.out, progress, told
        self._settings = replace(settings, out=Path(os.path.abspath(settings.out)))
        self._results: dict[Cell, CellResult] = {}
        self._models: dict[str, OpenedModel] = {}

    @property
    def left(self) -> list[Cell]:
        return [cell for cell in self._given if cell not in self._results]

    def in_order(self) -> list[CellResult]:
        return [self._results[cell] for cell in self._given]

    def open(self, held: ExitStack) -> None:
        """Open every model, hold its output folder, and find the cells that are finished."""
        for text in dict.fromkeys(cell.model for cell in self._given):
            try:
                model = open_model(text, self._progress)
                if (self._settings.out / model.name).resolve() == model.checkpoint.path.resolve():
                    raise UsageError(f"{self._out / model.name} is the checkpoint itself", hint="choose another --out")
            except (ExporterError, OSError) as error:
                for cell in self._given:
                    if cell.model == text:
                        self._fail(cell, described(error))
                continue
            self._models[text] = model
            held.enter_context(alone(self._folder(text)))
        for cell in self.left:
            self._look(cell)

    def work(self, held: ExitStack, address: str | None) -> None:
        """Make what is left, on every machine of the cluster."""
        tokens = {self._folder(text): held.enter_context(leading(self._folder(text))) for text in self._models}
        cache = cache_folder("reference", self._settings.out / ".cache" / "reference").parent
        mark = new_mark(cache)
        held.callback(mark.unlink, missing_ok=True)
        ticket = Ticket(
            folders=tokens,
            checkpoints={text: model.fingerprint() for text, model in self._models.items()},
            profiles={cell.profile: load_profile(cell.profile).sha256 for cell in self.left},
            versions=versions(),
            environment=environment(),
            directory=Path.cwd(),
            cache=cache,
            device=self._settings.device,
        )
        ray = held.enter_context(connected(address))
        machines = Machines(ray, ticket, self._note)
        self._progress.stage("machines", 0)
        ticket = machines.require_alike(mark.name, self._settings.out / ".cache")
        settings = replace(self._settings, device=ticket.device)
        jobs = held.enter_context(Jobs(settings))
        for cell in self.left:
            try:
                jobs.add(cell, self._models[cell.model])
            except (ExporterError, OSError) as error:
                self._fail(cell, described(error))
        self._progress.stage("cells, and what they share", len(jobs.all), "jobs")
        Dispatcher(ray, ticket, machines, self._note).run(jobs.all, lambda job, outcome: self._take(jobs, job, outcome))
        self._progress.done()

    def _take(self, jobs: Jobs, job: Job, outcome: Outcome) -> None:
        cell = jobs.cells.get(job.name)
        if cell is None:
            jobs.take(job, outcome)
        elif outcome.error is not None:
            self._fail(cell, outcome.error)
        else:
            self._keep(cell, outcome.value)
        of = f"{len(self._results)} of {len(self._given)} cells"
        self._progress.advance(1, f"{of}, {job.name}")

    def _note(self, line: str) -> None:
        self._progress.advance(0, line)

    def _look(self, cell: Cell) -> None:
        """Take a cell that is finished as it is. What cannot be opened here may still be made elsewhere."""
        if self._settings.again or not (self._settings.out / cell.name / "report.json").exists():
            return
        try:
            run = Run(request_of(cell, self._settings), self._progress)
            report = finished(run)
        except (ExporterError, OSError):
            return
        if report is not None:
            path = str(run.maker.folder_of(run.plan.artifacts[0]))
            self._keep(cell, CellResult(cell, report["status"], path, 0.0, True, report))

    def _fail(self, cell: Cell, error: Mapping[str, object]) -> None:
        self._keep(cell, CellResult(cell, "error", error=error))

    def _keep(self, cell: Cell, result: CellResult) -> None:
        """A result as a run here has it: of the cell that was asked for, with a path as --out was given."""
        path = result.path and str(self._out / Path(result.path).relative_to(self._settings.out))
        self._results[cell] = replace(result, cell=self._given[cell], path=path)
        self._told(self._results[cell])

    def _folder(self, text: str) -> Path:
        return self._settings.out / self._models[text].name
