"""Which layers have which scheme, as the regular expressions that configurations of readers use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from exporter.types import Scheme
from exporter.types.recipe import Step

_LAYER = re.compile(r"\.layers\.(\d+)\.")


def patterns(steps: Iterable[Step], every: Sequence[Step]) -> list[str]:
    """Regular expressions, anchored at both ends, for the layers that hold `steps` and for no other of `every`."""
    numbers: dict[str, set[str]] = {}
    for step in steps:
        kind, number = _kind(step)
        numbers.setdefault(kind, set()).add(number)
    everywhere: dict[str, set[str]] = {}
    for step in every:
        kind, number = _kind(step)
        everywhere.setdefault(kind, set()).add(number)
    found = []
    for kind, some in numbers.items():
        which = r"\d+" if some == everywhere[kind] else f"(?:{'|'.join(sorted(some, key=int))})"
        found.append(rf"^{kind.replace('#', which)}$")
    return found


def _kind(step: Step) -> tuple[str, str]:
    r"""The layer of a weight as an expression with # for its number: (r"model\.layers\.#\.self_attn\.q_proj", "3")."""
    layer = step.name.rpartition(".")[0]
    number = match[1] if (match := _LAYER.search(layer)) else "0"
    kind = re.escape(_LAYER.sub(".layers.#.", layer)).replace(r"\#", "#")
    return kind.replace(r"\.experts\.", r"\.experts\.\d+\."), number


def by_scheme(steps: Iterable[Step]) -> dict[str, list[Step]]:
    """Quantized steps by the name of their scheme, the one of most numbers first."""
    groups: dict[str, list[Step]] = {}
    for step in steps:
        if step.scheme.kind != "float":
            groups.setdefault(step.scheme.name, []).append(step)
    return dict(sorted(groups.items(), key=lambda item: -sum(s.spec.elements for s in item[1])))


def refuse_integers(scheme: Scheme) -> str | None:
    """Why a scheme is not what these files can hold exactly: integers without zero points, float16 scales."""
    if scheme.kind == "int" and not scheme.symmetric:
        return f"{scheme.name} has zero points, which are not written"
    if scheme.kind == "int" and scheme.scale != "f16":
        return f"{scheme.name} has {scheme.scale} scales; float16 ones are written"
    return None
