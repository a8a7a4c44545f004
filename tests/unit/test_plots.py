"""The pictures: well-formed, true to their figures, inside their frames, and nothing where there is nothing to show."""

from __future__ import annotations

import math
import random
import xml.etree.ElementTree as ET

import pytest

from exporter.validate.report import axes, figures, plots
from exporter.validate.report.axes import Scale
from exporter.validate.report.comparison import Entry, compare, picture
from exporter.validate.report.html import alone
from exporter.validate.report.plots import Bar
from exporter.validate.report.scatter import Box, Point, place, scatter
from tests import report_sample as sample

CURVES = {"conversations": sample.curve(0.0025), "plain text": sample.curve(0.0041)}
ALONG = {"plain text": sample.by_position(0.0041, 2048), "long text": sample.by_position(0.0047, 8192)}
MARKS = {"window": 128, "4,096": 4096}
GATES = [("release_kl_mean", 0.25, True), ("long_kl_mean", 31.0, False), ("cached_difference", 0.0, True)]
SPEEDS = [Bar("pp512", (143.2,), "143", low=133.0, high=150.0), Bar("pp2048", (131.0,), "131", low=131.0, high=131.0)]
POINTS = [Point("a", 12.1e9, 0.0025, 0.002, 0.003, best=True), Point("b", 13.8e9, 0.0009, best=True)]
POINTS += [Point("c", 11.6e9, 0.041, passed=False), Point("d", 23e9, 0.0011)]
DRAWN = {
    "quantiles": plots.quantiles(CURVES, 0.00011),
    "positions": plots.positions(ALONG, MARKS),
    "gates": plots.shares_of_limits(GATES),
    "speed": plots.amounts("Speed", SPEEDS, figures.count),
    "memory": plots.amounts("Memory", [Bar("m", (9e9, 1e9), "10 GB")], figures.size, (12e9, "the limit")),
    "scatter": scatter(POINTS, "mean KL, nats", figures.size),
}


def parts(svg, tag, css=""):
    found = list(ET.fromstring(svg).iter(tag))
    return [each for each in found if not css or css in each.get("class", "").split()]


def points_of(path):
    return [tuple(map(float, pair.split())) for pair in path.get("d")[1:].split("L")]


def frame(svg):
    return [float(n) for n in ET.fromstring(svg).get("viewBox").split()]


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_is_named_and_keeps_to_its_frame(name):
    svg = DRAWN[name]
    root = ET.fromstring(svg)
    assert root.find("title").text == root.get("aria-label")
    _, _, width, height = frame(svg)
    for each in root.iter():
        for key in ("x", "x1", "x2", "cx"):
            assert -0.1 <= float(each.get(key, 0)) <= width + 0.1, (each.attrib, key)
        for key in ("y", "y1", "y2", "cy"):
            assert -0.1 <= float(each.get(key, 0)) <= height + 0.1, (each.attrib, key)
        if each.tag == "rect":
            assert float(each.get("x")) + float(each.get("width")) <= width + 1
        if each.tag == "path":
            assert all(0 <= x <= width and 0 <= y <= height for x, y in points_of(each))
        if each.tag == "text":
            x, wide = float(each.get("x")), axes.width_of("".join(each.itertext()), 10)
            x -= {"end": wide, "middle": wide / 2}.get(each.get("text-anchor"), 0)
            assert -3 <= x <= width - wide + 14, "".join(each.itertext())


@pytest.mark.parametrize("name", DRAWN)
def test_ticks_do_not_touch(name):
    """Texts of one row do not overlap, by the width that letters have."""
    rows = {}
    for each in parts(DRAWN[name], "text"):
        text = "".join(each.itertext())
        wide = axes.width_of(text, 9.5)
        x = float(each.get("x")) - {"end": wide, "middle": wide / 2}.get(each.get("text-anchor"), 0)
        rows.setdefault(each.get("y"), []).append((x, x + wide, text))
    for row in rows.values():
        for (_, end, left), (start, _, right) in zip(sorted(row), sorted(row)[1:], strict=False):
            assert end <= start + 1, (left, right)


@pytest.mark.parametrize("name", DRAWN)
def test_lines_of_a_picture_are_named_with_units(name):
    text = "".join(ET.fromstring(DRAWN[name]).itertext())
    told = {
        "quantiles": ("KL, nats", "share of positions below", "99.9%", "noise floor", "conversations", "plain text"),
        "positions": ("mean KL, nats", "position in the text, tokens", "window", "4,096"),
        "gates": ("✓ release_kl_mean", "✗ long_kl_mean", "the limit", "100%"),
        "speed": ("pp512", "143", "150"),
        "memory": ("10 GB", "the limit"),
        "scatter": ("mean KL, nats", "size of the files", "✗ c", "GB"),
    }
    assert [each for each in told[name] if each not in text] == []


@pytest.mark.parametrize(
    "svg",
    [
        plots.quantiles({}, None),
        plots.quantiles({"a": [], "b": [(0.5, 0.1)]}, 0.1),
        plots.positions({"a": []}, MARKS),
        plots.shares_of_limits([]),
        plots.amounts("x", [], figures.count),
        plots.amounts("x", [Bar("a", (0.0,), "0")], figures.count),
        scatter([], "KL", figures.size),
        scatter(POINTS[:1], "KL", figures.size),
    ],
)
def test_nothing_to_show_is_no_picture(svg):
    assert svg == ""


def test_a_curve_rises_with_its_quantiles():
    lines = parts(DRAWN["quantiles"], "path", "line")
    assert len(lines) == 2
    for line, curve in zip(lines, CURVES.values(), strict=True):
        placed = points_of(line)
        assert len(placed) == len(curve)
        assert placed == sorted(placed, key=lambda p: (p[0], -p[1]))
    # 1.64 times the KL is the same way up everywhere.
    gaps = [low[1] - high[1] for low, high in zip(*map(points_of, lines), strict=True)]
    assert min(gaps) > 0
    assert max(gaps) - min(gaps) < 0.3


def test_rare_positions_have_room():
    (line, _) = parts(DRAWN["quantiles"], "path", "line")
    placed = dict(zip([q for q, _ in CURVES["conversations"]], points_of(line), strict=True))
    assert placed[0.999][0] - placed[0.99][0] > 50
    assert placed[1.0][0] - placed[0.999][0] > 20


def test_marks_stand_at_their_positions():
    svg = DRAWN["positions"]
    marks = sorted(float(each.get("x1")) for each in parts(svg, "line", "mark"))
    labels = {"".join(each.itertext()): float(each.get("x")) for each in parts(svg, "text")}
    ticks = {name: x for name, x in labels.items() if name in ("64", "256", "1,024")}
    middle = (ticks["64"] + ticks["256"]) / 2
    assert abs(marks[0] - middle) < 0.2  # 128, on a logarithmic axis
    assert abs(marks[1] - (ticks["1,024"] + ticks["256"] - ticks["64"])) < 0.2  # 4,096
    assert parts(plots.positions({"a": [(0, 0.1), (8, 0.1), (16, 0.2)]}, MARKS), "line", "mark") == []


def test_a_gate_that_fails_crosses_the_limit():
    svg = DRAWN["gates"]
    (limit,) = [float(each.get("x1")) for each in parts(svg, "line", "limit")]
    ends = [float(r.get("x")) + float(r.get("width")) for r in parts(svg, "rect")]
    assert [end > limit for end in ends] == [False, True, False]
    assert [r.get("class") for r in parts(svg, "rect")] == ["bar good", "bar bad", "bar good"]
    assert ends[2] < ends[0]


def test_a_spread_is_as_long_as_its_runs_differ():
    spreads = [each for each in parts(DRAWN["speed"], "line", "spread") if each.get("y1") == each.get("y2")]
    (rect, _) = parts(DRAWN["speed"], "rect")
    unit = float(rect.get("width")) / 143.2
    assert [round((float(s.get("x2")) - float(s.get("x1"))) / unit) for s in spreads] == [17]


def test_parts_are_laid_end_to_end():
    first, second = parts(DRAWN["memory"], "rect")
    assert float(first.get("x")) + float(first.get("width")) == pytest.approx(float(second.get("x")), abs=0.11)
    assert float(first.get("width")) == pytest.approx(9 * float(second.get("width")), abs=1)
    far = plots.amounts("Memory", [Bar("m", (1e7,), "10 MB")], figures.size, (16e9, "the limit"))
    assert parts(far, "line", "limit") == []  # a bar beside it would be a hair


def test_what_is_drawn_is_escaped():
    name = "<script>&\"'"
    for svg in (
        plots.quantiles({name: CURVES["plain text"], "b": CURVES["conversations"]}, None),
        plots.shares_of_limits([(name, 0.5, True)]),
        plots.amounts(name, [Bar(name, (1.0,), name)], figures.count),
        scatter([Point(name, 1e9, 0.1), Point(name, 2e9, 0.2)], name, figures.size),
    ):
        assert name in "".join(ET.fromstring(svg).itertext())


@pytest.mark.parametrize("value", [0.0, 5e-324, 1e-13, 1.0, 1e30, 1e300, -1.0])
def test_odd_values_are_drawn_somewhere(value):
    pair = [(0.0, value), (0.5, value), (1.0, value)]
    for svg in (
        plots.quantiles({"a": pair, "b": CURVES["plain text"]}, value),
        plots.quantiles({"a": pair}, None),
        plots.positions({"a": [(value, value), (2, value), (1e300, value)]}, MARKS),
        plots.shares_of_limits([("a", value, False)]),
        plots.amounts("x", [Bar("a", (abs(value),), ""), Bar("b", (1.0,), "")], figures.count),
        scatter([Point("a", 1e9, value), Point("b", 1e9, value)], "KL", figures.size),
    ):
        assert svg.count("<svg") == 1
        assert "nan" not in svg
        assert "inf" not in svg
        ET.fromstring(svg)


# Scales


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1e-3, 1e-2, [0.001, 0.002, 0.005, 0.01]),
        (1e-5, 1.0, [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]),
        (1e-12, 1.0, [1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2, 1.0]),
    ],
)
def test_ticks_of_a_logarithmic_axis(low, high, expected):
    assert axes.steps(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "said"), [(1e-5, "10⁻⁵"), (2e-7, "2·10⁻⁷"), (0.005, "0.005"), (1e6, "10⁶"), (1, "1")]
)
def test_how_a_tick_is_written(value, said):
    assert axes.tick(value) == said


@pytest.mark.parametrize("values", [[0.003], [1e-9, 1.0], [2.0, 2.0], [], [0.0], [1e-30, 1e-3]])
def test_an_axis_encloses_its_values(values):
    low, high = axes.around(values)
    assert 0 < low < high
    assert high >= max([v for v in values if v > 0], default=0)
    assert high / low <= 1e11
    assert Scale(low, high, 0, 100, log=True)(math.sqrt(low * high)) == pytest.approx(50)


def test_even_steps():
    assert axes.even(16.3) == [0, 5, 10, 15]
    assert axes.even(0) == [0.0]
    assert Scale(0, 10, 100, 0)(2.5) == 75
    assert Scale(0, 10, 100, 0)(25) == 0  # on the edge


# Labels


def overlaps(boxes):
    found = [box for box in boxes if box]
    return [(a, b) for i, a in enumerate(found) for b in found[:i] if a.meets(b)]


@pytest.mark.parametrize("seed", range(12))
def test_labels_overlap_neither_each_other_nor_a_point(seed):
    draw = random.Random(seed)
    n = draw.choice([3, 8, 20, 40])
    spread = draw.choice([4, 60, 300])
    points = [(280 + draw.uniform(-spread, spread) / 1.4, 190 + draw.uniform(-spread, spread) / 2) for _ in range(n)]
    room = Box(40, 20, 560, 340)
    widths = [draw.uniform(20, 130) for _ in range(n)]
    boxes = place(points, widths, room)
    assert overlaps(boxes) == []
    assert all(box.inside(room) for box in boxes if box)
    for x, y in points:
        assert not any(box.meets(Box(x - 5, y - 5, x + 5, y + 5)) for box in boxes if box)
    if n <= 8:
        assert None not in boxes
    assert place(points, widths, room) == boxes


def test_an_overlap_is_found():
    """The check above can fail."""
    assert overlaps([Box(0, 0, 10, 10), Box(9, 9, 20, 20)])
    assert not overlaps([Box(0, 0, 10, 10), Box(10, 0, 20, 10), None])


def test_the_line_of_the_best_goes_through_them():
    svg = DRAWN["scatter"]
    (front,) = parts(svg, "path", "front")
    best = {(float(c.get("cx")), float(c.get("cy"))) for c in parts(svg, "circle", "best")}
    assert len(best) == 2
    assert best <= set(points_of(front))
    assert len(parts(svg, "circle", "bad")) == 1


def test_a_kl_of_nothing_has_no_place_and_is_said():
    svg = scatter([*POINTS, Point("exact", 14e9, 0.0, 0.0, 0.0, best=True)], "KL", figures.size)
    text = "".join(ET.fromstring(svg).itertext())
    assert "exact: 0" in text
    assert "b: 0" not in text


def test_a_picture_alone_is_a_file_of_its_own():
    entries = [Entry(f"a{n}", "", sample.small(f"a{n}", 10**10 + n * 10**9, 0.002 / (n + 1))) for n in range(3)]
    svg = alone(picture(compare(entries)))
    root = ET.fromstring(svg.encode())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("width") == root.get("viewBox").split()[2]
    assert svg.count("http") == 1  # its namespace
    assert "prefers-color-scheme" in svg
    assert alone(picture(compare(entries))) == svg
