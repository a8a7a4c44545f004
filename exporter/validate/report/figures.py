"""How figures are written, the same in every table, sentence and picture. None is a dash: not measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from exporter.types.sizes import format_size
from exporter.validate.report.reading import listed, number

NONE = "–"  # noqa: RUF001  # a dash as wide as a digit


def plain(value: float | None) -> str:
    """Three digits: "0.00251", "2.51e-07", "1,240"."""
    if value is None:
        return NONE
    return f"{value:.3g}" if abs(value) < 999.5 else large(value)


def large(value: float) -> str:
    return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.3g}"


def share(value: float | None) -> str:
    """Percent; more digits where two would say all or nothing."""
    if value is None:
        return NONE
    for digits in (2, 4, 6):
        written = f"{value:.{digits}%}"
        if value in (0, 1) or (written.strip("-0.%") and not (value < 1 and written.startswith("100"))):
            return written
    return f"{value * 100:.2g}%"


def count(value: float | None) -> str:
    return NONE if value is None else large(value)


def size(value: float | None) -> str:
    return NONE if value is None else format_size(value) if abs(value) < 1e18 else f"{value:.3g} B"


def rate(value: float | None) -> str:
    """Tokens per second."""
    if value is None:
        return NONE
    return f"{value:.3g}" if abs(value) < 100 else large(value)


def deviation(value: float | None) -> str:
    """ " ± 5.7" behind a mean; "" where it was not measured."""
    if value is None:
        return ""
    if 1e-8 < value < 0.001:  # not 9e-05 beside 0.0009
        return f" ± {value:.{1 - math.floor(math.log10(value))}f}".rstrip("0")
    return f" ± {value:.2g}" if abs(value) < 99.5 else f" ± {large(value)}"


def perplexity(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}" if abs(value) < 100 else plain(value)


def ratio(value: float | None) -> str:
    """Of what is near one: "1.0169"."""
    return NONE if value is None else (f"{value:.4f}" if 0.001 <= abs(value) < 1000 else plain(value))


def interval(value: Any, write: Callable[[float | None], str] = plain) -> str:
    """ "0.0017 to 0.0034" for [low, high]; "" for none."""
    ends = [number(each) for each in listed(value)]
    if len(ends) != 2 or None in ends:
        return ""
    return f"{write(ends[0])} to {write(ends[1])}"


def seconds(value: float | None) -> str:
    return NONE if value is None else f"{value:.3g} s" if value < 999.5 else f"{value:,.0f} s"


def number_of(n: int, one: str, many: str = "") -> str:
    """ "1 gate", "3 gates"."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"
