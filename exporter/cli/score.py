"""exporter score: how well an artifact answers, by somebody else's harness."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal, cast

import click

from exporter.cli import options
from exporter.cli.bench import Threads
from exporter.cli.failures import stoppable
from exporter.cli.output import print_json, print_table, progress, say


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--task", "tasks", metavar="NAME[,NAME]", required=True, help="Tasks, as the harness calls them.")
@click.option(
    "--harness",
    type=click.Choice(["lm-eval", "gpt-oss-evals"]),
    default="lm-eval",
    show_default=True,
    help="Who asks and marks.",
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N questions of each task.")
@click.option("--python", metavar="PATH", default=sys.executable, help="Interpreter that has the harness.")
@click.option("--task-dir", type=click.Path(path_type=Path), metavar="DIR", help="Tasks of your own (lm-eval).")
@click.option(
    "--effort", type=click.Choice(["low", "medium", "high"]), default="medium", show_default=True, help="Of reasoning."
)
@click.option(
    "--api",
    type=click.Choice(["auto", "chat", "completions"]),
    default="auto",
    show_default=True,
    help="How lm-eval asks: written answers need chat, choices by log-probability completions.",
)
@click.option(
    "--max-tokens", type=click.IntRange(1), default=32768, show_default=True, help="Tokens of an answer, at most."
)
@click.option(
    "-c", "--context", type=click.IntRange(1), metavar="TOKENS", help="Of prompt and answer together, as in `serve`."
)
@click.option("--threads", type=Threads(), default="auto", show_default=True, help="Threads of the runtime, or auto.")
@click.option("--seconds", type=click.FloatRange(1), default=86400, show_default=True, help="Time for all of it.")
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="FILE", help="Write scores and questions here.")
@click.option(
    "--against", type=click.Path(path_type=Path), metavar="FILE", help="Another run's --out: compare with it."
)
@options.quiet
@options.as_json
def command(
    artifact: Path,
    tasks: str,
    harness: str,
    limit: int | None,
    python: str,
    task_dir: Path | None,
    effort: str,
    api: str,
    max_tokens: int,
    context: int | None,
    threads: int,
    seconds: float,
    out: Path | None,
    against: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Score an artifact in tasks, in its real runtime.

    ARTIFACT is what `exporter serve` takes. The harness runs in an environment of its own against an endpoint
    on this machine; what it needs from elsewhere (questions of a public task) it fetches itself. Beside each
    score stand the published one of the released model at that effort, and the smallest loss that so many
    questions can show: most tasks are far too small to tell two artifacts apart. Two runs of the same questions
    (--against) show much more. Scores of a folder with a report go into its report too.

    \b
    Examples:
      exporter score model.gguf --task gsm8k --limit 200 --python harness/bin/python -o a.json
      exporter score artifacts/gpt-oss-20b/16gb/gguf-mxfp4-q8 --harness gpt-oss-evals --task gpqa --effort low
    """
    from exporter.pipeline.report import add_tasks
    from exporter.pipeline.score import Ask, score

    stoppable()
    ask = Ask(
        artifact=artifact,
        tasks=[name for name in tasks.split(",") if name],
        harness=harness,
        limit=limit,
        python=python,
        task_dir=task_dir,
        effort=cast(Literal["low", "medium", "high"], effort),
        api=api,
        max_tokens=max_tokens,
        context=context or 0,
        threads=threads,
        seconds=seconds,
        out=out,
        against=against,
    )
    report = score(ask, progress(as_json or quiet))
    added = artifact.is_dir() and add_tasks(artifact, report["tasks"])
    if as_json:
        print_json(report)
    else:
        _show(report)
        if added:
            say(f"added to {artifact}/report.html")


def _show(report: dict[str, Any]) -> None:
    title = f"{report['model']} in {report['runtime']}, asked by {report['harness']['name']}"
    columns = ("task", "metric", "questions", "score", "published", "shows a loss of")
    print_table(columns, [_row(each) for each in report["tasks"]], title, right=(2, 3, 4, 5))
    for each in report["tasks"]:
        say(f"{each['task']}: {each['verdict']}.")
        if each["note"]:
            say(f"{each['task']}: {each['note']}.")
        if pair := each.get("paired"):
            say(f"{each['task']}: {_paired(pair)}.")


def _row(each: dict[str, Any]) -> tuple[str, ...]:
    error = "" if each["stderr"] is None else f" \u00b1 {100 * each['stderr']:.1f}"
    published = "-" if each["published"] is None else f"{100 * each['published']:.1f} % ({each['published_effort']})"
    metric = each["metric"].removesuffix(",none")
    return (
        each["task"],
        metric,
        f"{each['n']:,}",
        f"{100 * each['score']:.1f}{error} %",
        published,
        f"{100 * each['detects']:.1f} points" if each["detects"] < 1 else "-",
    )


def _paired(pair: dict[str, Any]) -> str:
    low, high = pair["ci95"] or (float("nan"), float("nan"))
    interval = f"95 %: {100 * low:+.2f} to {100 * high:+.2f}"
    text = f"{100 * pair['difference']:+.2f} points against {pair['against']} ({interval})"
    if pair["p"] is None:
        return text
    return f"{text}, {pair['lost']:,} lost and {pair['won']:,} won of {pair['n']:,}, p = {pair['p']:.2g}"
