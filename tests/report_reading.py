"""What a page says, read back by parsers that know nothing of how it was made."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "br", "wbr", "hr", "img", "link", "input"}
# All that a page consists of. Nothing here loads, runs or sends anything.
ELEMENTS = {
    "html", "head", "meta", "title", "style", "body", "main", "header", "section", "footer", "nav", "ul", "li", "a",
    "h1", "h2", "p", "b", "small", "dl", "div", "dt", "dd", "table", "caption", "thead", "tbody", "tr", "th", "td",
    "figure", "figcaption", "pre", "code", "wbr", "svg", "text", "tspan", "line", "path", "rect", "circle",
}  # fmt: skip
ATTRIBUTES = {
    "lang", "charset", "http-equiv", "content", "name", "class", "id", "href", "scope", "tabindex", "role",
    "aria-label", "viewbox", "x", "y", "x1", "x2", "y1", "y2", "d", "dx", "width", "height", "cx", "cy", "r",
    "text-anchor",
}  # fmt: skip


@dataclass
class Page(HTMLParser):
    """An HTML page: its elements, its tables row by row, and what is wrong with it."""

    elements: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    tables: list[list[list[str]]] = field(default_factory=list)
    text: str = ""
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.elements.append((tag, given))
        self.wrong += [f"<{tag}>"] if tag not in ELEMENTS else []
        self.wrong += [f"<{tag} {key}>" for key in given if key not in ATTRIBUTES]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr" and self.tables:
            self.tables[-1].append([])
        if tag in ("td", "th") and self.tables and self.tables[-1]:
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if ("td" in self.open or "th" in self.open) and self.tables and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1] += data

    def handle_comment(self, data: str) -> None:
        self.wrong.append("a comment")


def read_html(text: str) -> Page:
    """Parse a page; `wrong` names elements out of order and everything that has no business there."""
    page = Page()
    page.feed(text)
    page.close()
    page.wrong += [f"<{tag}> is not closed" for tag in page.open]
    return page


def pictures(text: str) -> list[ET.Element]:
    """The SVGs of a page, each read as XML."""
    return [ET.fromstring(found) for found in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def read_markdown(text: str) -> list[Any]:
    """The tokens of a Markdown page, in one list, as a parser of tables and HTML has them."""
    from markdown_it import MarkdownIt

    tokens: list[Any] = []
    for token in MarkdownIt("commonmark", {"html": True}).enable("table").parse(text):
        tokens += [token, *(token.children or [])]
    return tokens


def markdown_tables(text: str) -> list[list[list[str]]]:
    """The cells of every table of a Markdown page, as plain text."""
    tables: list[list[list[str]]] = []
    cell = False
    for token in read_markdown(text):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type in ("td_open", "th_open"):
            tables[-1][-1].append("")
            cell = True
        elif token.type in ("td_close", "th_close"):
            cell = False
        elif cell and token.type in ("text", "code_inline", "text_special"):
            tables[-1][-1][-1] += token.content
    return tables
