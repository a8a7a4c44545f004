"""A recipe says which numbers: ordered rules over tensor names, the first match wins.

No inheritance and no imports: the file says the whole truth, and its hash goes into the manifest.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from exporter.errors import Refused, UsageError, did_you_mean
from exporter.types import toml
from exporter.types.gates import CLASSES, LossClass, read_gates
from exporter.types.scheme import Scheme
from exporter.types.tensor import TensorSpec

Method = Literal["keep", "pass", "repack", "exact", "rtn", "gptq"]
METHODS: dict[str, str] = {
    "keep": "floats stay as they are",
    "pass": "released codes are moved, bit for bit",
    "exact": "released MXFP4 numbers as integers, every one of them equal",
    "rtn": "round to nearest",
    "gptq": "round column by column, each error made good by the columns that follow; needs calibration",
}


@dataclass(frozen=True)
class CalibrationSpec:
    """The text that calibrated methods see: `windows` x `length` tokens of it.

    `text`: "standard-library", "self" (written by the model), a file or folder, or a Hub dataset.
    """

    text: str = "standard-library"
    windows: int = 128
    length: int = 512


@dataclass(frozen=True)
class GptqSpec:
    """How calibrated rounding works; see quantize/gptq.py.

    `damp`: share of the mean of a Hessian's diagonal that is added to it. `hessian`: "routed", one for each
    expert from the tokens that it gets, or "shared", one for all gate and up weights of a layer (faster).
    """

    damp: float = 0.01
    hessian: Literal["routed", "shared"] = "routed"


@dataclass(frozen=True)
class Rule:
    """`otherwise`: what becomes of numbers that are not on the MXFP4 grid (bf16 fine-tunes), a scale rule."""

    match: tuple[str, ...]
    method: str
    scheme: Scheme | None
    otherwise: str | None

    def matches(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.match)


def loss_of(steps: Sequence[Step]) -> LossClass:
    """The class of an artifact: that of the tensor that may lose most."""
    return max((step.loss for step in steps), key=CLASSES.index)


@dataclass(frozen=True)
class Step:
    """What happens to one tensor. "repack": float blocks on the MXFP4 grid move exactly, others are rounded.

    `otherwise`: for "exact", the rule for blocks that cannot be exact; None refuses them.
    """

    spec: TensorSpec
    method: Method
    source: Scheme
    scheme: Scheme
    otherwise: str | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def by_reference(self) -> bool:
        """Whether the store points at the checkpoint instead of holding the numbers: they follow from it alone."""
        return self.method in ("keep", "pass") or (self.method == "exact" and self.source.kind == "e2m1")

    @property
    def loss(self) -> LossClass:
        """What the tensor's numbers may lose."""
        if self.method not in ("rtn", "gptq"):
            return "exact"
        return "near" if self.scheme.bits >= 8 else "lossy"

    @property
    def stored_bytes(self) -> int:
        """Codes, scales and zeros of the whole tensor."""
        return math.prod(self.spec.shape[:-1]) * self.scheme.row_bytes(self.spec.shape[-1])


@dataclass(frozen=True)
class Recipe:
    """`formats`: what this recipe is for, made when it is asked for by name; `gates`: limits that it sets in
    place of a profile's. `sha256` is of the file's text.
    """

    name: str
    title: str
    rules: tuple[Rule, ...]
    sha256: str
    calibration: CalibrationSpec = CalibrationSpec()
    gptq: GptqSpec = GptqSpec()
    formats: tuple[str, ...] = ()
    gates: Mapping[str, float | bool] = field(default_factory=dict)

    @staticmethod
    def from_toml(text: str, name: str, where: str) -> Recipe:
        known = ("title", "formats", "calibration", "gptq", "gates", "rule")
        table = toml.Table(toml.parse(text, where), where, known)
        rules = table.get("rule", list)
        return Recipe(
            name=name,
            title=table.get("title", str),
            rules=tuple(_rule(r, f"{where} rule {i}") for i, r in enumerate(rules, 1)),
            sha256=hashlib.sha256(text.encode()).hexdigest(),
            calibration=_calibration(table.get("calibration", dict, {}), f"{where} [calibration]"),
            gptq=_gptq(table.get("gptq", dict, {}), f"{where} [gptq]"),
            formats=tuple(str(f) for f in table.get("formats", list, [])),
            gates=read_gates(table.get("gates", dict, {}), f"{where} [gates]"),
        )

    def step(self, spec: TensorSpec, source: Scheme) -> Step:
        """What this recipe does to a tensor that is stored as `source`. Raises Refused when it cannot work."""
        rule = next((r for r in self.rules if r.matches(spec.name)), None)
        if rule is None:
            raise Refused(
                f"recipe {self.name}: no rule matches {spec.name}",
                hint='add a rule to the recipe; method = "keep" leaves a tensor as it is',
            )
        method, scheme = self._resolve(rule, spec, source)
        if spec.role in ("router", "vector") and (scheme.kind != "float"):
            raise Refused(
                f"recipe {self.name}: {spec.name} would become {scheme.name}; "
                "routers, norms, sinks and biases are never quantized",
                hint='give it method = "keep"',
            )
        if reason := scheme.refuse(spec.shape[-1]):
            raise Refused(
                f"recipe {self.name} cannot apply {scheme.name} to {spec.name}: {reason}",
                hint="groups of 32 and 64 divide every gpt-oss row",
            )
        if method == "gptq" and spec.role == "embedding":
            raise Refused(
                f"recipe {self.name}: {spec.name} has no inputs to calibrate on",
                hint='embeddings are looked up, not multiplied: give them method = "rtn"',
            )
        return Step(spec, method, source, scheme, rule.otherwise if method == "exact" else None)

    def _exact(self, rule: Rule, scheme: Scheme, spec: TensorSpec, source: Scheme) -> tuple[Method, Scheme]:
        if source.kind == "e2m1" or rule.otherwise:
            return "exact", scheme
        raise Refused(
            f"recipe {self.name} takes MXFP4 numbers as {scheme.name}, but {spec.name} is stored as {source.name}",
            hint='add otherwise = "absmax" to the rule to round what is not on the MXFP4 grid',
        )

    def _resolve(self, rule: Rule, spec: TensorSpec, source: Scheme) -> tuple[Method, Scheme]:
        if rule.method == "keep":
            if source.kind != "float":
                raise Refused(
                    f"recipe {self.name} says keep for {spec.name}, which is stored as {source.name}",
                    hint='use method = "pass" to move its codes, or "rtn" to decode or round it',
                )
            return "keep", source
        assert rule.scheme is not None
        if rule.method == "rtn":
            return "rtn", rule.scheme
        if rule.method == "exact":
            return self._exact(rule, rule.scheme, spec, source)
        if source.name == rule.scheme.name:
            return "pass", source  # gptq too: there is nothing to round
        if rule.method == "gptq":
            return "gptq", rule.scheme
        if rule.otherwise is None or source.kind != "float":
            raise Refused(
                f"recipe {self.name} passes {rule.scheme.name} through, but {spec.name} is stored as {source.name}",
                hint='add otherwise = "mse" to the rule to round what is not on the grid',
            )
        return "repack", rule.scheme.with_rule(rule.otherwise)


_RULE_KEYS = ("match", "method", "scheme", "scale_rule", "otherwise")
_MXFP4_RULES = ("mse", "floor", "ceil6", "round175")
# Scale rules that a method knows, by kind of scheme; the first is taken where a rule names none.
_SCALE_RULES: dict[str, dict[str, tuple[str, ...]]] = {
    "pass": {"e2m1": ("released",)},
    "exact": {"int": ("pow2",)},
    "rtn": {"e2m1": _MXFP4_RULES, "int": ("absmax",), "float": ("none",)},
    "gptq": {"e2m1": ("mse", "floor"), "int": ("signed-mse", "mse", "absmax")},
}
_OTHERWISE = {"pass": _MXFP4_RULES, "exact": ("absmax",)}


def _rule(raw: object, where: str) -> Rule:
    table = toml.Table(raw, where, _RULE_KEYS)
    match = table.get("match", (str, list))
    method = table.get("method", str)
    if method not in METHODS:
        raise UsageError(
            f'{where}: unknown method "{method}".{did_you_mean(method, METHODS)}',
            hint=f"methods: {', '.join(METHODS)}",
        )
    name, otherwise = table.raw.get("scheme"), table.raw.get("otherwise")
    scheme = _scheme(name, method, table.raw.get("scale_rule"), where) if isinstance(name, str) else None
    if (method == "keep") != (scheme is None):
        problem = "keep takes no scheme" if scheme else f'method "{method}" needs a scheme'
        raise UsageError(f"{where}: {problem}", hint='e.g. method = "rtn", scheme = "int8-g32"')
    if scheme is None and "scale_rule" in table.raw:
        raise UsageError(f"{where}: keep takes no scale_rule", hint='e.g. method = "rtn", scheme = "int8-g32"')
    if otherwise is not None:
        _one_of(otherwise, _OTHERWISE.get(method, ()), f"{where}: otherwise", f'method "{method}"')
    patterns = (match,) if isinstance(match, str) else tuple(str(m) for m in match)
    return Rule(patterns, method, scheme, otherwise)


def _scheme(name: str, method: str, scale_rule: object, where: str) -> Scheme | None:
    if method == "keep":
        return Scheme.parse(name)
    try:
        scheme = Scheme.parse(name)
    except UsageError as e:
        raise UsageError(f"{where}: {e.message}", e.hint) from None
    allowed = _SCALE_RULES[method].get(scheme.kind)
    if allowed is None or (method == "exact" and scheme.bits != 8):
        kinds = {"pass": "mxfp4", "exact": "int8", "gptq": "int4, int8 and mxfp4"}[method]
        raise UsageError(f'{where}: method "{method}" makes {kinds}, not {name}', hint="see docs/profiles.md")
    if scale_rule is not None:
        _one_of(scale_rule, allowed, f"{where}: scale_rule", f'method "{method}" and {name}')
        return scheme.with_rule(str(scale_rule))
    if method == "rtn" and scheme.kind == "e2m1":
        raise UsageError(f"{where}: rounding to mxfp4 needs a scale_rule", hint='e.g. scale_rule = "mse"')
    if method == "gptq" and scheme.bits == 8:
        return scheme.with_rule("absmax")  # with 256 levels nothing is gained by a search
    return scheme if method in ("pass", "rtn") else scheme.with_rule(allowed[0])


def _one_of(value: object, allowed: tuple[str, ...], where: str, fits: str) -> None:
    if value not in allowed:
        raise UsageError(
            f"{where} {value!r} does not fit {fits}.{did_you_mean(str(value), allowed)}",
            hint=f"one of: {', '.join(allowed) or 'none'}",
        )


def _calibration(raw: object, where: str) -> CalibrationSpec:
    t, default = toml.Table(raw, where, ("text", "windows", "length")), CalibrationSpec()
    windows, length = t.get("windows", int, default.windows), t.get("length", int, default.length)
    if windows < 1 or length < 2:
        raise UsageError(f"{where}: {windows} windows of {length} tokens", hint="at least 1 window of 2 tokens")
    return CalibrationSpec(t.get("text", str, default.text), windows, length)


def _gptq(raw: object, where: str) -> GptqSpec:
    t, default = toml.Table(raw, where, ("damp", "hessian")), GptqSpec()
    damp = float(t.get("damp", (int, float), default.damp))
    hessian: Any = t.get("hessian", str, default.hessian)
    _one_of(hessian, ("routed", "shared"), f"{where}: hessian", "GPTQ")
    if not 0 < damp <= 1:
        raise UsageError(f"{where}: damp {damp:g} is not in (0, 1]", hint="0.01 is usual")
    return GptqSpec(damp, hessian)
