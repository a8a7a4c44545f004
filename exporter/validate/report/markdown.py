"""report.md: a document as GitHub-flavoured Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from exporter.validate.report.blocks import SIGNS, Block, Cell, Command, Document, Picture, Table
from exporter.validate.report.page import document

# Backslashes keep Markdown's marks from meaning anything; before ":" and "." they also keep an address from
# becoming a link. Entities do the same for HTML, which Markdown passes through.
_MARKS = re.compile(r"[\\`*_\[\]|~$]|:(?=//)|(?<=www)\.", re.IGNORECASE)
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown; tables and sentences as in HTML, without the pictures."""
    return written(document(report))


def written(page: Document) -> str:
    """A document as Markdown."""
    sign = {True: "✓ passed", False: "✗ FAILED", None: "not judged"}[page.passed]
    parts = [f"# {escaped(page.title)}{f': {sign}' if page.judged else ''}", escaped(page.sentence)]
    if page.facts:
        parts.append(
            "\n".join(f"- {escaped(label)}: **{escaped(figure)}**{_aside(more)}" for label, figure, more in page.facts)
        )
    for each in page.sections:
        parts += [f"## {escaped(each.title)}", *filter(None, map(_block, each.blocks))]
    if page.foot:
        parts.append(f"---\n\n{escaped(page.foot)}")
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """A text as itself: no mark, link or element in it works."""
    line = _MARKS.sub(lambda m: f"\\{m[0]}", text).translate(_ENTITIES)
    # What would begin a list, a heading or a rule at the start of a line.
    return re.sub(r"^(\s*)([-=]|\d+(?=\.))", r"\1\\\2", line) if re.match(r"\s*[-=]", line) else line


def code(text: str) -> str:
    """A name in backticks, more of them than it has itself; in tables a bar needs its backslash even there."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * (longest + 1)
    space = " " if text[:1] in ("`", " ", "") or text[-1:] in ("`", " ") else ""
    return f"{fence}{space}{text}{space}{fence}".replace("|", "\\|")


def _aside(text: str) -> str:
    return f" ({escaped(text)})" if text else ""


def _block(block: Block) -> str:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Command):
        return f"```sh\n{block.line}\n```"
    if isinstance(block, Picture):
        return ""
    return escaped(block.text)


def _table(table: Table) -> str:
    rule = ["---:" if i in table.right else "---" for i in range(len(table.columns))]
    lines = [[escaped(name) for name in table.columns], rule, *([_cell(c) for c in row] for row in table.rows)]
    parts = [f"*{escaped(table.caption)}*\n"] if table.caption else []
    parts += [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join(parts) + (f"\n\n{escaped(table.note)}" if table.note else "")


def _cell(cell: Cell) -> str:
    if cell.mood == "code":
        return code(cell.text)
    text = SIGNS.get(cell.mood, "") + escaped(cell.text)
    if cell.mood in ("bad", "strong") and cell.text:
        return f"**{text}**"
    return f"&nbsp;&nbsp;{text}" if cell.mood == "part" else text
