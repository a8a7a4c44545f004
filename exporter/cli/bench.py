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


class Counts(click.ParamType[tuple[int, ...]]):
    """Numbers of tokens: "512,2048". Each is at least `least`; one that comes twice counts once."""

    name = "tokens"

    def __init__(self, least: int) -> None:
        self._one = click.IntRange(least, 1 << 20)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        one: click.ParamType[int] = self._one
        return tuple(dict.fromkeys(one.convert(each.strip(), param, ctx) for each in str(value).split(",")))


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--prompt",
    "prompts",
    type=Counts(2),
    metavar="TOKENS,...",
    default="512,2048",
    show_default=True,
    help="Tokens of a prompt.",
)
@click.option("--tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens to generate.")
@click.option(
    "--depth",
    "depths",
    type=Counts(0),
    metavar="TOKENS,...",
    default="0,8192,32768",
    show_default=True,
    help="Tokens that come before the generated ones.",
)
@click.option("--repeats", type=click.IntRange(1, 100), default=3, show_default=True, help="Runs of each test.")
@click.option(
    "--seconds",
    type=click.FloatRange(1),
    default=600,
    show_default=True,
    help="Time for the tests of one runtime; those that would take longer are left out, and named.",
)
@click.option("--threads", type=Threads(), default="auto", show_default=True, help="Threads of the runtime, or auto.")
@click.option(
    "--provider", metavar="NAME", default="auto", show_default=True, help="Where to run: auto, cpu, cuda, webgpu."
)
@options.quiet
@options.as_json
def command(
    artifact: Path,
    prompts: tuple[int, ...],
    tokens: int,
    depths: tuple[int, ...],
    repeats: int,
    seconds: float,
    threads: int,
    provider: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Measure the speed and the memory of an artifact on this machine.

    ARTIFACT is a folder that `exporter quantize` made (ONNX or GGUF), any folder for onnxruntime-genai, an
    .onnx graph with a KV cache, or a .gguf. Each runtime works in a process of its own, with weights as
    shipped. Tests are named as llama-bench names them: pp512 is a prompt of 512 tokens, tg64 @ d8192 are 64
    tokens one by one after 8,192. Rates are means with the standard deviation over the runs; memory is the
    process's peak so far. What a machine or a runtime cannot run is listed with the reason.

    \b
    Examples:
      exporter bench artifacts/gpt-oss-20b/cpu/onnx-exact-q8-cpu
      exporter bench ./model.gguf --prompt 128 --tokens 32 --depth 0 --threads 4
    """
    from exporter.pipeline.bench import Ask, bench, find_subject

    ask = Ask(prompts, tokens, depths, repeats, seconds, threads, provider)
    report = bench(find_subject(artifact), ask, progress(as_json or quiet))
    if as_json:
        print_json(report)
        return
    title = f"{report['artifact']}: {report['threads']} threads"
    columns = ("runtime", "on", "test", "tokens/s", "a token, median", "99 %", "peak memory")
    rows = [_row(run, test) for run in report["runs"] for test in run["tests"]]
    print_table(columns, rows, title, right=(3, 4, 5, 6))
    for run in report["runs"]:
        say(_about(run))
    _say_what_is_missing(report)
    if "predicted_memory" in report:
        from exporter.types.sizes import format_size

        plan = report["predicted_memory"]
        say(f"Planned for its profile: {format_size(plan['total'])} at a context of {plan['context']:,} tokens.")
    if report["load_average_before"] is not None:
        say(f"Load average before: {report['load_average_before']:.2f} on {report['usable_cpus']} processors.")


def _row(run: dict[str, Any], test: dict[str, Any]) -> tuple[str, ...]:
    latency = test.get("latency_ms")
    return (
        f"{run['runtime']} {run['version']}",
        run["provider"],
        test["test"],
        f"{test['mean']:.2f} ± {test['sd']:.2f}" if test["sd"] is not None else f"{test['mean']:.2f}",
        *((f"{latency['median']:.3g} ms", f"{latency['p99']:.3g} ms") if latency else ("", "")),
        _size(test.get("peak_rss_bytes")),
    )


def _about(run: dict[str, Any]) -> str:
    """What a run has one of."""
    parts = [f"loaded in {run['load_seconds']:.1f} s"]
    if "ttft_seconds" in run:
        parts.append(f"first token of a prompt of {run['ttft_prompt']:,} after {run['ttft_seconds']:.3g} s")
    return f"{run['runtime']}: {', '.join(parts)}, peak memory {_size(run['peak_rss_bytes'])}"


def _say_what_is_missing(report: dict[str, Any]) -> None:
    for run in report["runs"]:
        for test, reason in run["not_run"].items():
            say(f"{run['runtime']}, {test}: not run: {reason}")
    for name, reason in report["not_run"].items():
        say(f"{name}: not run: {reason}")


def _size(n: int | None) -> str:
    from exporter.types.sizes import format_size

    return format_size(n) if n else "-"
