"""exporter quantize: the main job."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from exporter.cli import options
from exporter.cli.failures import stoppable
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
@options.max_memory
@options.calibration
@options.device
@click.option("--overwrite", is_flag=True, help="Replace an artifact of other numbers.")
@click.option("-n", "--dry-run", is_flag=True, help="Same as `exporter plan`.")
@options.quiet
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
    calibration: str | None,
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
        calibration=calibration,
        context=context,
        overwrite=overwrite,
    )
    return _run(request, quiet, as_json)


def _run(request: Any, quiet: bool, as_json: bool) -> int:
    """Do the job and answer; 3 when a gate failed."""
    from exporter.pipeline.run import Run

    stoppable()
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
    if result.starved:
        row["starved_experts"] = result.starved
    if report:
        row |= {
            "digests_equal": report["digests_equal"],
            "digests": report["digests"],
            "metrics": {**report["release"], "export": report["export"]},
            "tokenizer_equal": report["tokenizer_equal"],
            "runtime": report["runtime"],
            "gates": report["gates"],
        }
        if "runtime_difference" in report:  # it ran in a runtime of its own
            row["metrics"]["runtime"] = report["runtime_difference"]
            row |= {"speed": report["speed"], "memory": report["memory"]}
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
    failed = [g for g in row["gates"] if not g["passed"]]
    verdict = f"ok, all {len(row['gates'])}"
    if failed:
        verdict = "FAIL " + ", ".join(f"{g['name']} {_value(g['value'])} (limit {_value(g['limit'])})" for g in failed)
    kl, top1, speed, memory = f"{m['kl_mean']:.2e}", f"{m['top1']:.2%}", "not run", "not run"
    if "runtime" in m:
        kl, top1 = f"{kl}\n{m['export']['kl_mean']:.2e} *", f"{top1}\n{m['export']['top1']:.2%} *"
        each = row["speed"]
        speed = f"prompt {each['prefill_tokens_per_second']:.0f}\nanswer {each['decode_tokens_per_second']:.0f}"
        memory = format_size(row["memory"]["peak_rss_bytes"])
    name, equal = f"{row['format']}-{row['recipe']}", f"{digests['equal']} of {digests['tensors']}"
    return name, format_size(row["bytes"]), equal, kl, top1, speed, memory, verdict


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _remarks(row: dict[str, Any]) -> None:
    """Lines under the table: what the figures are against, and what else happened."""
    if "repacked" in row:
        exact, blocks = row["repacked"]["exact_blocks"], row["repacked"]["blocks"]
        say(f"experts: {exact / blocks:.2%} of {blocks:,} blocks were on the MXFP4 grid and moved without loss")
    if starved := row.get("starved_experts"):
        more = f" and {len(starved) - 6} more (manifest.json)" if len(starved) > 6 else ""
        say(f"calibrated on tokens of other experts too, for want of their own: {', '.join(starved[:6])}{more}")
    if "metrics" not in row:
        return
    if d := row["metrics"].get("runtime"):
        say("KL and top-1 against the bf16 reference as released; * against the reference as llama.cpp computes it.")
        figures = f"KL {d['kl_mean']:.2e}, top-1 {d['top1']:.2%}"
        say(f"llama.cpp's own part (it rounds the YaRN range): {figures}.")
    else:
        say("KL and top-1 against the bf16 reference as released, in its own arithmetic on the weights in the files.")
    say(f"{row['path']}/report.json")
