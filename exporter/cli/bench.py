"""exporter bench: how fast an artifact runs here, and in how much memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from exporter.cli import options
from exporter.cli.output import print_json, print_table, progress, say


class Threads(click.ParamType[int]):
    """A count, or "auto" (0)."""

    name = "threads"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if value == "auto":
            return 0
        return click.IntRange(1, 1024).convert(value, param, ctx)


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--prompt", type=click.IntRange(2), default=512, show_default=True, help="Tokens of the prompt, prefilled at once."
)
@click.option("--tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens to generate after it.")
@click.option("--repeats", type=click.IntRange(1, 100), default=3, show_default=True, help="Runs of each.")
@click.option("--threads", type=Threads(), default="auto", show_default=True, help="Threads of the runtime, or auto.")
@click.option(
    "--provider", metavar="NAME", default="auto", show_default=True, help="Where to run: auto, cpu, cuda, webgpu."
)
@options.quiet
@options.as_json
def command(
    artifact: Path, prompt: int, tokens: int, repeats: int, threads: int, provider: str, quiet: bool, as_json: bool
) -> None:
    """Measure the speed and the memory of an artifact on this machine.

    ARTIFACT is a folder that `exporter quantize` made (ONNX or GGUF), any folder for onnxruntime-genai, an
    .onnx graph with a KV cache, or a .gguf. Each runtime works in a process of its own, with weights as
    shipped. Rates are medians with the slowest and the fastest run; peak memory is the process's.
    What a runtime cannot run is listed with the reason.

    \b
    Examples:
      exporter bench artifacts/gpt-oss-20b/cpu/onnx-exact-q8-cpu
      exporter bench ./model.gguf --prompt 128 --tokens 32 --threads 4
    """
    from exporter.pipeline.bench import Ask, bench, find_subject

    ask = Ask(prompt=prompt, generate=tokens, repeats=repeats, threads=threads, provider=provider)
    report = bench(find_subject(artifact), ask, progress(as_json or quiet))
    if as_json:
        print_json(report)
        return
    title = f"{report['artifact']}: {prompt} tokens at once, then {tokens}; {report['threads']} threads"
    columns = ("runtime", "on", "load", "prefill tokens/s", "decode tokens/s", "peak memory")
    print_table(columns, [_row(run) for run in report["runs"]], title, right=(2, 3, 4, 5))
    for name, reason in report["not_run"].items():
        say(f"{name}: not run: {reason}")
    if report["load_average_before"] is not None:
        say(f"Load average before: {report['load_average_before']:.2f} on {report['usable_cpus']} processors.")


def _row(run: dict[str, Any]) -> tuple[str, ...]:
    from exporter.types.sizes import format_size

    memory = run["peak_rss_bytes"]
    return (
        f"{run['runtime']} {run['version']}",
        run["provider"],
        f"{run['load_seconds']:.1f} s",
        _rate(run["prefill"]),
        _rate(run["decode"]),
        format_size(memory) if memory else "-",
    )


def _rate(spread: dict[str, Any] | None) -> str:
    """ "12.3 (11.9 to 12.5)"; a dash where it was not measured."""
    return f"{spread['median']:.1f} ({spread['low']:.1f} to {spread['high']:.1f})" if spread else "-"
