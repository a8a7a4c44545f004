"""exporter matrix: every artifact of every profile, for GitHub's matrix and for this machine."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from exporter.cli import options
from exporter.cli.failures import one_line, stoppable
from exporter.cli.output import peak_rss, print_json, print_table, progress, say
from exporter.errors import UsageError
from exporter.types.sizes import format_size

# Which options go with which of the four jobs; those of the list go with all.
_JOBS = {
    "--run": ("--again", "--executor", "--address", "--out", "--max-memory", "--device"),
    "--check": ("--summary",),
    "--publish": ("--namespace", "--approved", "--private", "--tag", "--yes", "--out", "--max-memory", "--device"),
    "the list": ("--table", "--runner", "--output"),
}


@click.command()
@click.argument("names", metavar="[CELL]...", nargs=-1)
@click.option(
    "--model", "models", metavar="MODEL", multiple=True, help="A folder or a Hub id.  [default: the profiles']"
)
@click.option(
    "-p", "--profile", "profiles", metavar="NAME|FILE", multiple=True, help="Only these profiles. Repeatable."
)
@options.formats
@options.targets
@click.option("--table", is_flag=True, help="The list for people.")
@click.option(
    "--runner",
    type=click.Choice(("auto", "hosted")),
    default="auto",
    show_default=True,
    help="Runners by hardware, or GitHub's own for all.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also append matrix=JSON and publish=JSON to FILE, as $GITHUB_OUTPUT wants it.",
)
@click.option("--run", is_flag=True, help="Make and prove the cells here.")
@click.option("--again", is_flag=True, help="With --run: prove finished cells again.")
@click.option(
    "--executor",
    type=click.Choice(("local", "ray")),
    default="local",
    show_default=True,
    help="With --run: here, one after another, or on a Ray cluster.",
)
@click.option("--address", metavar="ADDRESS", help="With --executor ray: of the cluster.  [default: a local one]")
@click.option(
    "--check",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Look at the proofs of all cells, anywhere under FOLDER.",
)
@click.option(
    "--summary",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="With --check: append a table in Markdown.",
)
@click.option("--publish", is_flag=True, help="Put approved cells on the Hub.")
@click.option("--namespace", metavar="USER", help="With --publish: whose repositories.")
@click.option(
    "--approved",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="With --publish: the proofs that --check passed.",
)
@click.option("--private", is_flag=True, help="With --publish: repositories that are made are private.")
@click.option("--tag", metavar="NAME", default="", help="With --publish: a tag for the commit.")
@click.option("-y", "--yes", is_flag=True, help="With --publish: do not ask.")
@options.out
@options.max_memory
@options.device
@options.quiet
@options.as_json
def command(
    names: tuple[str, ...],
    models: tuple[str, ...],
    profiles: tuple[str, ...],
    formats: tuple[str, ...],
    targets: tuple[str, ...],
    quiet: bool,
    as_json: bool,
    **asked: Any,
) -> int:
    """List, make and check every artifact of every profile.

    A cell is one artifact of one profile of one model, MODEL/PROFILE/ARTIFACT as it lies in OUT; CELL is such a name,
    or a pattern with *. Without --run, --check or --publish, the cells are listed as one line of JSON, which a GitHub
    workflow's fromJSON reads. What does not fit a profile's hardware is left out, and said on stderr.

    With --run one cell that fails does not stop the others, and what is finished is not done again. Exit code 3 when
    a gate failed, 1 when something else did. The list of jobs, the gate and the publishing of
    .github/workflows/artifacts.yml are this command's.

    \b
    Examples:
      exporter matrix --table
      exporter matrix --run --model ./my-fine-tune --profile 16gb
      exporter matrix --run 'gpt-oss-20b/*/gguf-*'
      exporter matrix --check reports
    """
    job = job_of(asked)
    from exporter.pipeline import matrix
    from exporter.pipeline.cells import planned

    left: dict[str, str] = {}
    every = planned(models, profiles, formats, targets, left_out=lambda c, reason: left.update({c.name: reason}))
    cells = matrix.chosen(every, names, left)
    if not quiet:
        for name, reason in left.items():
            print(one_line(f"left out: {name}: {reason}"), file=sys.stderr)
    if job == "--run":
        return _run(cells, asked, quiet, as_json)
    if job == "--check":
        return _check(cells, asked, as_json)
    wanted = {each.cell for each in cells}
    # Where a cell is published depends on the others.
    jobs = [each for each in matrix.jobs(every, asked["runner"] == "hosted") if each.cell in wanted]
    if job == "--publish":
        return _publish(cells, jobs, asked, quiet, as_json)
    _list(jobs, asked, as_json)
    return 0


def job_of(asked: dict[str, Any]) -> str:
    """Which of _JOBS is asked for. Raises UsageError for two, and for options of another."""
    named = [job for job in ("--run", "--check", "--publish") if asked[job.removeprefix("--")]]
    if len(named) > 1:
        raise UsageError(f"{named[0]} and {named[1]} are two jobs", hint="one after the other")
    job = named[0] if named else "the list"
    own = {option for several in _JOBS.values() for option in several} - set(_JOBS[job])
    for option in sorted(own):
        name = option.removeprefix("--").replace("-", "_")
        # A variable is set for several commands.
        if click.get_current_context().get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            of = [each for each, several in _JOBS.items() if option in several]
            raise UsageError(f"{option} goes with {' or '.join(of)}", hint="exporter matrix --help")
    if job == "--publish" and not (asked["namespace"] and asked["approved"]):
        raise UsageError("--publish needs --namespace USER and --approved FOLDER", hint="exporter matrix --help")
    if job == "--publish" and "/" in asked["namespace"]:
        raise UsageError(f'--namespace: "{asked["namespace"]}" is no name of a user', hint="the part before the slash")
    return job


# The list


def _list(jobs: Sequence[Any], asked: dict[str, Any], as_json: bool) -> None:
    from exporter.pipeline.matrix import include

    if asked["table"] and not as_json:
        rows = [(j.cell.name, " ".join(j.runs_on), j.repo or "with another profile's") for j in jobs]
        models = ", ".join(dict.fromkeys(job.cell.model for job in jobs))
        print_table(("cell", "runs on", "published as"), rows, f"{len(jobs)} cells of {models}")
        return
    line = json.dumps(include(jobs))
    if asked["output"]:
        published = json.dumps(include([job for job in jobs if job.repo]))
        with open(asked["output"], "a", encoding="utf-8") as f:
            f.write(f"matrix={line}\npublish={published}\n")
    say(line)


# Here


def _settings(asked: dict[str, Any]) -> Any:
    from exporter.pipeline.cells import Settings

    return Settings(asked["out"], asked["max_memory"], asked["device"], asked["again"])


def _run(cells: Sequence[Any], asked: dict[str, Any], quiet: bool, as_json: bool) -> int:
    from exporter.pipeline.matrix import exit_code, run_cells

    stoppable()
    started = time.monotonic()

    def told(result: Any) -> None:
        if not quiet:
            print(f"{result.cell.name}: {_said(result)}, {result.seconds:.1f} s", file=sys.stderr, flush=True)

    watch = progress(quiet or as_json)
    results = run_cells([c.cell for c in cells], _settings(asked), watch, asked["executor"], asked["address"], told)
    seconds = time.monotonic() - started
    if as_json:
        rows = [result.json() for result in results]
        print_json({"cells": rows, "peak_rss_bytes": peak_rss(), "seconds": round(seconds, 3)})
    else:
        columns = ("cell", "size", "KL", "top-1", "seconds", "result")
        print_table(columns, map(_row, results), right=(4,))
        for result in results:
            if result.error:
                say(one_line(f"{result.cell.name}: {result.error['message']}"))
                if result.error["hint"]:
                    say(one_line(f"  hint: {result.error['hint']}"))
        say(f"{seconds:.1f} s, peak memory {format_size(peak_rss())}")
    return exit_code([result.status for result in results])


def _said(result: Any) -> str:
    if result.status == "error":
        return one_line(f"error: {result.error['message']}")
    return f"{result.status} before" if result.done else str(result.status)


def _row(result: Any) -> tuple[str, ...]:
    seconds = f"{result.seconds:.1f}"
    if result.report is None:
        return result.cell.name, "", "", "", seconds, "error"
    figures, failed = result.report["release"], [g["name"] for g in result.report["gates"] if not g["passed"]]
    verdict = f"FAIL {', '.join(failed)}" if failed else "ok, before" if result.done else "ok"
    size = format_size(result.report["subject"]["bytes"])
    return result.cell.name, size, f"{figures['kl_mean']:.2e}", f"{figures['top1']:.2%}", seconds, verdict


# The gate


def _check(cells: Sequence[Any], asked: dict[str, Any], as_json: bool) -> int:
    from exporter.pipeline.approval import check, row_of, summary

    found = check(cells, asked["check"])
    passed = sum(each.verdict == "passed" for each in found)
    if as_json:
        rows = [{"cell": each.cell.name, "status": each.verdict, "problems": list(each.problems)} for each in found]
        print_json({"status": "passed" if passed == len(found) else "gate failed", "cells": rows})
    else:
        print_table(("cell", "verdict", "class", "KL", "top-1", "on its target"), map(row_of, found))
        say(f"{passed} of {len(found)} cells passed")
    if asked["summary"]:
        with open(asked["summary"], "a", encoding="utf-8") as f:
            f.write(summary(found))
    return 0 if passed == len(found) else 3


# The Hub


def _publish(cells: Sequence[Any], jobs: Sequence[Any], asked: dict[str, Any], quiet: bool, as_json: bool) -> int:
    from exporter.pipeline.approval import approved, publish_cell

    stoppable()
    places = {job.cell: f"{asked['namespace']}/{job.repo}" for job in jobs if job.repo}
    if not places:
        raise UsageError(
            f"the files of {jobs[0].cell.name} are those that another profile publishes",
            hint="`exporter matrix --table` shows which cell is published where",
        )
    if asked["tag"] and len(set(places.values())) < len(places):
        raise UsageError("--tag names one commit, and cells of one repository make several", hint="one CELL at a time")
    cells = [each for each in cells if each.cell in places]
    proofs = approved(cells, asked["approved"])
    if not asked["yes"]:
        if not sys.stdin.isatty():
            raise UsageError("publishing asks first, and nobody is there to answer", hint="--yes")
        if not click.confirm(f"Publish {', '.join(f'{c.name} to {repo}' for c, repo in places.items())}?", err=True):
            say("nothing was published")
            return 0
    rows, watch = [], progress(quiet or as_json)
    for each in cells:
        repo, proved = places[each.cell], proofs[each.cell]
        done = publish_cell(each, proved, _settings(asked), repo, watch, private=asked["private"], tag=asked["tag"])
        rows.append({"cell": each.cell.name, "repo": repo, "commit": done.commit, "url": done.url})
        if not as_json:
            say(f"{each.cell.name}: {done.url}")
    if as_json:
        print_json({"published": rows})
    return 0
