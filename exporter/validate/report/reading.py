"""A report's values, whatever a file says: an absent, damaged or odd one is None, and never an error."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from typing import Any

_CLIP = 200  # characters of a name or a reason


def at(value: Any, path: str) -> Any:
    """The value at a dotted path of keys, or None."""
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def number(value: Any, path: str = "") -> float | None:
    """A finite number; True and False are none."""
    value = at(value, path) if path else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def flag(value: Any, path: str = "") -> bool | None:
    value = at(value, path) if path else value
    return value if isinstance(value, bool) else None


def words(value: Any, path: str = "", clip: int = _CLIP) -> str:
    """One printable line, at most `clip` characters; "" for what is no text.

    Line ends become spaces. What does not print, and marks that turn the direction of writing (in a file's name they
    can make one word look like another), become "?".
    """
    value = at(value, path) if path else value
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value) if isinstance(value, float) or abs(value) < 10**clip else ""
    if not isinstance(value, str):
        return ""
    line = " ".join(value[: 4 * clip].split())
    line = "".join(c if c == " " or (c.isprintable() and unicodedata.category(c) != "Cf") else "?" for c in line)
    return line if len(line) <= clip else line[: clip - 1] + "…"


def table(value: Any, path: str = "") -> Mapping[str, Any]:
    """A mapping; an empty one for anything else."""
    value = at(value, path) if path else value
    return value if isinstance(value, Mapping) else {}


def listed(value: Any, path: str = "") -> list[Any]:
    """A list; an empty one for anything else."""
    value = at(value, path) if path else value
    return list(value) if isinstance(value, list | tuple) else []


def pairs(value: Any) -> list[tuple[float, float]]:
    """Those of a list of [x, y] that are two finite numbers."""
    found = []
    for each in listed(value):
        if len(both := listed(each)) == 2:
            x, y = number(both[0]), number(both[1])
            if x is not None and y is not None:
                found.append((x, y))
    return found
