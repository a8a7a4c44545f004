"""exporter plan: what a profile would make of a model. Reads headers, writes nothing."""

from __future__ import annotations

from typing import Any

import click

from exporter.cli import options
from exporter.cli.output import print_json, print_table, say
from exporter.types.sizes import format_size


@click.command()
@options.model
@options.profile
@options.formats
@options.recipe
@options.context
@options.as_json
def command(
    model: str | None,
    profile: str,
    formats: tuple[str, ...],
    recipe: str | None,
    context: int | None,
    as_json: bool,
) -> int:
    """Show what a profile would make, and what it weighs.

    MODEL is a folder or a Hub id; without it, the profile's own. No weight is read, so this works
    for openai/gpt-oss-20b and 120b with nothing downloaded.

    \b
    Examples:
      exporter plan --profile 16gb openai/gpt-oss-20b
      exporter plan --profile 80gb --context 65536
    """
    return show_plan(model, profile, formats, recipe, context, as_json)


def show_plan(
    model: str | None, profile: str, formats: tuple[str, ...], recipe: str | None, context: int | None, as_json: bool
) -> int:
    """Print the plan; exit code 4 when it cannot work, with the reason in the one JSON object or as the error."""
    from exporter.pipeline.plan import make_plan, misfit
    from exporter.pipeline.profiles import load_profile
    from exporter.pipeline.source import outline_model

    loaded = load_profile(profile)
    outline = outline_model(loaded.model if model is None else model)
    plan = make_plan(
        outline.name, outline.config, outline.scheme_of, loaded, formats=formats, recipe=recipe, context=context
    )
    refused = misfit(plan)
    if as_json:
        print_json({**plan_json(plan), "source": outline.source, "refused": refused.message if refused else None})
    else:
        say(f"{plan.model_name} ({outline.source}) for {plan.profile.name}: {plan.profile.title}")
        for artifact in plan.artifacts:
            _show(artifact)
        say(f"disk: {format_size(plan.store_bytes() + sum(a.nbytes for a in plan.artifacts))}")
    if refused is None:
        return 0
    if not as_json:
        raise refused
    return refused.exit_code


def plan_json(plan: Any) -> dict[str, Any]:
    """The plan as JSON values."""
    from dataclasses import asdict

    from exporter.model import parameter_count

    return {
        "model": plan.model_name,
        "profile": plan.profile.name,
        "parameters": parameter_count(plan.config),
        "store_bytes": plan.store_bytes(),
        "artifacts": [
            {
                "format": a.format.name,
                "recipe": a.recipe.name,
                "target": a.spec.target,
                "bytes": a.nbytes,
                "fit": {**asdict(a.fit), "total": a.fit.total, "fits": a.fit.fits},
                "largest_context": a.largest_context,
                "groups": [
                    {"tensors": what, "count": count, "method": method, "scheme": scheme, "type": kind, "bytes": n}
                    for what, count, method, scheme, kind, n in groups(a)
                ],
            }
            for a in plan.artifacts
        ],
    }


def groups(artifact: Any) -> list[tuple[str, int, str, str, str, int]]:
    """Tensors that are treated alike: (what, how many, method, scheme, stored type, bytes)."""
    found: dict[tuple[str, str, str, str], list[int]] = {}
    for step in artifact.steps:
        target = artifact.format.target(step)
        key = (step.spec.role, step.method, step.scheme.name, target.type)
        found.setdefault(key, []).append(target.nbytes)
    return [(role, len(n), method, scheme, kind, sum(n)) for (role, method, scheme, kind), n in found.items()]


def _show(artifact: Any) -> None:
    rows = [
        (role, str(count), method, scheme, kind, format_size(n))
        for role, count, method, scheme, kind, n in groups(artifact)
    ]
    rows.append(("total", str(len(artifact.steps)), "", "", "", format_size(artifact.nbytes)))
    columns = ("tensors", "count", "method", "numbers", "stored as", "bytes")
    print_table(columns, rows, f"\n{artifact.label}: {artifact.recipe.title}", right=(1, 5))
    print_table(("memory", "bytes"), fit_rows(artifact.fit, artifact.largest_context), right=(1,))


def fit_rows(fit: Any, largest: int) -> list[tuple[str, str]]:
    """The memory of one artifact, line by line."""
    return [
        ("weights", format_size(fit.weights)),
        (f"KV cache, full layers, {fit.context:,} tokens", format_size(fit.kv_full)),
        ("KV cache, sliding layers", format_size(fit.kv_sliding)),
        ("logits", format_size(fit.logits)),
        ("masks and activations", format_size(fit.scratch)),
        ("runtime", format_size(fit.runtime)),
        ("total", format_size(fit.total)),
        ("usable on the device", format_size(fit.usable)),
        ("fits", "yes" if fit.fits else "no"),
        ("largest context that fits", f"{largest:,}" if largest else "none"),
    ]
