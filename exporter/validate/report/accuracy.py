"""Sections on how near the predictions are: accuracy, arithmetics, twins, generation, router, weights, controls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from exporter.validate.report import figures, plots
from exporter.validate.report.blocks import Block, Cell, Picture, Section, Table, Text, make_table, section, verdict
from exporter.validate.report.reading import at, flag, listed, number, pairs, table, words
from exporter.validate.report.words import ARITHMETICS, COLUMNS, RELEASED

# gpt-oss: attention of every other layer looks back this far, and positions up to 4,096 were trained on unscaled.
MARKS = {"window": 128, "4,096": 4096}
_KL = "nats: 0 where both predict the same, and larger the more probability lies on other tokens"
_Row = tuple[str, bool, Mapping[str, Any]]


def accuracy(report: Mapping[str, Any]) -> Section | None:
    """By column of text, and within a column by channel and depth."""
    rows = list(_rows(report))
    if not rows:
        return None
    words_first = Text(
        "The reference and the artifact read the same tokens, and at each position their predictions of the token "
        f"that follows are compared. KL is in {_KL}. A flip is a position at which exactly one of the two is right."
    )
    return section("accuracy", "Accuracy", [words_first, *_tables(rows, "the text"), *_pictures(report)])


def _rows(report: Mapping[str, Any]) -> Iterator[_Row]:
    """(label, whether it is a part of the row before, figures)."""
    columns = table(report, "accuracy")
    for key in [*COLUMNS, *(key for key in columns if key not in COLUMNS)]:
        column = table(columns.get(key))
        if table(column, "all"):
            yield COLUMNS.get(key, words(key)), False, table(column, "all")
        own = table(column, "as_runtime")
        if own and own != table(column, "all"):
            yield "in the runtime's own arithmetic", True, own
        for group in ("channels", "depths"):
            for name, figure in table(column, group).items():
                if isinstance(figure, Mapping):
                    yield words(name), True, figure


def _tables(rows: list[_Row], of: str) -> list[Block | None]:
    """Two tables: how far, and what that changes."""
    return [_divergence(rows, of), _predictions(rows, of)]


def _first(label: str, part: bool) -> Cell:
    return Cell(label, "part" if part else "strong")


def _divergence(rows: list[_Row], of: str) -> Table | None:
    columns = (of, "positions", "mean KL", "95% interval", "median", "99%", "99.9%", "largest")
    cells = []
    for label, part, f in rows:
        kl = [figures.plain(number(f, key)) for key in ("kl_median", "kl_p99", "kl_p999", "kl_max")]
        mean = Cell(figures.plain(number(f, "kl_mean")), "" if part else "strong")
        ends = listed(f, "kl_ci95")
        # So few positions that they are one run: that is no interval.
        between = figures.NONE if len(set(map(repr, ends))) < 2 else figures.interval(ends) or figures.NONE
        head: list[Cell | str] = [_first(label, part), figures.count(number(f, "positions")), mean, between]
        cells.append([*head, *kl])
    return make_table("How far the predictions are: KL, nats", columns, cells, range(1, 8))


def _predictions(rows: list[_Row], of: str) -> Table | None:
    columns = (
        of,
        "same top token",
        "flips",
        "to wrong",
        "to right",
        "p",
        "perplexity",
        "reference's",
        "ratio",
        "RMS Δp",
    )
    cells = []
    for label, part, f in rows:
        counts = [figures.count(number(f, key)) for key in ("flips_to_wrong", "flips_to_right")]
        rest = [figures.plain(number(f, "flips_p"))]
        rest += [figures.perplexity(number(f, key)) for key in ("ppl", "ppl_reference")]
        rest.append(figures.ratio(number(f, "ppl_ratio")))
        shares = [figures.share(number(f, key)) for key in ("top1", "flips", "delta_p_rms")]
        row: list[Cell | str] = [_first(label, part), *shares[:2], *counts, *rest, shares[2]]
        cells.append(row)
    caption = "What that changes. p: how likely flips this one-sided are by chance (McNemar, exact)"
    return make_table(caption, columns, cells, range(1, 10))


def _pictures(report: Mapping[str, Any]) -> list[Block | None]:
    found = table(report, "accuracy")
    ordered = [*COLUMNS, *(key for key in found if key not in COLUMNS)]
    columns = {COLUMNS.get(key, words(key)): table(found, key) for key in ordered if key in found}
    curves = {name: pairs(column.get("curve")) for name, column in columns.items()}
    along = {name: pairs(column.get("by_position")) for name, column in columns.items()}
    floor = number(report, "floor.kl_mean")
    shown = [
        (
            "KL of all positions, in order",
            "The share of positions that stay below a KL. Both axes are logarithmic, so that the rare and bad show.",
            plots.quantiles(curves, floor),
        ),
        (
            "KL along the text",
            "Mean KL of runs of positions. A step at the window or at 4,096 would be an error of sinks, mask or YaRN.",
            plots.positions(along, MARKS),
        ),
    ]
    return [Picture(title, caption, svg) for title, caption, svg in shown if svg]


def arithmetics(report: Mapping[str, Any]) -> Section | None:
    """The comparisons that are of one runtime."""
    rows = [
        (label, False, table(report, key))
        for key, label in ARITHMETICS.items()
        if number(report, f"{key}.kl_mean") is not None and not (key == "release" and table(report, "accuracy"))
    ]
    remarks = []
    if (difference := number(report, "cached.logit_difference")) is not None:
        remarks.append(f"Decoding with the cache changes a logit by {figures.plain(difference)} at most.")
    for key, what in (("export", "float32 activations"), ("release", "the graphs as shipped")):
        if (difference := number(report, f"optimizer.{key}.relative_difference")) is not None:
            remarks.append(
                f"ONNX Runtime's rewriting, {what}: {figures.plain(difference)} of the largest logit at most."
            )
    if not rows and not remarks:
        return None
    blocks = _tables(rows, "compared") if rows else []
    return section("arithmetics", "Ways of computing it", [*blocks, Text(" ".join(remarks)) if remarks else None])


def twins(report: Mapping[str, Any]) -> Section | None:
    """Which of the reference's deliberately wrong twins it is nearest to, and the noise below which nothing counts."""
    blocks: list[Block | None] = []
    if (noise := number(report, "floor.kl_mean")) is not None:
        what = words(report, "floor.what")
        blocks.append(Text(f"Noise floor: a mean KL of {figures.plain(noise)} nats{f', {what}' if what else ''}."))
    if told := behaviour(report):
        blocks.append(Text(f"The reference was also computed wrong on purpose, as exports go wrong: {told}."))
    each = [twin for twin in listed(report, "twins.each") if isinstance(twin, Mapping)]
    rows = [
        (
            words(twin, "name"),
            figures.plain(number(twin, "kl_mean")),
            figures.plain(number(twin, "nearer_by")),
            figures.share(number(twin, "share")),
            figures.interval(at(twin, "ci95"), figures.share if _by_share(twin) else figures.plain) or figures.NONE,
            _nearer(twin),
        )
        for twin in each
    ]
    columns = ("twin", "mean KL from it", "nearer to the release by", "of positions", "95% interval", "")
    blocks.append(make_table("Mean KL from each twin, nats", columns, rows, (1, 2, 3, 4)))
    return section("twins", "Nearest twin and noise floor", blocks)


def behaviour(report: Mapping[str, Any]) -> str:
    """What it is nearest to; "" where that was not asked."""
    nearest = words(report, "twins.nearest")
    if not nearest:
        return ""
    if nearest != RELEASED:
        return f"it behaves like the model with this mistake: {nearest}"
    told_apart = flag(report, "twins.passed") is True
    return f"it is nearest to the model {RELEASED}" + ("" if told_apart else ", and not told apart from every twin")


def _by_share(twin: Mapping[str, Any]) -> bool:
    """Whether the interval is of the share of positions, as exporter counts."""
    return number(twin, "share") is not None


def _nearer(twin: Mapping[str, Any]) -> Cell:
    even = 0.5 if _by_share(twin) else 0.0
    by = number(twin, "share") if _by_share(twin) else number(twin, "nearer_by")
    low = next((number(end) for end in listed(twin, "ci95")), None)
    if by is None:
        return verdict(None)
    if by < even:
        return Cell("nearer to the twin", "bad")
    return Cell("told apart", "good") if low is None or low > even else Cell("not told apart", "none")


def generation(report: Mapping[str, Any]) -> Section | None:
    found = table(report, "generation")
    if not found:
        return None
    rows = [
        ("tokens before the first that differs, mean share", figures.share(number(found, "agreement")), figures.NONE),
        ("answers equal to the end", figures.share(number(found, "same")), figures.NONE),
        ("mean length, tokens", *_both(found, "length", figures.plain)),
        ("length over the reference's", figures.ratio(number(found, "length_ratio")), figures.NONE),
        ("answers that end by themselves", *_both(found, "ended", figures.share)),
    ]
    prompts, tokens = figures.count(number(found, "prompts")), figures.count(number(found, "tokens"))
    told = Text(f"Answers to {prompts} prompts, at most {tokens} tokens each, the most likely token at every step.")
    shown = make_table("Beside the reference's answers, token by token", ("", "artifact", "reference"), rows, (1, 2))
    return section("generation", "Generation", [told, shown])


def _both(found: Mapping[str, Any], key: str, write: Callable[[float | None], str]) -> tuple[str, str]:
    return write(number(found, key)), write(number(found, f"{key}_reference"))


def router(report: Mapping[str, Any]) -> Section | None:
    """Of new reports {choices, flips, share}; of ONNX the same under `release` and `export`."""
    found = table(report, "router")
    kinds = {"": found, "release": table(found, "release"), "export": table(found, "export")}
    names = {"": "as run", "release": "as shipped", "export": "with float32 activations"}
    rows = [
        (
            names[key],
            figures.count(number(each, "choices") or number(found, "choices")),
            figures.count(number(each, "flips")),
            figures.share(number(each, "share")),
            figures.plain(number(each, "kl_mean_without_flips")),
            figures.plain(number(each, "kl_mean_with_flips")),
        )
        for key, each in kinds.items()
        if number(each, "share") is not None
    ]
    columns = ("", "choices", "other experts", "share", "mean KL without", "mean KL with")
    shown = make_table("Choices of a token in a layer, and those of another set of experts", columns, rows, range(1, 6))
    return section("router", "Router", [shown])
