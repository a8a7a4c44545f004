"""exporter export: artifacts from numbers that are there already."""

from __future__ import annotations

from pathlib import Path

import click

from exporter.cli import options
from exporter.cli.result import run_and_answer


@click.command()
@options.model
@options.profile
@options.formats
@options.targets
@options.recipe
@options.out
@options.context
@options.max_memory
@click.option("--overwrite", is_flag=True, help="Replace an artifact of other numbers.")
@options.quiet
@options.as_json
def command(
    model: str | None,
    profile: str,
    formats: tuple[str, ...],
    targets: tuple[str, ...],
    recipe: str | None,
    out: Path,
    context: int | None,
    max_memory: int,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Make artifacts of numbers that are there already.

    Nothing is quantized: every number must be in the store that `exporter quantize` filled in OUT, or
    the command that fills it is named (exit code 4). Needs no torch. `exporter quantize` without
    --until proves what was made.

    \b
    Examples:
      exporter quantize --profile 16gb ./my-fine-tune --format onnx --until quantize
      exporter export --profile 16gb ./my-fine-tune --format onnx --target cpu
      exporter export --profile 16gb ./my-fine-tune --format gptq --recipe gptq-int4 --json
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
        until="export",
        max_memory=max_memory,
        context=context,
        overwrite=overwrite,
        quantize=False,
    )
    return run_and_answer(request, quiet, as_json)
