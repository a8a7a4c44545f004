"""Markdown as the Hub shows it (GitHub's flavour, HTML let through), of texts that strangers wrote.

A text becomes itself: no mark, element, link or bar of a table in it works. Names and whatever holds an address become
code, in which nothing does.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from html import escape
from urllib.parse import quote

from exporter.publish.card.facts import Picture

_CLIP = 1000  # characters of one text
# Entities where a backslash would do as well: before a bar, one more backslash would end the cell.
_ESCAPES = str.maketrans(
    {mark: f"\\{mark}" for mark in "`*_[]~$#"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "\\": "&#92;"}
)
# What renderers make links of, some of them even where it is escaped.
_ADDRESS = re.compile(r"://|www\.|@|mailto:|xmpp:", re.IGNORECASE)
_OPENS = re.compile(r"(?=[-+=])|\d+(?=[.)](?: |$))")  # what begins a list, a heading or a rule


def cleaned(raw: str, clip: int = _CLIP) -> str:
    """One printable line. What does not print, and what turns the direction of writing, becomes "?"."""
    line = " ".join(raw[: 4 * clip].split())
    line = "".join(c if c == " " or (c.isprintable() and unicodedata.category(c) != "Cf") else "?" for c in line)
    return line if len(line) <= clip else line[: clip - 1] + "…"


def text(raw: str) -> str:
    """A text as itself, wherever in a line it stands."""
    line = cleaned(raw)
    if _ADDRESS.search(line):
        return code(line)
    begins = _OPENS.match(line)
    escaped = line.translate(_ESCAPES)
    return f"{begins[0]}\\{escaped[begins.end() :]}" if begins else escaped


def code(raw: str) -> str:
    """A name in backticks, more of them than it has itself; "" for nothing."""
    # No spelling of a bar in code is safe in every table, whatever stands before it.
    line = cleaned(raw).replace("|", "¦")
    if not line:
        return ""
    fence = "`" * (max((len(run) for run in re.findall(r"`+", line)), default=0) + 1)
    space = " " if "`" in (line[0], line[-1]) else ""
    return f"{fence}{space}{line}{space}{fence}"


def link(words: str, target: str) -> str:
    """`words` is Markdown already. target: a path in the repository, or a whole address of ours."""
    return f"[{words}](<{quote(target, safe='/:#')}>)"


def picture(shown: Picture) -> str:
    """A picture, and below it what it shows."""
    return f"![{text(shown.title)}]({quote(shown.path, safe='/')})\n\n*{text(shown.title)}.* {text(shown.caption)}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    """Of cells that are Markdown already."""
    aligned = set(right)
    rule = ["---:" if i in aligned else "---" for i in range(len(columns))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, rule, *rows])


def block(language: str, body: str) -> str:
    """Lines to run."""
    longest = max((len(run) for run in re.findall(r"`{3,}", body)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{body}\n{fence}"


def folded(summary: str, body: str) -> str:
    """What opens at a click. Markdown works inside an element only after an empty line."""
    return f"<details>\n<summary>{escape(cleaned(summary))}</summary>\n\n{body}\n\n</details>"


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
