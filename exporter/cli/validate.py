"""exporter validate: prove an artifact that is there, or look at ONNX graphs by TensorRT's rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from exporter.cli import options
from exporter.cli.failures import stoppable
from exporter.cli.output import print_json, print_table, progress, say
from exporter.cli.result import answer, say_engines


@click.command()
@click.argument("artifact", metavar="PATH", type=click.Path(path_type=Path))
@click.option("--model", metavar="MODEL", help="The checkpoint, a folder or a Hub id, where PATH does not say.")
@click.option("-p", "--profile", metavar="NAME|FILE", help="Another profile than the one that PATH says.")
@click.option(
    "--recipe", metavar="NAME|FILE", help="The recipe, where neither PATH's name nor the profile leads to it."
)
@options.context
@options.text
@click.option(
    "--controls",
    is_flag=True,
    help="Also prove a copy with each of eight known mistakes: some gate must fail. Takes its time, and room.",
)
@options.device
@click.option(
    "--sm", "sms", type=int, multiple=True, metavar="N", help="Graphs: only this GPU (89 for 8.9). Repeatable."
)
@click.option("--engines", is_flag=True, help="Graphs: build engines of profiles.json's shapes too.")
@options.quiet
@options.as_json
def command(
    artifact: Path,
    model: str | None,
    profile: str | None,
    recipe: str | None,
    context: int | None,
    text: str | None,
    controls: bool,
    device: str,
    sms: tuple[int, ...],
    engines: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Prove an artifact that is there already.

    PATH is a folder that `exporter quantize` made: its files must be as SHA256SUMS says, every tensor is
    unpacked and compared, and it is run in its real runtime against the checkpoint that it was made of.
    Nothing is quantized; report.json, report.md and report.html are written anew. Exit code 3 when a gate fails.

    PATH may also be an .onnx file, or a folder with some, of any tool: they are looked at by the rules
    of TensorRT's parser, for each GPU. Exit code 3 when a graph breaks one.

    \b
    Examples:
      exporter validate artifacts/gpt-oss-20b/16gb/gguf-mxfp4-q8
      exporter validate artifacts/my-fine-tune/cpu/onnx-exact-q8-cpu --model ./my-fine-tune
      exporter validate ./model.onnx --sm 89 --sm 120
    """
    from exporter.errors import UsageError
    from exporter.pipeline.graphs import find_graphs, judge

    graphs = find_graphs(artifact)
    ours = {"--model": model, "--profile": profile, "--recipe": recipe, "--context": context}
    ours |= {"--text": text, "--controls": controls}
    theirs = {"--sm": sms, "--engines": engines}
    if wrong := next((name for name, value in (theirs if graphs is None else ours).items() if value), None):
        kind = "is an artifact of exporter's" if graphs is None else "is no artifact of exporter's"
        raise UsageError(f"{artifact} {kind}, which {wrong} is not for", hint="exporter validate --help")
    if graphs is None:
        from exporter.pipeline.validate import Ask, validate

        ask = Ask(artifact, model, profile, recipe, context, device, text, controls)
        return answer(lambda watch: validate(ask, watch), quiet, as_json)
    stoppable()
    report = judge(artifact, graphs, sms, engines, progress(quiet or as_json))
    if as_json:
        print_json(report)
    else:
        _show(report)
    return 3 if report["status"] == "gate failed" else 0


def _show(report: dict[str, Any]) -> None:
    """A row for each graph and verdict; below, what was found, once for all nodes of which it is true."""
    rows = [(graph["graph"], *row) for graph in report["graphs"] for row in _verdicts(graph)]
    print_table(("graph", "GPUs", "by TensorRT's rules"), rows, report["path"])
    many = len(report["graphs"]) > 1
    found = [(*_said(each), graph["graph"] if many else "") for graph in report["graphs"] for each in _alike(graph)]
    if found:
        print_table(("", "finding", "where", ""), found)
    if report["engines"]:
        say_engines("", report["engines"])
    for reason in report["not_run"].values():
        say(f"not run: {reason}")


def _verdicts(graph: dict[str, Any]) -> list[tuple[str, str]]:
    by_reason: dict[str, list[str]] = {}
    for each in graph["sms"]:
        by_reason.setdefault("ok" if each["builds"] else f"FAIL {each['reason']}", []).append(f"SM{each['sm']}")
    return [(" ".join(sms), reason) for reason, sms in by_reason.items()]


def _alike(graph: dict[str, Any]) -> list[list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for each in graph["findings"]:
        groups.setdefault((each["fatal"], each["problem"], tuple(each["sms"])), []).append(each)
    return list(groups.values())


def _said(alike: list[dict[str, Any]]) -> tuple[str, str, str]:
    first, more = alike[0], len(alike) - 1
    where = first["where"] + (f"\nand {more:,} more" if more else "")
    return "error" if first["fatal"] else "warning", first["problem"], where
