"""Pieces of a picture: elements of SVG as text, scales from values to places, and where their ticks are.

Places have one decimal, so that the same figures give the same bytes. Colours are variables of the page (style.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Series = Sequence[tuple[float, float]]
_SUPER = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_EM = 0.56  # mean width of a letter, of the size of the font


def place(value: float) -> str:
    """ "12.5", "12"; never "-0"."""
    written = f"{value:.1f}".removesuffix(".0")
    return "0" if written == "-0" else written


def element(name: str, inner: str = "", **attributes: float | str) -> str:
    """An element; `css` is its class, an underscore in a name a hyphen. `inner` is markup already."""
    given = {"class" if key == "css" else key.replace("_", "-"): value for key, value in attributes.items()}
    said = "".join(f' {k}="{escape(v) if isinstance(v, str) else place(v)}"' for k, v in given.items())
    return f"<{name}{said}>{inner}</{name}>" if inner else f"<{name}{said}/>"


def label(x: float, y: float, text: str, css: str = "", anchor: str = "start") -> str:
    return element("text", escape(text) or " ", x=x, y=y, css=f"t {css}".strip(), text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, css=css)


def path(points: Series, css: str) -> str:
    return element("path", d="M" + "L".join(f"{place(x)} {place(y)}" for x, y in points), css=css)


def picture(width: float, height: float, title: str, body: Sequence[str]) -> str:
    """An SVG for a page: as wide as its place, and named for those who do not see it."""
    name = element("title", escape(title) or " ")
    box = f"0 0 {place(width)} {place(height)}"
    return f'<svg class="plot" viewBox="{box}" role="img" aria-label="{escape(title)}">{name}{"".join(body)}</svg>'


def width_of(text: str, size: float = 11) -> float:
    """About how wide a text is, in the units of the picture."""
    return len(text) * size * _EM


def clipped(text: str, width: float, size: float = 11) -> str:
    """As much of a text as has room."""
    room = int(width / (size * _EM))
    return text if len(text) <= room else text[: max(room - 1, 1)] + "…"


@dataclass(frozen=True)
class Scale:
    """Values low ... high to places start ... stop; what lies beyond is put on the edge."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.stop - self.start)


_STEPS = (1.0, 2.0, 5.0)


def steps(low: float, high: float, most: int = 8) -> list[float]:
    """Where a logarithmic axis has its ticks: powers of ten, thinned; 1, 2, 5 between them where there is room."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    fine = [k * 10.0**n for n in range(first, last + 1) for k in _STEPS]
    fine = [value for value in fine if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
    if len(fine) <= most:
        return fine
    step = max(1, math.ceil((last - first + 1) / most))
    return [value for n in range(first, last + 1, step) if low * (1 - 1e-9) <= (value := 10.0**n) <= high * (1 + 1e-9)]


def tick(value: float) -> str:
    """ "10⁻⁴" for a power of ten; numbers that people read at once as they are."""
    if 1e-4 < value < 1e5:
        return f"{value:,.6g}"
    exponent = math.floor(math.log10(value) + 1e-9)
    digit = round(value / 10.0**exponent)
    return ("" if digit == 1 else f"{digit}·") + f"10{str(exponent).translate(_SUPER)}"


def around(values: Sequence[float], most_decades: float = 8) -> tuple[float, float]:
    """Round ends (1, 2 or 5) of a logarithmic axis for the positive values; no more decades than there is room for."""
    found = [value for value in values if value > 0] or [1.0]
    high, low = max(found), max(min(found), max(found) * 10.0**-most_decades, 1e-300)
    while high / low < 8:  # not a hair's breadth over the whole height
        high, low = high * 1.5, low / 1.5
    return _round(low, up=False), _round(high, up=True)


def _round(value: float, up: bool) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    if up:
        return next(power * k for k in (*_STEPS, 10.0) if power * k >= value * (1 - 1e-9))
    return next(power * k for k in reversed(_STEPS) if power * k <= value * (1 + 1e-9))


def even(high: float, most: int = 5) -> list[float]:
    """Round steps from 0 to at most `high`."""
    if not high > 0:
        return [0.0]
    unit = 10.0 ** math.floor(math.log10(high / most))
    step = next(unit * k for k in (1, 2, 5, 10, 20) if high / (unit * k) <= most)
    return [step * n for n in range(int(high / step + 1e-9) + 1)]
