"""A recipe says which numbers: ordered rules over tensor names, the first match wins.

No inheritance and no imports: the file says the whole truth, and its hash goes into the manifest.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from exporter.errors import Refused, UsageError, did_you_mean
from exporter.types import toml
from exporter.types.scheme import Scheme
from exporter.types.tensor import TensorSpec

Method = Literal["keep", "pass", "repack", "rtn"]
METHODS: dict[str, str] = {
    "keep": "floats stay as they are",
    "pass": "released codes are moved, bit for bit",
    "rtn": "round to nearest",
}


@dataclass(frozen=True)
class Rule:
    """`otherwise`: for "pass" only, the MXFP4 scale rule for blocks that are not on the grid (bf16 fine-tunes)."""

    match: tuple[str, ...]
    method: str
    scheme: Scheme | None
    otherwise: str | None

    def matches(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.match)


@dataclass(frozen=True)
class Step:
    """What happens to one tensor. "repack": float blocks on the MXFP4 grid move exactly, others are rounded."""

    spec: TensorSpec
    method: Method
    source: Scheme
    scheme: Scheme

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def by_reference(self) -> bool:
        """Whether the store points at the checkpoint instead of holding the numbers."""
        return self.method in ("keep", "pass")

    @property
    def stored_bytes(self) -> int:
        """Codes, scales and zeros of the whole tensor."""
        return math.prod(self.spec.shape[:-1]) * self.scheme.row_bytes(self.spec.shape[-1])


@dataclass(frozen=True)
class Recipe:
    """`sha256` is of the file's text."""

    name: str
    title: str
    rules: tuple[Rule, ...]
    sha256: str

    @staticmethod
    def from_toml(text: str, name: str, where: str) -> Recipe:
        table = toml.Table(toml.parse(text, where), where, ("title", "rule"))
        rules = table.get("rule", list)
        return Recipe(
            name=name,
            title=table.get("title", str),
            rules=tuple(_rule(r, f"{where} rule {i}") for i, r in enumerate(rules, 1)),
            sha256=hashlib.sha256(text.encode()).hexdigest(),
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
        return Step(spec, method, source, scheme)

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
        if source.name == rule.scheme.name:
            return "pass", source
        if rule.otherwise is None or source.kind != "float":
            raise Refused(
                f"recipe {self.name} passes {rule.scheme.name} through, but {spec.name} is stored as {source.name}",
                hint='add otherwise = "mse" to the rule to round what is not on the grid',
            )
        return "repack", rule.scheme.with_rule(rule.otherwise)


_RULE_KEYS = ("match", "method", "scheme", "scale_rule", "otherwise")
_SCALE_RULES = {"e2m1": ("mse", "floor", "ceil6", "round175"), "int": ("absmax",), "float": ()}


def _rule(raw: object, where: str) -> Rule:
    table = toml.Table(raw, where, _RULE_KEYS)
    match = table.get("match", (str, list))
    method = table.get("method", str)
    if method not in METHODS:
        raise UsageError(
            f'{where}: unknown method "{method}".{did_you_mean(method, METHODS)}',
            hint=f"methods: {', '.join(METHODS)}",
        )
    name, scale_rule = table.raw.get("scheme"), table.raw.get("scale_rule")
    scheme = _scheme(name, scale_rule, where) if isinstance(name, str) else None
    if (method == "keep") != (scheme is None):
        problem = "keep takes no scheme" if scheme else f'method "{method}" needs a scheme'
        raise UsageError(f"{where}: {problem}", hint='e.g. method = "rtn", scheme = "int8-g32"')
    otherwise = table.raw.get("otherwise")
    if scheme and method == "rtn" and scheme.kind == "e2m1" and scale_rule is None:
        raise UsageError(f"{where}: rounding to mxfp4 needs a scale_rule", hint='e.g. scale_rule = "mse"')
    for key, value, only in (("scale_rule", scale_rule, "rtn"), ("otherwise", otherwise, "pass")):
        if value is not None and method != only:
            raise UsageError(f'{where}: {key} does nothing with method "{method}"', hint=f"it goes with {only}")
        if value is not None and (scheme is None or value not in _SCALE_RULES[scheme.kind]):
            allowed = _SCALE_RULES[scheme.kind] if scheme else ()
            raise UsageError(
                f"{where}: {key} {value!r} does not fit{did_you_mean(str(value), allowed)}",
                hint=f"one of: {', '.join(allowed) or 'none for this scheme'}",
            )
    patterns = (match,) if isinstance(match, str) else tuple(str(m) for m in match)
    return Rule(patterns, method, scheme, otherwise)


def _scheme(name: str, scale_rule: str | None, where: str) -> Scheme:
    try:
        return Scheme.parse(name, scale_rule)
    except UsageError as e:
        raise UsageError(f"{where}: {e.message}", e.hint) from None
