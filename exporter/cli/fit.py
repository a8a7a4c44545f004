"""exporter fit: does it run on the device, and with how much context."""

from __future__ import annotations

import click

from exporter.cli import options
from exporter.cli.output import print_json, print_table


@click.command()
@options.model
@options.profile
@options.formats
@options.targets
@options.recipe
@options.context
@options.as_json
def command(
    model: str | None,
    profile: str,
    formats: tuple[str, ...],
    targets: tuple[str, ...],
    recipe: str | None,
    context: int | None,
    as_json: bool,
) -> int:
    """Show whether a model fits a device, byte by byte.

    MODEL is a folder, a Hub id, "20b" or "120b"; without it, the profile's own. Weights, KV cache
    (sliding layers counted as such) and buffers are computed from the configuration: nothing is
    downloaded for the released models.

    \b
    Examples:
      exporter fit --profile 16gb --context 32768
      exporter fit --profile 80gb 120b
      exporter fit --profile 24gb --format onnx --target cpu
    """
    from dataclasses import asdict

    from exporter.cli.plan import fit_rows
    from exporter.pipeline.plan import misfit
    from exporter.pipeline.profiles import load_profile
    from exporter.pipeline.request import RunRequest, plan_outline

    model = load_profile(profile).model if model is None else model
    request = RunRequest(model, profile, formats=formats, targets=targets, recipe=recipe, context=context)
    _, plan = plan_outline(request)
    if as_json:
        rows = [
            {
                "artifact": a.label,
                **asdict(a.fit),
                "total": a.fit.total,
                "fits": a.fit.fits,
                "largest_context": a.largest_context,
            }
            for a in plan.artifacts
        ]
        print_json({"model": plan.model_name, "profile": plan.profile.name, "artifacts": rows})
    else:
        for a in plan.artifacts:
            title = f"{a.label} of {plan.model_name} on {plan.profile.title}"
            print_table(("memory", "bytes"), fit_rows(a.fit, a.largest_context), title, right=(1,))
    refused = misfit(plan)
    if refused is None:
        return 0
    if not as_json:
        raise refused
    return refused.exit_code
