"""A report in a terminal, in the words of report.md and report.html."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from exporter.cli.output import print_table, say

GLANCE = ("gates", "findings", "not-run")


def show_report(report: Mapping[str, Any], sections: Collection[str] = GLANCE) -> None:
    """The verdict, and some sections by key; Picture and Command are for pages alone."""
    from exporter.validate.report import document
    from exporter.validate.report.blocks import Table, Text

    page = document(report)
    say(page.sentence)
    for each in page.sections:
        if each.key not in sections:
            continue
        say()
        say(each.title)
        for block in each.blocks:
            if isinstance(block, Text):
                say(block.text)
            elif isinstance(block, Table):
                rows = [[f"{'  ' if cell.mood == 'part' else ''}{cell.text}" for cell in row] for row in block.rows]
                print_table(block.columns, rows, block.caption or None, right=sorted(block.right))
                if block.note:
                    say(block.note)
