"""The gate before publishing: the proofs of all cells side by side, and files that must be those that were proved."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import exporter
from exporter.errors import ExporterError, Refused
from exporter.pipeline.cells import Cell, PlannedCell, Settings, request_of
from exporter.pipeline.files import write_whole
from exporter.pipeline.judge import verdicts
from exporter.pipeline.progress import Progress
from exporter.pipeline.publish import PublishAsk, Published, plan_publish, publish
from exporter.pipeline.publish_artifact import ROOT_ONLY
from exporter.pipeline.report import write_pages
from exporter.pipeline.run import Run
from exporter.pipeline.seal import OWN_CAP, REPORTS, proof_of, require_sealed, seal_proof, verdict

PROOF = ("manifest.json", "provenance.json", *REPORTS, "SHA256SUMS")  # what an artifact's proof is, without its data
# What a file that anybody may have written can make of code that reads it.
_DAMAGED = (ExporterError, OSError, LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError)
Verdict = Literal["passed", "missing", "gate failed", "inconsistent"]


@dataclass(frozen=True)
class Proved:
    """What a job uploaded of a cell: the folder, manifest.json and report.json."""

    folder: Path
    manifest: Mapping[str, Any]
    report: Mapping[str, Any]

    @property
    def cell_name(self) -> str:
        """Of the cell that the files say they are, wherever they lie."""
        of, artifact = self.manifest, [self.manifest["format"], self.manifest["recipe"]["name"]]
        artifact += [of["target"]] if of["target"] else []
        return f"{of['model']}/{self.report['profile']['name']}/{'-'.join(artifact)}"


@dataclass(frozen=True)
class Checked:
    """The verdict on one cell. problems: why it is not "passed", in words."""

    cell: Cell
    verdict: Verdict
    problems: tuple[str, ...] = ()
    proved: Proved | None = None


def check(cells: Sequence[PlannedCell], folder: Path) -> list[Checked]:
    """Look at the proof of every planned cell under `folder`, at any depth. Reads no weights.

    Each must be there once, sealed, of this version, recipe and profile, and passed, with every gate that those ask for
    and no other verdict than its figures give; cells of one model must be of the same source files, those of a recipe
    without calibration of the same numbers.
    """
    if not folder.is_dir():
        raise Refused(f"{folder} is no folder", hint="--check FOLDER: what the jobs of all cells uploaded")
    found: dict[str, list[Proved]] = {}
    for each in _proofs(folder):
        found.setdefault(each.cell_name, []).append(each)
    usual = _usual([each for several in found.values() for each in several])
    return [_checked(cell, found.get(cell.cell.name, []), usual) for cell in cells]


def _proofs(folder: Path) -> Iterator[Proved]:
    for path in sorted(folder.rglob("manifest.json")):
        try:
            proved = _read(path.parent)
            hash((proved.cell_name, *_shared(proved)))
        except _DAMAGED:
            continue  # of no cell; the cell that it should be of is missing
        yield proved


def _read(folder: Path) -> Proved:
    texts = [folder / name for name in ("manifest.json", "report.json")]
    if not all(path.is_file() and path.stat().st_size <= OWN_CAP for path in texts):  # a pipe would be waited for
        raise ValueError
    manifest, report = (json.loads(path.read_bytes()) for path in texts)
    return Proved(folder, manifest, report)


def _usual(found: Sequence[Proved]) -> dict[tuple[str, ...], str]:
    """By ("source files", model) and ("numbers", model, recipe): what most cells are made of; "" where none leads."""
    counts: dict[tuple[str, ...], Counter[str]] = {}
    for each in found:
        for key, value in _shared(each):
            counts.setdefault(key, Counter())[value] += 1
    return {key: _most(counter.most_common(2)) for key, counter in counts.items()}


def _most(two: Sequence[tuple[str, int]]) -> str:
    return "" if len(two) == 2 and two[0][1] == two[1][1] else two[0][0]


def _shared(each: Proved) -> Iterator[tuple[tuple[str, ...], str]]:
    """What must be equal in cells that are made of the same."""
    manifest = each.manifest
    yield ("source files", manifest["model"]), json.dumps(manifest["source"].get("files"), sort_keys=True)
    if manifest.get("calibration") is None:  # else the device that calibrated decides as well
        recipe = manifest["recipe"]
        yield ("numbers", manifest["model"], recipe["name"]), str(manifest.get("digest"))


def _checked(planned: PlannedCell, found: Sequence[Proved], usual: Mapping[tuple[str, ...], str]) -> Checked:
    cell = planned.cell
    if not found:
        return Checked(cell, "missing", ("no manifest.json and report.json of it",))
    first = found[0]
    try:
        problems = [*_inconsistent(planned, first), *_misjudged(planned, first), *_unusual(first, usual)]
        failed = [_gate(gate) for gate in first.report["gates"] if not gate["passed"]]
        _figures(first.report)
    except _DAMAGED as error:
        problems, failed = [f"its report is damaged: {type(error).__name__} {error}"], []
    if len(found) > 1:
        problems.append(f"it is there {len(found)} times: {', '.join(str(each.folder) for each in found)}")
    if problems:
        return Checked(cell, "inconsistent", tuple(problems), first)
    if failed or first.report["status"] != "passed":
        return Checked(cell, "gate failed", tuple(failed) or ("no gate was judged",), first)
    return Checked(cell, "passed", (), first)


def _gate(gate: Mapping[str, Any]) -> str:
    value, limit = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in (gate["value"], gate["limit"]))
    return f"{gate['name']} {value} (limit {limit})"


def _inconsistent(planned: PlannedCell, proved: Proved) -> Iterator[str]:
    """What manifest.json, report.json and the plan do not agree on."""
    manifest, report = proved.manifest, proved.report
    try:
        require_sealed(proved.folder)
    except (ExporterError, OSError):
        yield "manifest.json, provenance.json and SHA256SUMS do not belong together"
    proof = proof_of(manifest)
    if proof is None:
        yield "manifest.json holds no proof"
    elif proof != verdict(report):
        yield "manifest.json and report.json are of two proofs"
    if report["subject"]["digest"] != manifest["digest"]:
        yield "report.json is of other numbers than manifest.json"
    versions = {manifest["exporter"], report["made"]["exporter"]} - {exporter.__version__}
    if versions:
        yield f"made or proved by exporter {', '.join(sorted(versions))}, not {exporter.__version__}"
    if report["profile"]["sha256"] != planned.plan.profile.sha256:
        yield f"proved for another profile {report['profile']['name']} than the one that is here"
    if manifest["recipe"]["sha256"] != planned.artifact.recipe.sha256:
        yield f"made by another recipe {manifest['recipe']['name']} than the one that is here"


def _misjudged(planned: PlannedCell, proved: Proved) -> Iterator[str]:
    """Where the report's verdict is not the one that its figures have under the limits that are here."""
    report, asked = proved.report, planned.artifact.recipe.gates
    told = {gate["name"]: (gate["value"], gate["limit"], gate["passed"]) for gate in report["gates"]}
    limits = {name: limit for name, (_, limit, _) in told.items()}  # with those of the format
    limits |= {**planned.plan.profile.gates.of(report["subject"]["class"]), **asked}
    for each in verdicts(report, limits):
        if told.get(each.name) != (each.value, each.limit, each.passed):
            yield f"its gate {each.name} is not judged as its figures are"


def _unusual(proved: Proved, usual: Mapping[tuple[str, ...], str]) -> Iterator[str]:
    for key, value in _shared(proved):
        if usual[key] != value:
            yield f"its {key[0]} are not those of the other cells of {' with recipe '.join(key[1:])}"


# The files behind an approved proof


def approved(cells: Sequence[PlannedCell], folder: Path) -> dict[Cell, Proved]:
    """The proofs of `cells` under `folder`. Raises Refused for a cell whose proof is missing or not passed."""
    found: dict[Cell, Proved] = {}
    for each in check(cells, folder):
        if each.proved is None or each.verdict != "passed":
            raise Refused(
                f"{each.cell.name} is not approved: {each.verdict}, {'; '.join(each.problems)}",
                hint="`exporter matrix --check FOLDER` looks at all cells",
            )
        found[each.cell] = each.proved
    return found


def make_approved(planned: PlannedCell, proved: Proved, settings: Settings, progress: Progress) -> Path:
    """The folder of a cell with the files that were proved elsewhere, made here where they are not, and that proof.

    Of what came along only report.json is taken: all else follows from it and from what is made here. Raises Refused
    where that is not what was proved: other bytes, another source.
    """
    run = Run(replace(request_of(planned.cell, settings), until="export"), progress)
    (made,) = run.run().artifacts
    assert made.path is not None
    with run.maker.alone():
        run.maker.seal(made.path, [path.relative_to(made.path).as_posix() for path in made.files])
        here = json.loads((made.path / "manifest.json").read_bytes())
        if different := next(_different(here, proved.manifest), None):
            raise Refused(
                f"{made.path / different[0]} is not {different[1]}",
                hint="numbers that are calibrated follow the device: publish where the cell was made",
            )
        write_whole(made.path / "report.json", (proved.folder / "report.json").read_text(encoding="utf-8"))
        write_pages(made.path, proved.report)
        seal_proof(made.path, proved.report)
    return made.path


def _different(here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(file, what it is not) for what two manifests say differently. Versions may differ where bytes do not."""
    for name in sorted(here["files"].keys() | there["files"].keys()):
        if here["files"].get(name) != there["files"].get(name):
            yield name, "the file that was proved: its bytes differ"
    for key in sorted((here.keys() | there.keys()) - {"proof", "versions"}):
        if here.get(key) != there.get(key):
            yield "manifest.json", f'the one that was proved: "{key}" differs'


def publish_cell(
    planned: PlannedCell,
    proved: Proved,
    settings: Settings,
    repo: str,
    progress: Progress,
    private: bool = False,
    tag: str = "",
) -> Published:
    """Make an approved cell and put it on the Hub, in a folder that names its profile, if not at the root.

    Other profiles make an artifact of the same name, with another proof and, but for GGUF, other bytes.
    """
    folder, cell = make_approved(planned, proved, settings, progress), planned.cell
    inside = "" if cell.format in ROOT_ONLY else f"{cell.profile_name}-{cell.artifact}"
    ask = PublishAsk(artifacts=(folder,), repo=repo, private=private, tag=tag, folder=inside)
    return publish(plan_publish(ask, progress), progress)


# For people


def summary(found: Sequence[Checked]) -> str:
    """All verdicts as Markdown."""
    passed = sum(each.verdict == "passed" for each in found)
    lines = [f"### {passed} of {len(found)} cells passed", ""]
    lines += ["| cell | verdict | class | KL | top-1 | on its target |", "|---|---|---|---|---|---|"]
    for each in found:
        cells = (" ".join(cell.split()).replace("|", "\\|") for cell in row_of(each))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def row_of(checked: Checked) -> tuple[str, ...]:
    """cell, verdict, class, KL, top-1, whether it ran on its target."""
    verdict = "ok" if checked.verdict == "passed" else f"FAIL {checked.verdict}: {'; '.join(checked.problems)}"
    readable = checked.proved is not None and checked.verdict != "inconsistent"
    figures = _figures(checked.proved.report) if checked.proved and readable else ("",) * 4
    return checked.cell.name, verdict, *figures


def _figures(report: Mapping[str, Any]) -> tuple[str, ...]:
    figures, target = report["release"], report["target"]["on_target"]
    return report["subject"]["class"], f"{figures['kl_mean']:.2e}", f"{figures['top1']:.2%}", "yes" if target else "no"
