"""What will be done, what it weighs and whether it can work: known before any weight is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from exporter.errors import Refused, UsageError, did_you_mean
from exporter.formats import get_format
from exporter.formats.base import Format
from exporter.model import ModelConfig, tensor_specs
from exporter.model.memory import Fit, fit, largest_context
from exporter.pipeline.profiles import load_profile, load_recipe, profile_names
from exporter.types import Scheme, TensorSpec, leaf_rows
from exporter.types.profile import ArtifactSpec, Profile
from exporter.types.recipe import Recipe, Step
from exporter.types.sizes import format_size

# Python, numpy and the journal, before any tensor is in memory. Measured: 60 MB, 250 MB with a
# released tokenizer parsed.
BASE_MEMORY = 300_000_000
# Bytes at once per number of a leaf, by method: the packed source, its split copy and the result for
# "pass"; raw and widened floats and their codes for the others.
_LEAF_COST = {"pass": 4, "keep": 8, "gptq": 8, "rtn": 16, "repack": 16, "exact": 16}


@dataclass(frozen=True)
class ArtifactPlan:
    """One artifact: its steps, the bytes of its tensors, and the memory it will take."""

    spec: ArtifactSpec
    format: Format
    recipe: Recipe
    steps: tuple[Step, ...]
    nbytes: int
    fit: Fit
    largest_context: int

    @property
    def label(self) -> str:
        return self.spec.folder


@dataclass(frozen=True)
class Plan:
    """Everything a run needs to know beforehand. `on_request`: what else the profile makes, if no format was named."""

    model_name: str
    config: ModelConfig
    profile: Profile
    artifacts: tuple[ArtifactPlan, ...]
    on_request: tuple[ArtifactSpec, ...] = ()

    def store_bytes(self) -> int:
        """Bytes of codes that stores will hold, each recipe once."""
        by_recipe = {a.recipe.name: a.steps for a in self.artifacts}
        return sum(s.stored_bytes for steps in by_recipe.values() for s in steps if not s.by_reference)


def released_scheme(spec: TensorSpec) -> Scheme:
    """How the release stores a tensor: experts in MXFP4, all else in bf16."""
    return Scheme.parse("mxfp4" if spec.role == "expert" else "bf16")


def make_plan(
    model_name: str,
    config: ModelConfig,
    scheme_of: Callable[[TensorSpec], Scheme],
    profile: Profile,
    *,
    formats: Sequence[str] = (),
    targets: Sequence[str] = (),
    recipe: str | None = None,
    context: int | None = None,
) -> Plan:
    """Match rules, ask formats, add up bytes. Raises Refused or UsageError for what cannot work.

    `recipe` replaces that of the profile's artifacts, and adds the formats that it is for; `formats` and
    `targets` keep only those. `context` is that of every artifact.
    """
    if context:
        artifacts = tuple(replace(a, context=0) for a in profile.artifacts)
        profile = replace(profile, hardware=replace(profile.hardware, context=context), artifacts=artifacts)
    chosen = wanted(profile, formats, targets, recipe)
    longest = max(a.context or profile.hardware.context for a in chosen)
    if longest > config.max_position_embeddings:
        raise Refused(
            f"a context of {longest:,} is beyond the model's {config.max_position_embeddings:,}",
            hint=f"--context {config.max_position_embeddings}",
        )
    specs = tensor_specs(config)
    planned = tuple(_plan_artifact(a, specs, config, scheme_of, profile) for a in chosen)
    others = tuple(a for a in profile.artifacts if not (a.default or formats))
    return Plan(model_name, config, profile, planned, others)


def wanted(profile: Profile, formats: Sequence[str], targets: Sequence[str], recipe: str | None) -> list[ArtifactSpec]:
    """The artifacts of a profile that are asked for: see `make_plan`. Raises UsageError for what it does not make."""
    for name in formats:
        get_format(name)
    every = [a for a in profile.artifacts if a.default or a.format in formats]
    if recipe is not None:
        every = list({a.folder: a for a in (replace(a, recipe=recipe) for a in every)}.values())
        made = {a.format for a in every}
        split = max((a.split_size for a in every), default=0)
        every += [ArtifactSpec(f, recipe, split_size=split) for f in load_recipe(recipe).formats if f not in made]
    chosen = [a for a in every if not formats or a.format in formats]
    if missing := set(formats) - {a.format for a in chosen}:
        available = ", ".join(sorted({a.format for a in (*profile.artifacts, *every)}))
        raise UsageError(
            f"profile {profile.name} makes no {min(missing)}; it makes {available}",
            hint=f"copy profiles/{profile.name}.toml, add an [[artifact]], and pass the file as --profile",
        )
    chosen = _of_targets(chosen, targets, profile)
    folders = [a.folder for a in chosen]
    if twice := {f for f in folders if folders.count(f) > 1}:
        raise UsageError(
            f"profile {profile.name} makes {min(twice)} twice", hint='give one of the two a target = "name"'
        )
    if not chosen:
        offered = sorted({a.format for a in profile.artifacts})
        raise UsageError(
            f"profile {profile.name} makes nothing that is not asked for; it makes {', '.join(offered)}",
            hint=f"--format {offered[0]}",
        )
    return chosen


def _of_targets(every: list[ArtifactSpec], targets: Sequence[str], profile: Profile) -> list[ArtifactSpec]:
    """Those of the targets; all where none is named."""
    known = sorted({a.target for a in every if a.target})
    for target in targets:
        if target in known:
            continue
        formats = [a.format for a in profile.artifacts if a.target == target and a not in every]
        message = f'profile {profile.name} makes nothing for target "{target}"'
        if formats:
            raise UsageError(f"{message} that is not asked for", hint=f"--format {formats[0]} --target {target}")
        others = sorted({a.target for a in profile.artifacts if a.target})
        makers = [p for p in profile_names() if any(a.target == target for a in load_profile(p).artifacts)]
        hint = f"targets: {', '.join(known or others) or 'none'}"
        if makers:
            hint = f"--profile {makers[0]} makes it"
        raise UsageError(f"{message}.{did_you_mean(target, known or others)}", hint=hint)
    return [a for a in every if not targets or a.target in targets]


def _plan_artifact(
    spec: ArtifactSpec,
    tensors: Sequence[TensorSpec],
    config: ModelConfig,
    scheme_of: Callable[[TensorSpec], Scheme],
    profile: Profile,
) -> ArtifactPlan:
    fmt, recipe = get_format(spec.format).for_target(spec.target), load_recipe(spec.recipe)
    spec = replace(spec, recipe=recipe.name)
    if reason := fmt.refuse_model(config):
        raise Refused(f"{fmt.name} cannot hold this model: {reason}", hint="the file would compute something else")
    steps = tuple(recipe.step(t, scheme_of(t)) for t in tensors)
    for step in steps:
        if reason := fmt.refuse(step.scheme, step.spec):
            raise Refused(
                f"{fmt.name} cannot hold {step.name} as {step.scheme.name}: {reason}",
                hint="see `exporter formats`, or choose another --recipe",
            )
    if reason := fmt.refuse_steps(steps):
        raise Refused(f"{fmt.name} cannot hold recipe {recipe.name}: {reason}", hint="choose another --recipe")
    hardware = replace(profile.hardware, context=spec.context or profile.hardware.context)
    taken = fmt.footprint(steps)
    runtime: Any = {"kv_item": taken.kv_item, "windowed": taken.windowed, "buffers": taken.buffers}
    return ArtifactPlan(
        spec=spec,
        format=fmt,
        recipe=recipe,
        steps=steps,
        nbytes=sum(fmt.target(s).nbytes for s in steps),
        fit=fit(config, taken.weights, hardware, **runtime),
        largest_context=largest_context(config, taken.weights, hardware, **runtime),
    )


def misfit(plan: Plan) -> Refused | None:
    """The refusal of what cannot run on the profile's hardware, naming what would; None when all fits."""
    for a in plan.artifacts:
        if a.fit.fits:
            continue
        need, have = format_size(a.fit.total), format_size(a.fit.usable)
        message = f"{a.label} of {plan.model_name} needs {need} at a context of {a.fit.context:,}"
        message += f"; {plan.profile.name} has {have}"
        if a.largest_context:
            return Refused(message, hint=f"--context {a.largest_context} fits, or take a larger --profile")
        return Refused(message, hint="no context fits: take a larger --profile; `exporter fit` shows the parts")
    return None


def require_fit(plan: Plan) -> None:
    """Raises what `misfit` finds."""
    if refused := misfit(plan):
        raise refused


def leaf_memory(step: Step) -> int:
    """Bytes that one leaf of `step` takes while it is worked on."""
    shape = step.spec.shape
    elements = step.spec.elements // max(1, shape[0]) * leaf_rows(shape)
    return elements * _LEAF_COST[step.method]


def workers_for(steps: Sequence[Step], max_memory: int, cpus: int) -> int:
    """How many leaves to work on at once within `max_memory` bytes. Raises Refused if not even one fits."""
    largest = max(steps, key=leaf_memory)
    room = (max_memory - BASE_MEMORY) // leaf_memory(largest)
    if room < 1:
        need = BASE_MEMORY + leaf_memory(largest)
        raise Refused(
            f"--max-memory {format_size(max_memory)} is too small: {largest.name} alone needs {format_size(need)}",
            hint=f"--max-memory {-(-need // 10**6)}M",
        )
    # Beyond eight the disk decides.
    return int(min(room, max(1, cpus), 8))
