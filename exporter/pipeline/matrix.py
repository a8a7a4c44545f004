"""The matrix of all cells: as GitHub reads it, and made here one after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from exporter.errors import Refused, UsageError, did_you_mean
from exporter.pipeline.cells import Cell, CellResult, PlannedCell, Settings, run_cell
from exporter.pipeline.progress import Progress
from exporter.pipeline.publish_artifact import ROOT_ONLY
from exporter.types.profile import Hardware
from exporter.types.sizes import format_size

MOST_CELLS = 256  # jobs that GitHub makes of one matrix
_REPOSITORIES = {"gguf": "GGUF", "onnx": "ONNX", "tensorrt": "TensorRT", "mxfp4": "MXFP4"}

HOSTED = ("ubuntu-latest",)
# What a hosted runner has for a job: https://docs.github.com/actions/reference/runners/github-hosted-runners
_HOSTED_MEMORY, _HOSTED_DISK = 16 * 10**9, 14 * 10**9
# Labels of our own machines by the memory of their GPU, the smallest first.
_MACHINES = ((16 << 30, ("self-hosted", "gpu", "16gb")), (80 << 30, ("self-hosted", "gpu", "80gb")))


# As GitHub reads it


@dataclass(frozen=True)
class Job:
    """A cell as a job. runs_on: labels of its runner; repo: where it is published, "" where another cell is instead."""

    cell: Cell
    runs_on: tuple[str, ...]
    repo: str

    def json(self) -> dict[str, Any]:
        cell = self.cell
        return {
            "cell": cell.name,
            "model": cell.model,
            "profile": cell.profile,
            "format": cell.format,
            "recipe": cell.recipe,
            "target": cell.target,
            "runs_on": list(self.runs_on),
            "repo": self.repo,
        }


def jobs(cells: Sequence[PlannedCell], hosted: bool = False) -> list[Job]:
    """One for each cell. hosted: all on GitHub's own runners, whatever hardware they are for.

    Raises UsageError for a profile that no runner holds.
    """
    repositories = _repositories(cells)
    return [Job(c.cell, HOSTED if hosted else runner_of(c), repositories[c.cell]) for c in cells]


def include(found: Sequence[Job]) -> dict[str, Any]:
    """What GitHub's `strategy.matrix` takes. Raises UsageError for more cells than it does."""
    if len(found) > MOST_CELLS:
        raise UsageError(
            f"{len(found)} cells are more than the {MOST_CELLS} that GitHub takes",
            hint="--profile, --format or CELL take fewer",
        )
    return {"include": [job.json() for job in found]}


def runner_of(planned: PlannedCell) -> tuple[str, ...]:
    """Labels of the smallest runner that holds the profile's memory; hosted where a CPU profile's cell fits on one."""
    hardware: Hardware = planned.plan.profile.hardware
    if hardware.device == "cpu" and _fits_hosted(planned):
        return HOSTED
    for memory, labels in _MACHINES:
        if hardware.memory <= memory:
            return labels
    raise UsageError(
        f"no runner has the {format_size(hardware.memory)} of profile {planned.plan.profile.name}",
        hint="leave the profile out with --profile NAME, or --runner hosted",
    )


def _fits_hosted(planned: PlannedCell) -> bool:
    artifact = planned.artifact
    source = sum(s.source.row_bytes(1 << 20) * s.spec.elements >> 20 for s in artifact.steps)
    disk = source + planned.plan.store_bytes() + artifact.nbytes
    return artifact.fit.total <= _HOSTED_MEMORY and disk <= _HOSTED_DISK


def _repositories(cells: Sequence[PlannedCell]) -> dict[Cell, str]:
    """Where each is published.

    What lies in a repository's root is published by the first of the cells that make the same files, and those of
    another recipe in a repository of their own.
    """
    found: dict[Cell, str] = {}
    roots: dict[str, Cell] = {}
    for each in cells:
        cell, name = each.cell, f"{each.cell.model_name}-{_suffix(each)}"
        if cell.format in ROOT_ONLY:
            if roots.setdefault(name, cell).recipe != cell.recipe:
                name = f"{name}-{cell.recipe}"
            if roots.setdefault(name, cell) != cell:
                name = ""
        found[cell] = name
    return found


def _suffix(planned: PlannedCell) -> str:
    """What people call a repository of this format; of integers, with their bits."""
    form = planned.cell.format
    bits = min((s.scheme.bits for s in planned.artifact.steps if s.scheme.kind == "int"), default=16)
    if form == "gptq":
        return f"GPTQ-Int{bits}"
    return f"W{bits}A16" if form == "compressed-tensors" else _REPOSITORIES.get(form, form)


def chosen(
    cells: Sequence[PlannedCell], names: Sequence[str], left_out: Mapping[str, str] = MappingProxyType({})
) -> list[PlannedCell]:
    """Those that `names` mean, each a name or a pattern with *; all where there is none.

    left_out: why a cell is none of them, by name. Raises UsageError for a name that means no cell, Refused for one that
    was left out.
    """
    known = [each.cell.name for each in cells]
    for name in names:
        if any(_means(name, each) for each in known):
            continue
        if name in left_out:
            raise Refused(left_out[name], hint="`exporter matrix --table` lists the cells that fit")
        raise UsageError(
            f'there is no cell "{name}".{did_you_mean(name, known)}',
            hint="`exporter matrix --table` lists them; --model names another model than the profiles' own",
        )
    return [c for c in cells if not names or any(_means(name, c.cell.name) for name in names)]


def _means(name: str, cell: str) -> bool:
    """Whether a name or a pattern is of a cell; the folder of a model may have brackets in its name."""
    return name == cell or fnmatchcase(cell, name)


# Here


class _OfCell(Progress):
    """Says of which cell a stage is."""

    def __init__(self, progress: Progress, of: str) -> None:
        self._progress, self._of = progress, of

    def stage(self, name: str, total: int, unit: str = "B") -> None:
        self._progress.stage(f"{self._of}: {name}", total, unit)

    def advance(self, amount: int, label: str = "") -> None:
        self._progress.advance(amount, label)

    def done(self) -> None:
        self._progress.done()


def run_cells(
    cells: Sequence[Cell],
    settings: Settings,
    progress: Progress,
    executor: str = "local",
    address: str | None = None,
    told: Callable[[CellResult], None] = lambda result: None,
) -> list[CellResult]:
    """Make and prove cells, each by itself: one that fails does not stop the others.

    executor: "local", in order in this process, or "ray", on the cluster at `address`. told: hears of each as it ends.
    """
    if executor == "ray":
        from exporter.pipeline.cluster import run_on_ray

        return run_on_ray(cells, settings, progress, address, told)
    results = []
    for number, cell in enumerate(cells, 1):
        of = f"{number}/{len(cells)} {cell.profile_name}/{cell.artifact}"
        results.append(run_cell(cell, settings, _OfCell(progress, of)))
        told(results[-1])
    return results


def exit_code(statuses: Sequence[str]) -> int:
    """0: all passed; 1: something went wrong; else 3: a gate failed."""
    found = set(statuses)
    if "error" in found:
        return 1
    return 3 if "gate failed" in found else 0
