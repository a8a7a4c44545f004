"""exporter compare: several reports side by side."""

from __future__ import annotations

from pathlib import Path

import click

from exporter.cli import options
from exporter.cli.output import print_json, print_table, say

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.argument("paths", metavar="ARTIFACT...", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--html", metavar="FILE", type=_FILE, help="Write a page of its own, with pictures.")
@click.option("--svg", metavar="FILE", type=_FILE, help="Write the picture of size against KL alone.")
@options.as_json
def command(paths: tuple[Path, ...], html: Path | None, svg: Path | None, as_json: bool) -> None:
    """Show the reports of several artifacts side by side.

    ARTIFACT is a folder with a report.json, such a file, or a folder of artifacts, at most three deep. Rows are by
    size; a mark shows those that nothing beats in both size and KL. Figures that were measured against another
    checkpoint, on another text or on another machine are said, shown in brackets and left out.

    \b
    Examples:
      exporter compare artifacts/gpt-oss-20b
      exporter compare artifacts/gpt-oss-20b/16gb/* --html compare.html
      exporter compare mine/report.json theirs/report.json --json
    """
    from exporter.pipeline.compare import compare_reports, write_html, write_svg
    from exporter.validate.report.comparison import COLUMNS, cells, legend

    found = compare_reports(paths)
    if html:
        write_html(html, found)
    if svg:
        write_svg(svg, found)
    if as_json:
        rows = [row.answer() for row in found.rows]
        print_json({"artifacts": rows, "ranked_by": found.column, "warnings": found.warnings})
        return
    shown = [[cell.text for cell in cells(row, found.column)] for row in found.rows]
    print_table(COLUMNS, shown, right=range(2, 11))
    say(legend(found))
    for warning in found.warnings:
        say(f"not compared: {warning}")
    for written in filter(None, (html, svg)):
        say(str(written))
