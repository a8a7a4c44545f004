"""What each group of tensors could become, what that weighs, and which choices fit: known from headers alone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from exporter.errors import Refused
from exporter.formats.base import Format
from exporter.model import tensor_specs
from exporter.model.memory import fit
from exporter.pipeline.plan import ArtifactPlan, Plan
from exporter.types import Scheme, TensorSpec
from exporter.types.recipe import CalibrationSpec, GptqSpec, Recipe, Step
from exporter.types.sizes import format_size

# Tensors that are quantized alike, and the names that a recipe matches them by.
GROUPS = {
    "attention": ("*.self_attn.*_proj.weight",),
    "gate_up": ("*.mlp.experts.gate_proj.weight", "*.mlp.experts.up_proj.weight"),
    "down": ("*.mlp.experts.down_proj.weight",),
    "lm_head": ("lm_head.weight",),
    "embeddings": ("model.embed_tokens.weight",),
}
_KEPT = ("*.mlp.router.*", "*norm.weight", "*.sinks", "*.bias")


@dataclass(frozen=True)
class Candidate:
    """One way to store one group. `scheme`: the name of what results; the other keys as in a recipe's rule."""

    group: str
    method: str
    scheme: str
    scale_rule: str | None = None
    otherwise: str | None = None

    @property
    def exact(self) -> bool:
        """Whether every number stays the released one, whatever the numbers are."""
        return self.method in ("keep", "pass", "exact") and self.otherwise is None

    def rule(self) -> str:
        """As a recipe says it."""
        lines = ["[[rule]]", f"match = {_toml(GROUPS[self.group])}", f"method = {_toml(self.method)}"]
        if self.method != "keep":
            lines.append(f"scheme = {_toml(self.scheme)}")
        for key, value in (("scale_rule", self.scale_rule), ("otherwise", self.otherwise)):
            if value:
                lines.append(f"{key} = {_toml(value)}")
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Option:
    """A candidate on one checkpoint. `nbytes`: in each artifact; `memory`: where it runs; `refused`: why one cannot
    hold it."""

    candidate: Candidate
    steps: tuple[Step, ...]
    nbytes: tuple[int, ...] = ()
    memory: tuple[int, ...] = ()
    refused: str | None = None


@dataclass(frozen=True)
class Choice:
    """One option for every group, and the bytes of all tensors in each artifact and where it runs."""

    options: tuple[Option, ...]
    nbytes: tuple[int, ...]
    memory: tuple[int, ...]


@dataclass(frozen=True)
class Survey:
    """`limit`: bytes of weights that fit, in the artifact with the least room; `choices`: those that fit and that
    every format can hold."""

    labels: tuple[str, ...]
    options: tuple[Option, ...]
    choices: tuple[Choice, ...]
    limit: int

    def least(self, kl: Callable[[Candidate], float]) -> Choice:
        """The choice with the least sum of `kl`; of equals the smallest."""
        return min(self.choices, key=lambda c: (sum(kl(o.candidate) for o in c.options), sum(c.nbytes)))


def candidates(group: str, sources: Sequence[Scheme]) -> list[Candidate]:
    """What a group that is stored as `sources` could become; the first is what it is. Raises Refused."""
    kinds = {s.kind for s in sources}
    if len(kinds) > 1:
        raise Refused(
            f"{group} is stored as {' and '.join(sorted({s.name for s in sources}))}; "
            "sensitivity wants one kind of numbers in a group",
            hint="write a recipe by hand: docs/profiles.md",
        )
    if kinds == {"e2m1"}:
        return [
            Candidate(group, "pass", "mxfp4"),
            Candidate(group, "exact", "int8-g32"),
            Candidate(group, "gptq", "int4-g32"),
        ]
    released = Candidate(group, "keep", ", ".join(sorted({s.name for s in sources})))
    int8 = Candidate(group, "rtn", "int8-g32")
    if group == "embeddings":  # looked up, not multiplied: there is nothing to calibrate
        return [released, int8, Candidate(group, "rtn", "int4-g32"), Candidate(group, "rtn", "mxfp4", "mse")]
    if group in ("gate_up", "down"):  # a fine-tune's experts may lie on the MXFP4 grid, all or in part
        int8 = Candidate(group, "exact", "int8-g32", otherwise="absmax")
    return [released, int8, Candidate(group, "gptq", "int4-g32"), Candidate(group, "gptq", "mxfp4")]


def survey(plan: Plan, scheme_of: Callable[[TensorSpec], Scheme], target_bytes: int | None) -> Survey:
    """Weigh every candidate in the formats of `plan`. Raises Refused when no choice fits, with the smallest.

    What fits is decided by the profile's memory at its context, and by `target_bytes` of weights if given.
    """
    artifacts = {(a.spec.format, a.spec.target): a for a in plan.artifacts}
    labels = tuple("-".join(part for part in key if part) for key in artifacts)
    formats = [a.format for a in artifacts.values()]
    specs = tensor_specs(plan.config)
    members = {g: [s for s in specs if any(fnmatchcase(s.name, p) for p in GROUPS[g])] for g in GROUPS}
    released = {g: candidates(g, [scheme_of(s) for s in members[g]]) for g in GROUPS}
    first = [every[0] for every in released.values()]
    options = [
        _option(c, steps_of([c, *(f for f in first if f.group != c.group)], members[c.group], scheme_of), formats)
        for every in released.values()
        for c in every
    ]
    grouped = {s.name for group in members.values() for s in group}
    rest = steps_of(first, [s for s in specs if s.name not in grouped], scheme_of)
    possible = _choices(options, rest, formats)
    rooms = [_room(plan, a) for a in artifacts.values()]
    limits = [*rooms, target_bytes] if target_bytes else rooms
    fitting = tuple(c for c in possible if _beyond(c, rooms, target_bytes)[0] <= 0)
    if not fitting:
        smallest = min(possible, key=lambda c: _beyond(c, rooms, target_bytes))
        over, size = _beyond(smallest, rooms, target_bytes)
        raise Refused(
            f"no choice fits: the smallest of {plan.model_name} ({described(smallest)}) is "
            f"{format_size(size)} of weights, and {format_size(max(0, size - over))} is the limit",
            hint="a larger --target-bytes or --profile, or a smaller --context",
        )
    return Survey(labels, tuple(options), fitting, min(limits))


def _room(plan: Plan, artifact: ArtifactPlan) -> int:
    """Bytes of weights that the profile's memory has room for where an artifact runs."""
    taken = artifact.format.footprint(artifact.steps)
    empty = fit(
        plan.config,
        0,
        plan.profile.hardware,
        artifact.fit.context,
        kv_item=taken.kv_item,
        windowed=taken.windowed,
        buffers=taken.buffers,
    )
    return empty.usable - empty.total


def _beyond(choice: Choice, rooms: Sequence[int], target_bytes: int | None) -> tuple[int, int]:
    """Bytes that a choice is beyond what it may take in memory or in files, at the most, and which size that is."""
    sizes = [(taken - room, taken) for taken, room in zip(choice.memory, rooms, strict=True)]
    if target_bytes:
        sizes += [(n - target_bytes, n) for n in choice.nbytes]
    return max(sizes)


def steps_of(
    chosen: Iterable[Candidate], specs: Iterable[TensorSpec], scheme_of: Callable[[TensorSpec], Scheme]
) -> tuple[Step, ...]:
    """What becomes of `specs` when each group becomes what is chosen for it."""
    recipe = Recipe.from_toml(recipe_text(chosen, "sensitivity"), "sensitivity", "sensitivity")
    return tuple(recipe.step(s, scheme_of(s)) for s in specs)


def described(choice: Choice) -> str:
    """e.g. "attention int8-g32, gate_up mxfp4, ..."."""
    return ", ".join(f"{o.candidate.group} {o.candidate.scheme}" for o in choice.options)


def _option(candidate: Candidate, steps: tuple[Step, ...], formats: Sequence[Format]) -> Option:
    for fmt in formats:
        for step in steps:
            if reason := fmt.refuse(step.scheme, step.spec):
                return Option(candidate, steps, refused=f"{fmt.name}: {reason}")
    return Option(candidate, steps, *_sizes(steps, formats))


def _sizes(steps: Sequence[Step], formats: Sequence[Format]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bytes of tensors in each artifact, and where it runs."""
    files = tuple(sum(f.target(s).nbytes for s in steps) for f in formats)
    return files, tuple(f.footprint(steps).weights for f in formats)


def _choices(options: Sequence[Option], rest: tuple[Step, ...], formats: Sequence[Format]) -> list[Choice]:
    """Every way to take one option for each group that all formats can hold."""
    by_group = {g: [o for o in options if o.candidate.group == g and not o.refused] for g in GROUPS}
    for group, every in by_group.items():
        if not every:
            reason = next(o.refused for o in options if o.candidate.group == group)
            raise Refused(f"no scheme of {group} can be held ({reason})", hint="choose another --format")
    files, memory = _sizes(rest, formats)
    found, refusal = [], None
    for chosen in itertools.product(*by_group.values()):
        steps = [*rest, *(s for o in chosen for s in o.steps)]
        reasons = [f"{f.name}: {reason}" for f in formats if (reason := f.refuse_steps(steps))]
        if reasons:
            refusal = reasons[0]
            continue
        nbytes = tuple(n + sum(o.nbytes[i] for o in chosen) for i, n in enumerate(files))
        found.append(Choice(chosen, nbytes, tuple(n + sum(o.memory[i] for o in chosen) for i, n in enumerate(memory))))
    if not found:
        raise Refused(f"no choice of schemes can be held together ({refusal})", hint="choose fewer --format")
    return found


def recipe_text(
    chosen: Iterable[Candidate],
    title: str,
    *,
    formats: Sequence[str] = (),
    calibration: CalibrationSpec | None = None,
    gptq: GptqSpec | None = None,
    comments: Sequence[str] = (),
) -> str:
    """The recipe that makes `chosen`, as TOML. `comments` stand above it."""
    parts = ["".join(f"# {line}".rstrip() + "\n" for line in comments)] if comments else []
    parts.append(f"title = {_toml(title)}\n" + (f"formats = {_toml(formats)}\n" if formats else ""))
    for name, spec in (("calibration", calibration), ("gptq", gptq)):
        if spec is not None:
            parts.append(f"[{name}]\n" + "".join(f"{k} = {_toml(v)}\n" for k, v in vars(spec).items()))
    parts += [c.rule() for c in chosen]
    parts.append(f'[[rule]]\nmatch = {_toml(_KEPT)}\nmethod = "keep"\n')
    return "\n".join(parts)


def _toml(value: object) -> str:
    """A string, number or list of strings; JSON writes these as TOML does."""
    return json.dumps(value, ensure_ascii=False)
