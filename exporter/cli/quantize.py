"""exporter quantize: the main job."""

from __future__ import annotations

from pathlib import Path

import click

from exporter.cli import options
from exporter.cli.result import run_and_answer

# Those of pipeline.request, which is not imported for --help.
STAGES = ("plan", "quantize", "export", "validate")


@click.command()
@options.model
@options.profile
@options.formats
@options.targets
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
    targets: tuple[str, ...],
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
      exporter quantize --profile 16gb ./my-fine-tune --format onnx --target cpu
    """
    from exporter.pipeline.profiles import load_profile
    from exporter.pipeline.request import RunRequest

    request = RunRequest(
        model=load_profile(profile).model if model is None else model,
        profile=profile,
        formats=formats,
        targets=targets,
        recipe=recipe,
        out=out,
        until=until,
        max_memory=max_memory,
        device=device,
        calibration=calibration,
        context=context,
        overwrite=overwrite,
    )
    if dry_run or until == "plan":
        from exporter.cli.plan import show_plan

        return show_plan(request, as_json)
    return run_and_answer(request, quiet, as_json)
