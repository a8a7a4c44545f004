"""Size against KL of several artifacts, with labels that overlap neither each other nor a point."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from exporter.validate.report import axes
from exporter.validate.report.axes import Scale, element, label, line, path

_WIDTH, _HEIGHT = 560.0, 380.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 16.0, 30.0, 42.0
_LETTERS = 11.0  # height of a label's letters
_DOT = 5.0
_REACH = (0.0, 16.0, 30.0, 46.0, 64.0, 84.0, 106.0)  # how far from its point a label may go
_BARE = 1e-15  # nats: drawn at the lower edge


@dataclass(frozen=True)
class Point:
    """An artifact: bytes and nats; low, high: the interval of the mean."""

    label: str
    size: float
    kl: float
    low: float | None = None
    high: float | None = None
    passed: bool = True
    best: bool = False


@dataclass(frozen=True)
class Box:
    """Edges of a rectangle."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def inside(self, other: Box) -> bool:
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )


def place(points: Sequence[tuple[float, float]], widths: Sequence[float], room: Box) -> list[Box | None]:
    """Where each point's label goes: the nearest free place; None where there is none.

    The most crowded point chooses first. Labels keep clear of every point and of every label before them.
    """
    dots = [Box(x - _DOT - 1, y - _DOT - 1, x + _DOT + 1, y + _DOT + 1) for x, y in points]
    crowd = [sum(math.dist(p, q) < 60 for q in points) for p in points]
    placed: list[Box | None] = [None] * len(points)
    for i in sorted(range(len(points)), key=lambda i: (-crowd[i], points[i])):
        taken = dots + [box for box in placed if box]
        free = (box for box in _candidates(points[i], widths[i]) if box.inside(room) and not any(map(box.meets, taken)))
        placed[i] = next(free, None)
    return placed


def _candidates(point: tuple[float, float], width: float) -> Iterator[Box]:
    """Right of the point, left, above, below; then farther away, around it."""
    x, y = point
    for far in _REACH:
        for turn in range(4 if far == 0 else 12):
            angle = (0, math.pi, math.pi * 1.5, math.pi / 2)[turn] if far == 0 else turn * math.pi / 6
            across, down = math.cos(angle), math.sin(angle)
            middle = x + across * (far + _DOT + 4 + width / 2), y + down * (far + _DOT + 8)
            yield Box(middle[0] - width / 2, middle[1] - 6.5, middle[0] + width / 2, middle[1] + 6.5)


def scatter(points: Sequence[Point], unit: str, write: Callable[[float], str]) -> str:
    """The picture, or "" with fewer than two points. unit: what is on the vertical axis; write: sizes in words."""
    if len(points) < 2:
        return ""
    x, y = _scales(points)
    body = [*_grid(x, y, unit, write), *_front(points, x, y)]
    at = [(x(p.size), y(max(p.kl, y.low))) for p in points]
    names = [axes.clipped(_name(p), 190) for p in points]
    room = Box(_LEFT, _TOP - 8, _WIDTH, _HEIGHT - _BOTTOM)
    boxes = place(at, [axes.width_of(name, _LETTERS) for name in names], room)
    body += [
        line(x(p.size), y(p.low), x(p.size), y(p.high), "spread")
        for p in points
        if p.low is not None and p.high is not None and p.low > 0
    ]
    for p, name, (px, py), box in zip(points, names, at, boxes, strict=True):
        css = "dot" if p.passed and not p.best else "dot best" if p.passed else "dot bad"
        if box is not None:
            body += _leader(px, py, box)
            body.append(label(box.left, box.bottom - 3, name, "best-name" if p.best else ""))
        body.append(element("circle", cx=px, cy=py, r=_DOT, css=css))
    return axes.picture(_WIDTH, _HEIGHT, f"Size against {unit}", body)


def _name(point: Point) -> str:
    """With what a failed gate and a KL of nothing, which has no place on the axis, need said."""
    return f"{'' if point.passed else '✗ '}{point.label}{'' if point.kl > _BARE else ': 0'}"


def _scales(points: Sequence[Point]) -> tuple[Scale, Scale]:
    sizes = [p.size for p in points]
    low, high = axes.around([v for p in points for v in (p.kl, p.low or 0, p.high or 0) if v > _BARE])
    pad = (max(sizes) - min(sizes)) * 0.12 or max(sizes) * 0.2
    across = Scale(max(min(sizes) - pad, 0), max(sizes) + pad, _LEFT, _WIDTH - _RIGHT)
    return across, Scale(low, high, _HEIGHT - _BOTTOM, _TOP, log=True)


def _grid(x: Scale, y: Scale, unit: str, write: Callable[[float], str]) -> list[str]:
    base, end = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    body = [line(_LEFT, y(t), end, y(t), "rule") for t in axes.steps(y.low, y.high)]
    body += [label(_LEFT - 6, y(t) + 4, axes.tick(t), "quiet", "end") for t in axes.steps(y.low, y.high)]
    step = axes.even(x.high - x.low, 8)
    width = step[1] if len(step) > 1 else x.high - x.low
    first = math.ceil(x.low / width)
    for t in (width * n for n in range(first, int(x.high / width + 1e-9) + 1)):
        body += [line(x(t), base, x(t), base + 4, "axis"), label(x(t), base + 17, write(t), "quiet", "middle")]
    body += [line(_LEFT, base, end, base, "axis"), label(end, _HEIGHT - 6, "size of the files", "quiet", "end")]
    return [*body, label(0, 12, unit, "quiet")]


def _front(points: Sequence[Point], x: Scale, y: Scale) -> list[str]:
    """The line below which nothing is: from one of the best to the next."""
    best = sorted((x(p.size), y(max(p.kl, y.low))) for p in points if p.best)
    if len(best) < 2:
        return []
    steps = [best[0]]
    for px, py in best[1:]:
        steps += [(px, steps[-1][1]), (px, py)]
    return [path(steps, "front")]


def _leader(px: float, py: float, box: Box) -> list[str]:
    """A line to a label that had to go away from its point."""
    x, y = min(max(px, box.left), box.right), min(max(py, box.top), box.bottom)
    return [line(px, py, x, y, "lead-line")] if math.dist((px, py), (x, y)) > _DOT + 12 else []
