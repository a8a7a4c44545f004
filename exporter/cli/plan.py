"""exporter plan: what a profile would make of a model, from its headers; or what it should, by measurement."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

import click

from exporter.cli import options
from exporter.cli.failures import stoppable
from exporter.cli.output import peak_rss, print_json, print_table, progress, say
from exporter.errors import UsageError
from exporter.types.sizes import format_size


@click.command()
@options.model
@options.profile
@options.formats
@options.targets
@options.recipe
@options.context
@click.option("--sensitivity", is_flag=True, help="Measure which tensors mind which numbers; write the best recipe.")
@click.option(
    "--target-bytes", type=options.Size(), metavar="SIZE", help="With --sensitivity: weights at most this large."
)
@click.option(
    "--write",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="With --sensitivity: where the recipe goes.  [default: OUT/<model>/<profile>-sensitivity.toml]",
)
@options.calibration
@options.out
@options.max_memory
@options.device
@options.quiet
@options.as_json
def command(
    model: str | None,
    profile: str,
    formats: tuple[str, ...],
    targets: tuple[str, ...],
    recipe: str | None,
    context: int | None,
    sensitivity: bool,
    target_bytes: int | None,
    write: Path | None,
    calibration: str | None,
    out: Path,
    max_memory: int,
    device: str,
    quiet: bool,
    as_json: bool,
) -> int:
    """Show what a profile would make, and what it weighs.

    MODEL is a folder or a Hub id; without it, the profile's own. No weight is read, so this works
    for openai/gpt-oss-20b and 120b with nothing downloaded.

    With --sensitivity the weights are read: each group of tensors is tried in each scheme, and the
    recipe that fits with the least KL is written. What is measured is kept in OUT, and never
    measured twice. --recipe then gives formats, [calibration] and [gptq]; its rules are not used.

    \b
    Examples:
      exporter plan --profile 16gb openai/gpt-oss-20b
      exporter plan --profile 80gb --context 65536
      exporter plan --profile 16gb --format onnx --target cpu
      exporter plan --profile 16gb ./my-fine-tune --sensitivity --target-bytes 11G
    """
    own = {"target-bytes": target_bytes, "write": write, "calibration": calibration}
    _refuse_mixed(sensitivity, targets, [name for name, value in own.items() if value is not None])
    from exporter.pipeline.profiles import load_profile
    from exporter.pipeline.request import RunRequest

    model = load_profile(profile).model if model is None else model
    if not sensitivity:
        asked = RunRequest(model, profile, formats=formats, targets=targets, recipe=recipe, context=context)
        return show_plan(asked, as_json)
    from exporter.pipeline.sensitivity import SensitivityRequest

    request = SensitivityRequest(
        model=model,
        profile=profile,
        formats=formats,
        recipe=recipe,
        context=context,
        out=out,
        calibration=calibration,
        target_bytes=target_bytes,
        max_memory=max_memory,
        device=device,
        write=write,
    )
    return _measure(request, quiet, as_json)


def _refuse_mixed(sensitivity: bool, targets: tuple[str, ...], given: list[str]) -> None:
    """Options that go with --sensitivity only, and the one that does not go with it. Raises UsageError."""
    if given and not sensitivity:
        raise UsageError(f"--{given[0]} goes with --sensitivity", hint="add --sensitivity, or leave it out")
    if sensitivity and targets:
        raise UsageError("--target does not go with --sensitivity", hint="one recipe serves all targets of a format")


def _measure(request: Any, quiet: bool, as_json: bool) -> int:
    """Measure, and answer with the table and the recipe that was written."""
    from exporter.pipeline.sensitivity import Sensitivity, refusals, rows

    stoppable()
    started = time.monotonic()
    answer = Sensitivity(request, progress(quiet or as_json)).run()
    seconds = time.monotonic() - started
    if as_json:
        print_json({**sensitivity_json(answer), "peak_rss_bytes": peak_rss(), "seconds": round(seconds, 3)})
        return 0
    text, survey = answer.text, answer.survey
    title = f"{answer.plan.model_name} for {answer.plan.profile.name}: one group changed at a time"
    columns = ("", "group", "numbers", "method", *survey.labels, "KL", "top-1")
    numeric = tuple(range(4, len(columns)))
    print_table(columns, rows(answer), title, right=numeric)
    for reason in refusals(answer):
        say(f"refused: {reason}")
    say(f"measured on {text['windows']} x {text['length']} tokens of the {text['source']}")
    sizes = (f"{label} {format_size(n)}" for label, n in zip(survey.labels, answer.choice.nbytes, strict=True))
    say(f"chosen (*): {', '.join(sizes)} of weights, within {format_size(survey.limit)}")
    whole = answer.measured
    say(f"KL: sum of the parts {answer.predicted:.6f}, together {whole['kl_mean']:.6f} (top-1 {whole['top1']:.2%})")
    command = ("exporter", "quantize", request.model, "--profile", request.profile)
    say(f"next: {shlex.join([*command, '--recipe', str(answer.recipe), '--out', str(request.out)])}")
    say(f"{seconds:.1f} s, peak {format_size(peak_rss())}")
    return 0


def sensitivity_json(answer: Any) -> dict[str, Any]:
    """What was measured and chosen as JSON values."""
    labels, chosen = answer.survey.labels, answer.choice.options

    def option(o: Any) -> dict[str, Any]:
        return {
            "group": o.candidate.group,
            "scheme": o.candidate.scheme,
            "method": o.candidate.method,
            "bytes": dict(zip(labels, o.nbytes, strict=False)),
            **answer.figures.get(o.candidate, {}),
            "measured": not (o.refused or o.candidate.exact),
            "refused": o.refused,
            "chosen": o in chosen,
        }

    return {
        "model": answer.plan.model_name,
        "profile": answer.plan.profile.name,
        "text": answer.text,
        "calibration": answer.calibration,
        "limit_bytes": answer.survey.limit,
        "options": [option(o) for o in answer.survey.options],
        "chosen": {o.candidate.group: o.candidate.scheme for o in chosen},
        "bytes": dict(zip(labels, answer.choice.nbytes, strict=True)),
        "predicted_kl": answer.predicted,
        "measured": answer.measured,
        "recipe": str(answer.recipe),
    }


def show_plan(request: Any, as_json: bool) -> int:
    """Print the plan; exit code 4 when it cannot work, with the reason in the one JSON object or as the error."""
    from exporter.pipeline.plan import misfit
    from exporter.pipeline.request import plan_outline

    outline, plan = plan_outline(request)
    refused = misfit(plan)
    if as_json:
        print_json({**plan_json(plan), "source": outline.source, "refused": refused.message if refused else None})
    else:
        say(f"{plan.model_name} ({outline.source}) for {plan.profile.name}: {plan.profile.title}")
        for artifact in plan.artifacts:
            _show(artifact)
        say(f"disk: {format_size(plan.store_bytes() + sum(a.nbytes for a in plan.artifacts))}")
        if plan.on_request:
            ask = " ".join(f"--format {name}" for name in dict.fromkeys(a.format for a in plan.on_request))
            say(f"on request ({ask}): {', '.join(a.folder for a in plan.on_request)}")
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
                "hardware": [asdict(v) for v in a.format.hardware(a.steps)],
                "groups": [
                    {"tensors": what, "count": count, "method": method, "scheme": scheme, "type": kind, "bytes": n}
                    for what, count, method, scheme, kind, n in groups(a)
                ],
            }
            for a in plan.artifacts
        ],
        "on_request": [{"format": a.format, "recipe": a.recipe, "target": a.target} for a in plan.on_request],
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
    if verdicts := artifact.format.hardware(artifact.steps):
        size = format_size(artifact.fit.weights)
        devices = [
            (v.device, v.examples, "" if v.refusal else v.form, v.refusal or f"made for it, {size}") for v in verdicts
        ]
        print_table(("device", "for example", "experts as", "engine"), devices)


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
        *((f"total with the {way} engine", format_size(n)) for way, n in fit.ways.items() if n != fit.total),
        ("usable on the device", format_size(fit.usable)),
        ("fits", "yes" if fit.fits else "no"),
        ("largest context that fits", f"{largest:,}" if largest else "none"),
    ]
