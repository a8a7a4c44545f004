"""What a page is made of, before it is Markdown or HTML: sections of sentences, tables, commands and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from exporter.validate.report.figures import NONE

# "good" and "bad" are said by a sign too, for those who see no colour; "none" is what was not measured.
Mood = Literal["", "good", "bad", "none", "strong", "code", "part"]
SIGNS: dict[Mood, str] = {"good": "✓ ", "bad": "✗ "}
ROWS = 60  # of a table; the rest is in report.json


@dataclass(frozen=True)
class Cell:
    """`code`: a name that someone else chose. `part`: of the row above, and indented. `strong`: stands out."""

    text: str
    mood: Mood = ""


@dataclass(frozen=True)
class Table:
    """`right`: indices of columns of figures. The first column names its row; of `gates` it is a verdict."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    right: frozenset[int] = frozenset()
    note: str = ""
    kind: Literal["", "gates", "wide"] = ""


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Command:
    """A command line to run."""

    line: str


@dataclass(frozen=True)
class Picture:
    """An SVG; `caption` says in words what it shows."""

    title: str
    caption: str
    svg: str
    css: Literal["", "wide", "scatter"] = ""


Block = Table | Text | Command | Picture


@dataclass(frozen=True)
class Section:
    """`key`: its anchor."""

    key: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """`passed` None: nothing judged it. `judged` False: it is not of one artifact, and shows no verdict.

    `facts`: a few figures at a glance, (label, figure, remark).
    """

    kind: str
    title: str
    passed: bool | None
    sentence: str
    facts: tuple[tuple[str, str, str], ...]
    sections: tuple[Section, ...]
    foot: str = ""
    judged: bool = True


def make_table(
    caption: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[Cell | str]],
    right: Iterable[int] = (),
    total: int | None = None,
) -> Table | None:
    """None without rows. At most ROWS of them, with a note of how many are left out; `total` where the caller cut."""
    cells = [tuple(each if isinstance(each, Cell) else Cell(each) for each in row) for row in rows]
    if not cells:
        return None
    # A column in which nothing was measured says nothing.
    kept = [i for i in range(len(columns)) if i == 0 or any(row[i].text != NONE for row in cells)]
    columns, cells = [columns[i] for i in kept], [tuple(row[i] for i in kept) for row in cells]
    more = max(total or 0, len(cells)) - min(len(cells), ROWS)
    note = f"and {more:,} more, in report.json" if more > 0 else ""
    return Table(caption, tuple(columns), tuple(cells[:ROWS]), frozenset(map(kept.index, {*right} & {*kept})), note)


def section(key: str, title: str, blocks: Iterable[Block | None]) -> Section | None:
    """None without blocks."""
    kept = tuple(block for block in blocks if block is not None)
    return Section(key, title, kept) if kept else None


def verdict(passed: bool | None) -> Cell:
    """Of a gate or a control."""
    return Cell("not run", "none") if passed is None else Cell("passed", "good") if passed else Cell("FAILED", "bad")


def yes(value: bool | None) -> str:
    return NONE if value is None else "yes" if value else "no"
