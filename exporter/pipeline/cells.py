"""Cells of the matrix: one artifact of one profile of one model, listed before any weight is read, made one by one."""

from __future__ import annotations

import functools
import json
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import exporter
from exporter.errors import ExporterError, Refused, UsageError, did_you_mean
from exporter.formats import get_format
from exporter.pipeline.artifact import Maker
from exporter.pipeline.export import layout_key
from exporter.pipeline.manifest import provenance
from exporter.pipeline.plan import ArtifactPlan, Plan, make_plan, misfit, wanted
from exporter.pipeline.profiles import load_profile, profile_names
from exporter.pipeline.progress import Progress
from exporter.pipeline.request import RunRequest
from exporter.pipeline.run import Run
from exporter.pipeline.seal import proof_of, verdict
from exporter.pipeline.source import ModelOutline, outline_model
from exporter.pipeline.validate import read_made
from exporter.types.profile import ArtifactSpec, Profile, artifact_folder
from exporter.validate import text

Status = Literal["passed", "gate failed", "error"]


@dataclass(frozen=True)
class Cell:
    """model: a folder or a Hub id; model_name: of its artifacts; profile: a name or a .toml file."""

    model: str
    model_name: str
    profile: str
    format: str
    recipe: str
    target: str = ""

    @property
    def profile_name(self) -> str:
        return Path(self.profile).stem if self.profile.endswith(".toml") else self.profile

    @property
    def artifact(self) -> str:
        """The name of its folder."""
        return artifact_folder(self.format, self.recipe, self.target)

    @property
    def name(self) -> str:
        """Its artifact's place in the output folder."""
        return f"{self.model_name}/{self.profile_name}/{self.artifact}"


@dataclass(frozen=True)
class Settings:
    """What is the same for all cells. again: prove what is proved already. The rest as in RunRequest."""

    out: Path = RunRequest.out
    max_memory: int = RunRequest.max_memory
    device: str = RunRequest.device
    again: bool = False


@dataclass(frozen=True)
class PlannedCell:
    """A cell, and the plan whose one artifact it is."""

    cell: Cell
    plan: Plan

    @property
    def artifact(self) -> ArtifactPlan:
        return self.plan.artifacts[0]


@dataclass(frozen=True)
class CellResult:
    """What became of a cell. done: whether it was finished before. error: message, hint and exit_code."""

    cell: Cell
    status: Status
    path: str | None = None
    seconds: float = 0.0
    done: bool = False
    report: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None

    def json(self) -> dict[str, Any]:
        """Without the report, of which only the figures that are compared."""
        row = {"cell": self.cell.name, **asdict(self.cell), "status": self.status, "path": self.path}
        row |= {"seconds": round(self.seconds, 3), "done_before": self.done}
        if self.error is not None:
            row["error"] = dict(self.error)
        if self.report is not None:
            release = self.report["release"]
            row |= {"class": self.report["subject"]["class"], "bytes": self.report["subject"]["bytes"]}
            row["metrics"] = {key: release[key] for key in ("kl_mean", "kl_p99", "top1", "ppl_ratio")}
            row["gates"] = self.report["gates"]
            row["on_target"] = self.report["target"]["on_target"]
        return row


LeftOut = Callable[[Cell, str], None]


def _unsaid(cell: Cell, reason: str) -> None:
    pass


# Which there are


def cells(
    models: Sequence[str] = (),
    profiles: Sequence[str] = (),
    formats: Sequence[str] = (),
    targets: Sequence[str] = (),
    left_out: LeftOut = _unsaid,
) -> list[Cell]:
    """The cells of `planned`."""
    return [each.cell for each in planned(models, profiles, formats, targets, left_out)]


def planned(
    models: Sequence[str] = (),
    profiles: Sequence[str] = (),
    formats: Sequence[str] = (),
    targets: Sequence[str] = (),
    left_out: LeftOut = _unsaid,
) -> list[PlannedCell]:
    """Every artifact of the profiles (none named: all) for each of the models (none named: each profile's own).

    formats, targets: only those, where any is named. What a format cannot hold or the profile's hardware cannot run
    is left out, and `left_out` told why. No weight is read. Raises UsageError for unknown names, and where nothing is
    left.
    """
    loaded = [(name, load_profile(name)) for name in dict.fromkeys(profiles or profile_names())]
    for name in formats:
        get_format(name)
    known = sorted({spec.target for _, profile in loaded for spec in profile.artifacts if spec.target})
    if unknown := next((target for target in targets if target not in known), None):
        raise UsageError(
            f'no profile asked for makes anything for target "{unknown}".{did_you_mean(unknown, known)}',
            hint=f"targets: {', '.join(known) or 'none'}",
        )
    named = dict.fromkeys(models) or dict.fromkeys(profile.model for _, profile in loaded)
    outlines = {model: outline_model(model) for model in named}
    _require_names(outlines)
    found: list[PlannedCell] = []
    reasons: list[str] = []
    for model, outline in outlines.items():
        for name, profile in loaded:
            if not models and profile.model != model:
                continue
            for spec in profile.artifacts:
                if (formats and spec.format not in formats) or (targets and spec.target not in targets):
                    continue
                each = _planned(model, outline, name, profile, spec)
                if isinstance(each, PlannedCell):
                    found.append(each)
                else:
                    left_out(*each)
                    reasons.append(each[1])
    if not found:
        raise UsageError(
            f"there is no such cell{f': {reasons[0]}' if reasons else ''}",
            hint="`exporter profiles` shows what each profile makes",
        )
    return found


def _planned(
    model: str, outline: ModelOutline, name: str, profile: Profile, spec: ArtifactSpec
) -> PlannedCell | tuple[Cell, str]:
    """The cell of one artifact, or the reason why there is none."""
    targets = (spec.target,) if spec.target else ()
    if wanted(profile, (spec.format,), targets, None) != [spec]:
        raise UsageError(
            f"profile {profile.name} makes more than one {spec.format} without a target",
            hint='a cell is one artifact: give each a target = "name"',
        )
    cell = Cell(model, outline.name, name, spec.format, spec.recipe, spec.target)
    only = replace(profile, artifacts=(spec,))
    try:
        plan = make_plan(outline.name, outline.config, outline.scheme_of, only, formats=(spec.format,))
    except Refused as refused:
        return cell, refused.message
    cell = replace(cell, recipe=plan.artifacts[0].recipe.name)
    if too_large := misfit(plan):
        return cell, too_large.message
    return PlannedCell(cell, plan)


def _require_names(outlines: Mapping[str, ModelOutline]) -> None:
    names: dict[str, str] = {}
    for model, outline in outlines.items():
        if (other := names.setdefault(outline.name, model)) != model:
            raise UsageError(
                f"{other} and {model} are both called {outline.name}: their artifacts would take one place",
                hint="rename one folder, or take one model at a time",
            )


# One of them


def request_of(cell: Cell, settings: Settings) -> RunRequest:
    """The main job restricted to a cell's artifact."""
    return RunRequest(
        model=cell.model,
        profile=cell.profile,
        formats=(cell.format,),
        targets=(cell.target,) if cell.target else (),
        out=settings.out,
        max_memory=settings.max_memory,
        device=settings.device,
    )


def run_cell(cell: Cell, settings: Settings, progress: Progress, maker: type[Maker] = Maker) -> CellResult:
    """Make and prove a cell, or find it finished. What fails is the result's `error`; Ctrl-C is raised."""
    started = time.monotonic()
    try:
        if settings.again:  # a job that breaks off, wherever, must not leave a proof that looks like its own
            (settings.out / cell.name / "report.json").unlink(missing_ok=True)
        run = Run(request_of(cell, settings), progress, maker=maker)
        report = None if settings.again else finished(run)
        done = report is not None
        if report is None:
            report = run.run().artifacts[0].report
        path = run.maker.folder_of(run.plan.artifacts[0])
    except Exception as error:  # whatever it is: others are still to be made
        if os.environ.get("EXPORTER_DEBUG"):
            traceback.print_exc()
        return CellResult(cell, "error", seconds=time.monotonic() - started, error=described(error))
    return CellResult(cell, report["status"], str(path), time.monotonic() - started, done, report)


def described(error: Exception) -> dict[str, Any]:
    """message, hint and exit_code of what went wrong."""
    if isinstance(error, ExporterError):
        return {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}
    if isinstance(error, MemoryError):
        return {"message": "out of memory", "hint": "--max-memory makes the pieces smaller", "exit_code": 1}
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return {"message": f"{where}{error.strerror or error}", "hint": None, "exit_code": 1}
    what = f"internal error: {type(error).__name__}: {error}".splitlines()[0][:300]
    return {"message": what, "hint": "EXPORTER_DEBUG=1 shows where; please report it", "exit_code": 1}


def finished(run: Run) -> dict[str, Any] | None:
    """The report of a run's one artifact, where it was made, sealed and passed its proof already.

    By this version, as the same command would, of this checkpoint and layout, for this profile, on the text that is
    measured on here; its files are as long as they were. A proof with a gate that failed is done again: whoever repeats
    it has changed something.
    """
    (artifact,), maker = run.plan.artifacts, run.maker
    folder, profile = maker.folder_of(artifact), run.plan.profile
    try:
        made = read_made(folder)
        report: dict[str, Any] = json.loads((folder / "report.json").read_bytes())
        passed = (
            report["status"] == "passed"
            and proof_of(made.body) == verdict(report)
            and report["made"]["exporter"] == made.exporter == exporter.__version__
            and report["profile"] == {"name": profile.name, "sha256": profile.sha256}
            and report["subject"]["digest"] == made.digest
            and made.recipe_sha256 == artifact.recipe.sha256
            and made.body["command"] == run.request.artifact_command(run.model.named, profile, artifact.spec)
        )
    except (ExporterError, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    if not passed or report["text"]["sha256"] != _text_measured_on():
        return None
    layouts = artifact.format.layout(maker.job(artifact, provenance(maker.model, artifact)))
    same = layout_key(layouts) == made.layout and maker.source_hashes(maker.sources()) == made.sources
    return report if same else None


@functools.cache
def _text_measured_on() -> str:
    return text.standard_library().sha256
