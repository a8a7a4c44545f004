"""Several reports side by side: which figures can be compared at all, and which artifacts nothing beats.

A figure that was measured against another checkpoint, on another text or on another machine is shown and not ranked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from exporter.validate.report import figures, plots, words
from exporter.validate.report.blocks import Cell, Document, Picture, Section, Text, make_table, section
from exporter.validate.report.plots import Bar
from exporter.validate.report.reading import at, listed, number
from exporter.validate.report.reading import words as said
from exporter.validate.report.scatter import Point, scatter

_MARK = "\N{NO-BREAK SPACE}◆"  # behind the names of the best
_COLUMNS = ("conversations", "plain")


@dataclass(frozen=True)
class Entry:
    """A report, and what it is called here. path: as the user knows it."""

    label: str
    path: str
    report: Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One artifact's figures. apart: those of "conversations", "plain", "speed" that cannot be compared."""

    label: str
    path: str
    bytes: float | None
    bits_per_weight: float | None
    kl: Mapping[str, float | None]
    kl_ci95: Mapping[str, list[float] | None]
    top1: float | None
    flips: float | None
    decode: float | None
    prompt: float | None
    peak: float | None
    passed: bool | None
    apart: frozenset[str] = frozenset()
    best: bool = False

    def answer(self) -> dict[str, Any]:
        """As one object of `--json`."""
        return {
            "label": self.label,
            "path": self.path,
            "bytes": _whole(self.bytes),
            "bits_per_weight": self.bits_per_weight,
            "kl_mean": dict(self.kl),
            "kl_ci95": dict(self.kl_ci95),
            "top1": self.top1,
            "flips": self.flips,
            "decode_tokens_per_second": self.decode,
            "prefill_tokens_per_second": self.prompt,
            "peak_rss_bytes": _whole(self.peak),
            "status": {True: "passed", False: "gate failed", None: "not judged"}[self.passed],
            "not_comparable": sorted(self.apart),
            "best": self.best,
        }


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


@dataclass(frozen=True)
class Comparison:
    """rows: by size. column: of text, by whose KL they are ranked; its top-1 and flips are those of the rows."""

    rows: list[Row]
    column: str
    warnings: list[str] = field(default_factory=list)


def compare(entries: Sequence[Entry]) -> Comparison:
    """Lay reports side by side."""
    apart: list[set[str]] = [set() for _ in entries]
    warnings: list[str] = []
    for rule in _RULES:
        rule.judge(entries, apart, warnings)
    column = max(_COLUMNS, key=lambda c: sum(_ranked(e, c) and c not in a for e, a in zip(entries, apart, strict=True)))
    rows = [_row(entry, column, frozenset(a)) for entry, a in zip(entries, apart, strict=True)]
    rows.sort(key=lambda row: (row.bytes is None, row.bytes or 0, row.label, row.path))
    return Comparison([replace(row, best=_is_best(row, rows, column)) for row in rows], column, warnings)


def _ranked(entry: Entry, column: str) -> bool:
    return words.kl_of(entry.report, column) is not None


def _row(entry: Entry, column: str, apart: frozenset[str]) -> Row:
    report = entry.report
    found = words.column_of(report, column)
    return Row(
        label=entry.label,
        path=entry.path,
        bytes=number(report, "subject.bytes"),
        bits_per_weight=number(report, "subject.bits_per_weight"),
        kl={c: words.kl_of(report, c) for c in _COLUMNS},
        kl_ci95={c: _ends(at(words.column_of(report, c), "kl_ci95")) for c in _COLUMNS},
        top1=number(found, "top1"),
        flips=number(found, "flips"),
        decode=number(report, "speed.decode_tokens_per_second"),
        prompt=number(report, "speed.prefill_tokens_per_second"),
        peak=number(report, "memory.peak_rss_bytes"),
        passed=words.passed(report),
        apart=apart,
    )


def _ends(value: Any) -> list[float] | None:
    ends = [end for each in listed(value) if (end := number(each)) is not None]
    return ends if len(ends) == 2 else None


def _is_best(row: Row, rows: list[Row], column: str) -> bool:
    """Nothing that passed is as small and as near, and better in one of the two. What failed is never the best."""
    mine = _place(row, column)
    others = [place for other in rows if other is not row and (place := _place(other, column)) is not None]
    return mine is not None and not any(o[0] <= mine[0] and o[1] <= mine[1] and o != mine for o in others)


def _place(row: Row, column: str) -> tuple[float, float] | None:
    kl = row.kl[column]
    if row.bytes is None or kl is None or column in row.apart or row.passed is False:
        return None
    return row.bytes, kl


# What can be compared


@dataclass(frozen=True)
class _Rule:
    """Reports with another `key` than most have `figures` that cannot be compared. key: None where one is silent."""

    key: Callable[[Mapping[str, Any]], Hashable]
    figures: tuple[str, ...]
    what: str
    show: Callable[[Hashable], str]

    def judge(self, entries: Sequence[Entry], apart: list[set[str]], warnings: list[str]) -> None:
        keys = [self.key(entry.report) for entry in entries]
        known = Counter(key for key in keys if key is not None and key is not _ABSENT)
        if not known:
            if keys.count(None) > 1:
                warnings.append(f"the {self.what} is said by no report, and taken as the same")
            return
        usual = known.most_common(1)[0][0]  # of as many, the first
        for entry, key, found in zip(entries, keys, apart, strict=True):
            if key in (usual, _ABSENT) or all(name in found for name in self.figures):
                continue
            names = " and ".join(_FIGURES[name] for name in self.figures)
            said_so = f"was {self.show(key)}" if key else "is not said"
            told = f"its {self.what} {said_so}; of most it was {self.show(usual)}"
            warnings.append(f"{entry.label}, {names}: {told}")
            found.update(self.figures)


_FIGURES = {"conversations": "conversations", "plain": "plain text", "speed": "speed"}


def _checkpoint(report: Mapping[str, Any]) -> Hashable:
    """What tells one from another: the digest, the repository and revision, or the name at least."""
    found = tuple(said(report, f"against.{key}") for key in ("sha256", "repo", "revision"))
    name = said(report, "against.name")
    return (*found, "" if any(found) else name) if any((*found, name)) else None


def _show_checkpoint(key: Hashable) -> str:
    sha, repo, revision, name = key if isinstance(key, tuple) else ("",) * 4
    return " at ".join(filter(None, (repo or name or sha[:12], revision[:12])))


def _text(column: str) -> Callable[[Mapping[str, Any]], Hashable]:
    def key(report: Mapping[str, Any]) -> Hashable:
        where = f"accuracy.{column}"
        if at(report, where) is None and words.kl_of(report, column) is None:
            return _ABSENT
        source = said(report, f"{where}.source") or said(report, "text.source")
        tokens = number(report, f"{where}.tokens") or number(report, "text.tokens")
        sha = said(report, f"{where}.sha256") or (said(report, "text.sha256") if column == "plain" else "")
        return (source, tokens, sha) if source or sha else None

    return key


_ABSENT = object()  # it has no such figures: nothing to compare, and nothing to say


def _show_text(key: Hashable) -> str:
    source, tokens, sha = key if isinstance(key, tuple) else ("", None, "")
    parts = (source, f"{figures.count(tokens)} tokens" if tokens else "", f"SHA-256 {sha[:12]}" if sha else "")
    return ", ".join(filter(None, parts))


def _machine(report: Mapping[str, Any]) -> Hashable:
    if number(report, "speed.decode_tokens_per_second") is None:
        return _ABSENT
    cpu, cores = said(report, "hardware.cpu"), number(report, "hardware.cores")
    gpus = tuple(said(gpu, "name") for gpu in listed(report, "hardware.gpus"))
    return (cpu, cores, gpus) if cpu or gpus else None


def _show_machine(key: Hashable) -> str:
    cpu, cores, gpus = key if isinstance(key, tuple) else ("", None, ())
    return ", ".join(filter(None, (cpu, f"{figures.count(cores)} cores" if cores else "", *gpus)))


def _lengths(report: Mapping[str, Any]) -> Hashable:
    if number(report, "speed.decode_tokens_per_second") is None:
        return _ABSENT
    found = tuple(number(report, f"speed.{key}") for key in ("prefill_length", "decode_length"))
    return found if any(found) else ()


def _show_lengths(key: Hashable) -> str:
    found = key if isinstance(key, tuple) and key else (None, None)
    return f"{figures.count(found[0])} of a prompt and {figures.count(found[1])} after it"


_RULES = (
    _Rule(_checkpoint, ("conversations", "plain"), "checkpoint", _show_checkpoint),
    _Rule(_text("conversations"), ("conversations",), "text of conversations", _show_text),
    _Rule(_text("plain"), ("plain",), "plain text", _show_text),
    _Rule(_machine, ("speed",), "machine", _show_machine),
    _Rule(_lengths, ("speed",), "count of tokens", _show_lengths),
)


# What people see

COLUMNS = (
    "artifact", "verdict", "size", "bits a\nweight", "KL on\nconversations", "KL on\nplain text", "top-1", "flips",
    "answer,\ntokens/s", "prompt,\ntokens/s", "memory",
)  # fmt: skip


def cells(row: Row, column: str) -> tuple[Cell, ...]:
    """A row of the table; brackets around what cannot be compared."""
    verdict = {True: Cell("passed", "good"), False: Cell("FAILED", "bad"), None: Cell("not judged", "none")}

    def kl(column: str) -> str:
        ends = row.kl_ci95[column]
        written = figures.plain(row.kl[column]) + (figures.deviation((ends[1] - ends[0]) / 2) if ends else "")
        return _bracketed(written, column in row.apart and row.kl[column] is not None)

    def of(written: str, name: str) -> str:
        return _bracketed(written, name in row.apart and written != figures.NONE)

    return (
        Cell(f"{row.label}{_MARK if row.best else ''}", "strong" if row.best else ""),
        verdict[row.passed],
        Cell(figures.size(row.bytes)),
        Cell(figures.plain(row.bits_per_weight)),
        Cell(kl("conversations")),
        Cell(kl("plain")),
        Cell(of(figures.share(row.top1), column)),
        Cell(of(figures.share(row.flips), column)),
        Cell(of(figures.rate(row.decode), "speed")),
        Cell(of(figures.rate(row.prompt), "speed")),
        Cell(figures.size(row.peak)),
    )


def _bracketed(text: str, apart: bool) -> str:
    return f"[{text}]" if apart else text


def legend(found: Comparison) -> str:
    """What the marks of the table mean."""
    on = words.COLUMNS[found.column]
    marks = f"◆ nothing that passed is smaller and nearer (KL and top-1 on {on})"
    marks += ". ±: half of the 95% interval"
    return f"{marks}. [ ]: not comparable with the others." if any(row.apart for row in found.rows) else f"{marks}."


def picture(found: Comparison) -> str:
    """Size against KL as SVG, or ""."""
    points = []
    for row in found.rows:
        kl = row.kl[found.column]
        if row.bytes is not None and kl is not None and found.column not in row.apart and row.bytes + kl < 1e15:
            low, high = row.kl_ci95[found.column] or (None, None)
            points.append(Point(row.label, row.bytes, kl, low, high, row.passed is not False, row.best))
    unit = f"mean KL on {words.COLUMNS[found.column]}, nats"
    return scatter(points, unit, figures.size)


def page(found: Comparison) -> Document:
    """A page of its own: the picture, the table, speed and memory."""
    best = [row.label for row in found.rows if row.best]
    told = f"{figures.number_of(len(found.rows), 'artifact')}, by size. "
    on = words.COLUMNS[found.column]
    if len(best) == 1:
        told += f"{best[0]} is the smallest and the nearest to the reference on {on}."
    elif best:
        told += f"For their size nothing comes nearer to the reference on {on} than {', '.join(best)}."
    svg = picture(found)
    caption = (
        "Lower and farther left is better. Green, and on the dashed line: nothing that passed is smaller and "
        "nearer. An empty point: a gate failed. Upright lines: 95% intervals of the mean."
    )
    shown = [cells(row, found.column) for row in found.rows]
    table = make_table("", COLUMNS, shown, range(2, 11))
    table = table and replace(table, kind="wide")
    blocks = [Picture("Size against KL", caption, svg, "scatter") if svg else None, table, Text(legend(found))]
    sections = (section("artifacts", "Artifacts", blocks), *_bars(found), _remarks(found))
    return Document(
        kind="comparison",
        title=f"{figures.number_of(len(found.rows), 'artifact')} compared",
        passed=None,
        sentence=told.strip(),
        facts=(),
        sections=tuple(each for each in sections if each),
        judged=False,
    )


def _bars(found: Comparison) -> list[Section | None]:
    def bars(value: Callable[[Row], float | None], write: Callable[[float | None], str], speed: bool) -> list[Bar]:
        kept = [row for row in found.rows if not (speed and "speed" in row.apart)][:40]
        return [Bar(row.label, (v,), write(v)) for row in kept if (v := value(row)) is not None and v > 0]

    kinds = (
        ("Writing an answer", "Tokens per second.", bars(lambda row: row.decode, figures.rate, True), figures.count),
        ("Reading a prompt", "Tokens per second.", bars(lambda row: row.prompt, figures.rate, True), figures.count),
        ("Peak memory", "Of the process.", bars(lambda row: row.peak, figures.size, False), figures.size),
    )
    shown = [(title, told, plots.amounts(title, rows, write)) for title, told, rows, write in kinds if len(rows) > 1]
    pictures = [Picture(title, told, svg) for title, told, svg in shown if svg]
    return [section("speed", "Speed and memory", pictures)]


def _remarks(found: Comparison) -> Section | None:
    rows = [(warning,) for warning in found.warnings]
    return section("remarks", "What is not compared", [make_table("", ("",), rows)])
