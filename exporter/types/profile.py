"""A profile says for which hardware: memory, context, which artifacts, which gates."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

from exporter.errors import UsageError
from exporter.types import toml
from exporter.types.gates import CLASSES, GATES, Limits, read_limits
from exporter.types.sizes import parse_size

# It becomes part of a folder's name.
_TARGET = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Hardware:
    """`memory` and `reserve` in bytes: what the device shows, and what others on it take. `context` in tokens.

    `ubatch` is the number of prompt tokens that the runtime computes at once; `runtime` the bytes that
    the runtime itself takes (device context, kernels).
    """

    device: Literal["gpu", "cpu"]
    memory: int
    reserve: int
    context: int
    ubatch: int
    runtime: int

    @property
    def usable(self) -> int:
        return self.memory - self.reserve


def artifact_folder(form: str, recipe: str, target: str) -> str:
    """What the folder of an artifact is called."""
    return "-".join(part for part in (form, recipe, target) if part)


@dataclass(frozen=True)
class ArtifactSpec:
    """One file or folder to make. `split_size`: bytes above which a file is split; 0 never.

    `context`: tokens that must fit, 0 for as many as the profile says. `default`: whether it is made when nobody
    asks for its format.
    """

    format: str
    recipe: str
    target: str = ""
    split_size: int = 0
    context: int = 0
    default: bool = True

    @property
    def folder(self) -> str:
        return artifact_folder(self.format, self.recipe, self.target)


@dataclass(frozen=True)
class ValidateSpec:
    """How much text decides: `windows` x `length` tokens of held-out text."""

    windows: int
    length: int


@dataclass(frozen=True)
class Profile:
    """`gates`: limits by gate name and class, see `types.gates`. `sha256` is of the file's text."""

    name: str
    title: str
    model: str
    hardware: Hardware
    artifacts: tuple[ArtifactSpec, ...]
    validate: ValidateSpec
    gates: Limits
    sha256: str

    @staticmethod
    def from_toml(text: str, name: str, where: str) -> Profile:
        known = ("title", "model", "hardware", "artifact", "validate", "gates")
        table = toml.Table(toml.parse(text, where), where, known)
        artifacts = table.get("artifact", list)
        if not artifacts:
            raise UsageError(f"{where}: makes no artifact", hint="add an [[artifact]]")
        validate = toml.Table(table.get("validate", dict), f"{where} [validate]", ("windows", "length"))
        return Profile(
            name=name,
            title=table.get("title", str),
            model=table.get("model", str),
            hardware=_hardware(table.get("hardware", dict), f"{where} [hardware]"),
            artifacts=tuple(_artifact(a, f"{where} artifact {i}") for i, a in enumerate(artifacts, 1)),
            validate=ValidateSpec(_positive(validate, "windows"), _positive(validate, "length")),
            gates=_required_gates(table.get("gates", dict), f"{where} [gates]"),
            sha256=hashlib.sha256(text.encode()).hexdigest(),
        )


def _positive(table: toml.Table, key: str) -> int:
    value: int = table.get(key, int)
    if value < 1:
        raise UsageError(f'{table.where}: "{key}" must be at least 1, not {value}', hint="see docs/profiles.md")
    return value


def _hardware(raw: object, where: str) -> Hardware:
    t = toml.Table(raw, where, ("device", "memory", "reserve", "context", "ubatch", "runtime"))
    device = t.get("device", str)
    if device not in ("gpu", "cpu"):
        raise UsageError(f'{where}: unknown device "{device}"', hint="devices: gpu, cpu")
    memory, reserve = parse_size(t.get("memory", str)), parse_size(t.get("reserve", str))
    if reserve >= memory:
        raise UsageError(f"{where}: reserve leaves nothing of memory", hint="see docs/profiles.md")
    return Hardware(
        device=device,
        memory=memory,
        reserve=reserve,
        context=_positive(t, "context"),
        ubatch=_positive(t, "ubatch"),
        runtime=parse_size(t.get("runtime", str)),
    )


def _artifact(raw: object, where: str) -> ArtifactSpec:
    t = toml.Table(raw, where, ("format", "recipe", "target", "split_size", "context", "default"))
    split = t.get("split_size", str, "0")
    target = t.get("target", str, "")
    if target and not _TARGET.fullmatch(target):
        raise UsageError(
            f"{where}: target {target!r} is not a plain name", hint="letters, digits, dot, dash, underscore"
        )
    return ArtifactSpec(
        format=t.get("format", str),
        recipe=t.get("recipe", str),
        target=target,
        split_size=parse_size(split),
        context=_positive(t, "context") if "context" in t.raw else 0,
        default=t.get("default", bool, True),
    )


def _required_gates(raw: object, where: str) -> Limits:
    limits = read_limits(raw, where)
    if not all(limits.of(loss) for loss in CLASSES):
        raise UsageError(f"{where}: no gates", hint=f"gates: {', '.join(GATES)}")
    return limits
