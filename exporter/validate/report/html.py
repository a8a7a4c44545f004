"""report.html: a document as one file that asks for nothing else.

The browser is told so as well: the policy in its head allows inline styles and nothing besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from exporter.validate.report.blocks import SIGNS, Block, Cell, Command, Document, Picture, Table
from exporter.validate.report.page import document
from exporter.validate.report.style import ALONE, PAGE

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_EDGE = 14  # around a picture that stands alone
_VERDICTS = {True: ("good", "✓ passed"), False: ("bad", "✗ failed"), None: ("none", "not judged")}


def html(report: Mapping[str, Any]) -> str:
    """The report as one self-contained HTML page."""
    return written(document(report))


def alone(svg: str) -> str:
    """A picture of a page as a file of its own."""
    width, height = (float(n) for n in svg.split('viewBox="0 0 ', 1)[1].split('"', 1)[0].split())
    wide, high = f"{width + 2 * _EDGE:g}", f"{height + 2 * _EDGE:g}"
    box = f'width="{wide}" height="{high}" viewBox="-{_EDGE} -{_EDGE} {wide} {high}"'
    paper = f'<rect x="-{_EDGE}" y="-{_EDGE}" width="{wide}" height="{high}" fill="var(--paper)"/>'
    # From <title> on it is as in the page.
    inner = svg.split(">", 1)[1]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box} role="img">'
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}<style>{ALONE}</style>{paper}{inner}\n'


def written(page: Document) -> str:
    """A document as HTML."""
    mood, verdict = _VERDICTS[page.passed]
    state = f"{page.title}: {verdict.lstrip('✓✗ ')}" if page.judged else page.title
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(state)}</title>\n<style>\n{PAGE}</style>\n</head>\n<body>\n"
    )
    top = [f'<p class="kind">{escape(page.kind)}</p>', f"<h1>{_breakable(page.title)}</h1>"]
    if page.judged:
        top.append(f'<p class="verdict {mood}">{verdict}</p>')
    top.append(f'<p class="lead">{escape(page.sentence)}</p>')
    sections = "\n".join(
        f'<section id="{escape(each.key)}">\n<h2>{escape(each.title)}</h2>\n{_blocks(each.blocks)}\n</section>'
        for each in page.sections
    )
    foot = f"<footer><p>{escape(page.foot)}</p></footer>\n" if page.foot else ""
    header = "\n".join([*top, _facts(page), _contents(page)])
    return f"{head}<main>\n<header>\n{header}\n</header>\n{sections}\n</main>\n{foot}</body>\n</html>\n"


def _breakable(text: str) -> str:
    """A text that may break where a name has a joint."""
    return escape(text).replace("/", "/<wbr>").replace("_", "_<wbr>")


def _facts(page: Document) -> str:
    if not page.facts:
        return ""
    each = [
        f"<div><dt>{escape(label)}</dt><dd>{escape(figure)}{_small(remark)}</dd></div>\n"
        for label, figure, remark in page.facts
    ]
    return f'<dl class="facts">\n{"".join(each)}</dl>'


def _small(text: str) -> str:
    return f"<small>{escape(text)}</small>" if text else ""


def _contents(page: Document) -> str:
    if len(page.sections) < 4:
        return ""
    links = "\n".join(f'<li><a href="#{escape(each.key)}">{escape(each.title)}</a></li>' for each in page.sections)
    return f'<nav aria-label="Sections"><ul>\n{links}\n</ul></nav>'


def _blocks(blocks: tuple[Block, ...]) -> str:
    """Pictures that follow each other stand side by side where there is room."""
    parts: list[str] = []
    figures: list[str] = []
    for block in blocks:
        if isinstance(block, Picture):
            figures.append(_picture(block))
            continue
        if figures:
            parts.append(f'<div class="figures">\n{"".join(figures)}</div>')
            figures = []
        parts.append(_block(block))
    if figures:
        parts.append(f'<div class="figures">\n{"".join(figures)}</div>')
    return "\n".join(parts)


def _picture(block: Picture) -> str:
    css = f' class="{block.css}"' if block.css else ""
    words = f"<b>{escape(block.title)}.</b> {escape(block.caption)}"
    return f"<figure{css}>\n{block.svg}\n<figcaption>{words}</figcaption>\n</figure>\n"


def _block(block: Block) -> str:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Command):
        return f"<pre><code>{escape(block.line)}</code></pre>"
    return "" if isinstance(block, Picture) else f"<p>{escape(block.text)}</p>"


def _table(table: Table) -> str:
    caption = f"<caption>{escape(table.caption)}</caption>\n" if table.caption else ""
    head = "".join(
        f'<th scope="col"{_right(i, table)}>{escape(name)}</th>' if name else f"<td{_right(i, table)}></td>"
        for i, name in enumerate(table.columns)
    )
    head = f"<thead><tr>{head}</tr></thead>\n" if any(table.columns) else ""
    rows = "\n".join(f"<tr>{''.join(_cell(cell, i, table) for i, cell in enumerate(row))}</tr>" for row in table.rows)
    note = f'\n<p class="note">{escape(table.note)}</p>' if table.note else ""
    css = f' class="{table.kind}"' if table.kind else ""
    # The box scrolls where the table is wider than the screen; one that scrolls must be reachable by keyboard.
    name = escape(table.caption or table.columns[-1] or "table")
    box = f'<div class="scroll" tabindex="0" role="region" aria-label="{name}">'
    return f"{box}<table{css}>\n{caption}{head}<tbody>\n{rows}\n</tbody></table></div>{note}"


def _right(column: int, table: Table) -> str:
    return ' class="n"' if column in table.right else ""


def _cell(cell: Cell, column: int, table: Table) -> str:
    css = " ".join(filter(None, ("n" if column in table.right else "", cell.mood)))
    inner = SIGNS.get(cell.mood, "") + escape(cell.text)
    if cell.mood == "code":
        inner, css = f"<code>{_breakable(cell.text)}</code>", css.replace("code", "").strip()
    # The first column names its row, unless what stands there is a verdict.
    tag = 'th scope="row"' if column == 0 and cell.mood not in ("good", "bad", "none") else "td"
    given = f' class="{css}"' if css else ""
    return f"<{tag}{given}>{inner}</{tag[:2]}>"
