"""The pictures of a report, as SVG. Nothing to show: an empty string.

Lines are told apart by dashes as well as by colour, failures by a sign as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from exporter.validate.report import axes
from exporter.validate.report.axes import Scale, Series, element, label, line, path
from exporter.validate.report.blocks import SIGNS, Mood

WIDTH = 400.0
_HEIGHT = 272.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 10.0, 44.0, 40.0
_LINES = 5  # told apart in one picture
_FAR = 1e15  # tokens, nats, bytes: nothing real is beyond
_SPARSE = 10.0**-15  # nats: below it is the rounding of float64


def quantiles(curves: Mapping[str, Series], floor: float | None) -> str:
    """Which KL a share of positions stays below. curves: (quantile, nats) by column; floor: nats, the noise."""
    curves = _shown(curves, 2)
    if not curves:
        return ""
    tails = [_tail(q) for curve in curves.values() for q, _ in curve if q < 1]
    end = max(tails, default=1.0) + 0.5
    low, high = axes.around([y for curve in curves.values() for _, y in curve if y > _SPARSE])
    x, y = Scale(0, end, _LEFT, WIDTH - _RIGHT), Scale(low, high, _HEIGHT - _BOTTOM, _TOP, log=True)
    marks = {"0": 0.0, "50%": 0.5, "90%": 0.9, "99%": 0.99, "99.9%": 0.999, "99.99%": 0.9999}
    ticks = [(x(_tail(q)), name) for name, q in marks.items() if _tail(q) <= end - 0.4]
    body = [*_log_rows(y), *_columns([*ticks, (x(end), "max")], "share of positions below"), _unit("KL, nats")]
    if floor is not None and low < floor < high:
        body += [line(_LEFT, y(floor), WIDTH - _RIGHT, y(floor), "mark")]
        body += [label(WIDTH - _RIGHT, y(floor) - 4, "noise floor", "quiet", "end")]
    placed = {
        name: [(x(_tail(q) if q < 1 else end), y(max(v, low))) for q, v in sorted(curve)]
        for name, curve in curves.items()
    }
    return _lines(f"KL by share of positions: {', '.join(curves)}", placed, body)


def _tail(quantile: float) -> float:
    """Decades of the share above: 0 for the median's side of things, 3 for one position in a thousand."""
    return -math.log10(1 - min(max(quantile, 0.0), 1 - 1e-9))


def positions(curves: Mapping[str, Series], marks: Mapping[str, int]) -> str:
    """Mean KL along a text. curves: (first position of a run, nats); marks: name -> position."""
    curves = _shown({name: [(max(p, 1), v) for p, v in sorted(curve)] for name, curve in curves.items()}, 2)
    if not curves:
        return ""
    last = max(p for curve in curves.values() for p, _ in curve)
    first = min(sorted(p for p, _ in curve)[min(1, len(curve) - 1)] for curve in curves.values()) / 2
    values = [v for curve in curves.values() for _, v in curve]
    low, high = axes.around([v for v in values if v > _SPARSE])
    x = Scale(max(min(first, last / 4), 1), last * 1.1, _LEFT, WIDTH - _RIGHT, log=True)
    y = Scale(low, high, _HEIGHT - _BOTTOM, _TOP, log=True)
    ticks = [4.0**n for n in range(20) if x.low <= 4.0**n <= x.high]
    body = [*_log_rows(y), *_columns([(x(t), f"{t:,.0f}") for t in ticks], "position in the text, tokens")]
    body.append(_unit("mean KL, nats"))
    for name, at in marks.items():
        if x.low < at < x.high:
            left, room = x(at), WIDTH - _RIGHT - x(at) > axes.width_of(name) + 3
            body.append(line(left, _TOP, left, _HEIGHT - _BOTTOM, "mark"))
            body.append(label(left + (3 if room else -3), _TOP + 9, name, "quiet", "start" if room else "end"))
    placed = {name: [(x(p), y(max(v, low))) for p, v in curve] for name, curve in curves.items()}
    return _lines(f"Mean KL by position in the text: {', '.join(curves)}", placed, body)


def _shown(curves: Mapping[str, Series], least: int) -> dict[str, Series]:
    """Those with enough points, which lie where a picture can have them."""
    kept = [(name, curve) for name, curve in curves.items() if len(curve) >= least][:_LINES]
    return {name: [(min(x, _FAR), min(y, _FAR)) for x, y in curve] for name, curve in kept}


def _log_rows(y: Scale) -> list[str]:
    ticks = axes.steps(y.low, y.high)
    rules = [line(_LEFT, y(t), WIDTH - _RIGHT, y(t), "rule") for t in ticks]
    return rules + [label(_LEFT - 6, y(t) + 4, axes.tick(t), "quiet", "end") for t in ticks]


def _columns(ticks: Sequence[tuple[float, str]], unit: str) -> list[str]:
    """Ticks below, without those that would touch the one before."""
    base, free, body = _HEIGHT - _BOTTOM, -math.inf, []
    for x, name in ticks:
        half = axes.width_of(name) / 2
        if x - half > free:
            body += [line(x, base, x, base + 4, "axis"), label(x, base + 17, name, "quiet", "middle")]
            free = x + half + 4
    return [
        line(_LEFT, base, WIDTH - _RIGHT, base, "axis"),
        *body,
        label(WIDTH - _RIGHT, _HEIGHT - 6, unit, "quiet", "end"),
    ]


def _unit(text: str) -> str:
    return label(0, 32, text, "quiet")


def _lines(title: str, placed: Mapping[str, Series], body: list[str]) -> str:
    """The lines, and above them which is which."""
    start = 0.0
    for i, (name, points) in enumerate(placed.items()):
        css, name = f"line s{i}", axes.clipped(name, 96)
        body += [path(points, css), line(start, 7, start + 18, 7, css), label(start + 23, 11, name)]
        start += 38 + axes.width_of(name)
    return axes.picture(WIDTH, _HEIGHT, title, body)


@dataclass(frozen=True)
class Bar:
    """A row of bars. parts: values laid end to end; low, high: the spread of the whole; written: at the right."""

    label: str
    parts: tuple[float, ...]
    written: str
    mood: Mood = ""
    low: float | None = None
    high: float | None = None


_ROW, _LINE, _HEAD = 31.0, 20.0, 20.0
_NAMES = 158.0  # wide: names of gates, on the line of their bars


def bars(title: str, rows: Sequence[Bar], scale: Scale, ticks: Mapping[float, str], mark: tuple[float, str]) -> str:
    """Rows of a label, a figure and a bar below them. mark: a line across, and its name; an empty name for none."""
    bottom = _HEAD + _ROW * len(rows)
    body = _behind(scale, bottom, ticks, mark)
    for i, row in enumerate(rows):
        top = _HEAD + _ROW * i
        name = SIGNS.get(row.mood, "") + axes.clipped(row.label, WIDTH - 30 - axes.width_of(row.written))
        figure = element("tspan", escape(row.written), dx=7, css="n") if row.written else ""
        css = f"t {row.mood}".strip()
        body.append(element("text", escape(name) + figure, x=0, y=top + 12, css=css))
        body += _bar(row, scale, top + 17)
    return axes.picture(WIDTH, bottom + 20, title, body)


def _behind(scale: Scale, bottom: float, ticks: Mapping[float, str], mark: tuple[float, str]) -> list[str]:
    """Rules, their names below, and the mark."""
    body, free = [line(scale(t), _HEAD, scale(t), bottom, "rule") for t in ticks], -math.inf
    for value, name in ticks.items():
        half = axes.width_of(name) / 2
        x = min(max(scale(value), half), WIDTH - half)
        if x - half > free:
            body.append(label(x, bottom + 15, name, "quiet", "middle"))
            free = x + half + 4
    if mark[1]:
        x = scale(mark[0])
        anchor = "end" if x > WIDTH / 2 else "start"
        body += [line(x, 14, x, bottom, "mark limit"), label(x, 10, mark[1], "quiet", anchor)]
    return body


def _bar(row: Bar, scale: Scale, top: float) -> list[str]:
    """Seven units high, from `top`."""
    body, at = [], scale.low if scale.log else 0.0
    for i, part in enumerate(row.parts):
        left, right = scale(at), scale(part if scale.log else at + part)
        css = f"bar {row.mood or f'p{i % 4}'}"
        body.append(element("rect", x=left, y=top, width=max(right - left, 1.0), height=7.0, css=css))
        at += part
    if row.low is not None and row.high is not None and row.high > row.low:
        low, high, middle = scale(row.low), scale(row.high), top + 3.5
        body.append(line(low, middle, high, middle, "spread"))
        body += [line(end, middle - 4, end, middle + 4, "spread") for end in (low, high)]
    return body


def shares_of_limits(rows: Sequence[tuple[str, float, bool]]) -> str:
    """Gates: how much of what it allows each takes. rows: (name, value over limit, passed)."""
    if not rows:
        return ""
    scale = Scale(1e-3, 10.0, _NAMES, WIDTH, log=True)
    bottom = _HEAD + _LINE * len(rows)
    ticks = {0.001: "0.1%", 0.01: "1%", 0.1: "10%", 1.0: "100%", 10.0: "10 x"}
    body = _behind(scale, bottom, ticks, (1.0, "the limit"))
    for i, (name, share, passed) in enumerate(rows):
        top = _HEAD + _LINE * i
        row = Bar(name, (min(max(share, scale.low * 1.02), scale.high),), "", "good" if passed else "bad")
        body.append(label(0, top + 14, SIGNS[row.mood] + axes.clipped(name, _NAMES - 20), row.mood))
        body += _bar(row, scale, top + 7)
    return axes.picture(WIDTH, bottom + 20, "Each gate's value as a share of what its limit allows", body)


def amounts(title: str, rows: Sequence[Bar], write: Callable[[float], str], mark: tuple[float, str] = (0.0, "")) -> str:
    """Bars from zero. write: how a tick is written; mark: a limit, drawn where it is not far beyond the bars."""
    rows = [row for row in rows if max(sum(row.parts), row.high or 0) < _FAR]
    ends = [max(sum(row.parts), row.high or 0) for row in rows]
    most = max(ends, default=0.0)
    if not most > 0:
        return ""
    shown = mark if 0 < mark[0] <= 4 * most else (0.0, "")
    scale = Scale(0, max(most, shown[0]) * 1.02, 0, WIDTH)
    return bars(title, rows, scale, {tick: write(tick) for tick in axes.even(scale.high)}, shown)
