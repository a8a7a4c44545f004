"""exporter quantize: the main job."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import click

from exporter.cli import options
from exporter.cli.output import peak_rss, print_json, print_table, progress, say
from exporter.types.sizes import format_size

# Those of pipeline.run, which is not imported for --help.
STAGES = ("plan", "quantize", "export", "validate")


@click.command()
@options.model
@options.profile
@options.formats
@options.recipe
@options.out
@click.option(
    "--until", type=click.Choice(STAGES), default="validate", show_default=True, help="Stop after this stage."
)
@options.context
@click.option(
    "--max-memory", type=options.Size(), default="4G", show_default=True, help="Ceiling for what conversion holds."
)
@click.option("--device", metavar="NAME", default="auto", show_default=True, help="For the reference: auto, cpu, cuda.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact of other numbers.")
@click.option("-n", "--dry-run", is_flag=True, help="Same as `exporter plan`.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@options.as_json
def command(
    model: str | None,
    profile: str,
    formats: tuple[str, ...],
    recipe: str | None,
    out: Path,
    until: str,
    context: int | None,
    max_memory: int,
    device: str,
    overwrite: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Quantize, export and prove: the whole job.

    MODEL is a folder or a Hub id (org/name, org/name@revision); without it, the profile's own.
    Every tensor is quantized once, packed into each of the profile's formats, unpacked again and
    compared, and the artifact is run in its real runtime against the bf16 reference.

    What is finished is never redone: after Ctrl-C, a crash or a kill, the same command goes on and
    ends with the same bytes.

    \b
    Examples:
      exporter quantize --profile 16gb openai/gpt-oss-20b
      exporter quantize --profile 16gb ./my-fine-tune --max-memory 2G
      exporter quantize --profile 80gb openai/gpt-oss-120b --until export --json
    """
    if dry_run or until == "plan":
        from exporter.cli.plan import show_plan

        return show_plan(model, profile, formats, recipe, context, as_json)
    from exporter.pipeline.profiles import load_profile
    from exporter.pipeline.run import RunRequest

    request = RunRequest(
        model=load_profile(profile).model if model is None else model,
        profile=profile,
        formats=formats,
        recipe=recipe,
        out=out,
        until=until,
        max_memory=max_memory,
        device=device,
        context=context,
        overwrite=overwrite,
    )
    return _run(request, quiet, as_json)


def _run(request: Any, quiet: bool, as_json: bool) -> int:
    """Do the job and answer; 3 when a gate failed."""
    from exporter.pipeline.run import Run

    # A job scheduler's polite stop and a lost terminal are interruptions like any other; nohup stays nohup.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    started = time.monotonic()
    result = Run(request, progress(quiet or as_json)).run()
    rows = [_row(a) for a in result.artifacts]
    seconds = time.monotonic() - started
    if as_json:
        answer = {"model": result.plan.model_name, "profile": result.plan.profile.name, "artifacts": rows}
        print_json({**answer, "peak_rss_bytes": peak_rss(), "seconds": round(seconds, 3)})
    else:
        _show(result.plan, rows, seconds)
    return 3 if any(row["status"] == "gate failed" for row in rows) else 0


def _row(result: Any) -> dict[str, Any]:
    """One artifact of the answer; keys that were not measured are absent."""
    report, plan = result.report, result.plan
    row: dict[str, Any] = {
        "format": plan.format.name,
        "recipe": plan.recipe.name,
        "target": plan.spec.target,
        "path": str(result.path) if result.path else None,
        "bytes": result.nbytes or None,
        "status": result.status,
    }
    if result.repacked[1]:
        row["repacked"] = {"exact_blocks": result.repacked[0], "blocks": result.repacked[1]}
    if report:
        row |= {
            "digests_equal": report["digests_equal"],
            "digests": report["digests"],
            "metrics": {**report["release"], "export": report["export"], "runtime": report["runtime_difference"]},
            "tokenizer_equal": report["tokenizer_equal"],
            "speed": report["speed"],
            "memory": report["memory"],
            "runtime": report["runtime"],
            "gates": report["gates"],
        }
    return row


def _show(plan: Any, rows: list[dict[str, Any]], seconds: float) -> None:
    if not any("metrics" in row for row in rows):
        for row in rows:
            size = format_size(row["bytes"]) if row["bytes"] else ""
            say(f"{row['format']}-{row['recipe']}  {row['status']}  {size}  {row['path'] or ''}".rstrip())
    else:
        columns = ("artifact", "size", "digests equal", "KL", "top-1", "tokens/s", "peak memory", "gates")
        print_table(columns, map(_cells, rows), f"{plan.model_name} for {plan.profile.name}")
    for row in rows:
        _remarks(row)
    say(f"{seconds:.1f} s, peak memory {format_size(peak_rss())}")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    m, digests = row["metrics"], row["digests"]
    speed, failed = row["speed"], [g for g in row["gates"] if not g["passed"]]
    verdict = f"ok, all {len(row['gates'])}"
    if failed:
        verdict = "FAIL " + ", ".join(f"{g['name']} {_value(g['value'])} (limit {_value(g['limit'])})" for g in failed)
    return (
        f"{row['format']}-{row['recipe']}",
        format_size(row["bytes"]),
        f"{digests['equal']} of {digests['tensors']}",
        f"{m['kl_mean']:.2e}\n{m['export']['kl_mean']:.2e} *",
        f"{m['top1']:.2%}\n{m['export']['top1']:.2%} *",
        f"prompt {speed['prefill_tokens_per_second']:.0f}\nanswer {speed['decode_tokens_per_second']:.0f}",
        format_size(row["memory"]["peak_rss_bytes"]),
        verdict,
    )


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _remarks(row: dict[str, Any]) -> None:
    """Lines under the table: what the figures are against, and what else happened."""
    if "repacked" in row:
        exact, blocks = row["repacked"]["exact_blocks"], row["repacked"]["blocks"]
        say(f"experts: {exact / blocks:.2%} of {blocks:,} blocks were on the MXFP4 grid and moved without loss")
    if "metrics" in row:
        d = row["metrics"]["runtime"]
        say("KL and top-1 against the bf16 reference as released; * against the reference as llama.cpp computes it.")
        figures = f"KL {d['kl_mean']:.2e}, top-1 {d['top1']:.2%}"
        say(f"llama.cpp's own part (it rounds the YaRN range): {figures}.")
        say(f"{row['path']}/report.json")
