"""exporter formats: what can be made, and which numbers each format holds exactly."""

from __future__ import annotations

import click

from exporter.cli import options
from exporter.cli.output import print_json, print_table


@click.command()
@options.as_json
def command(as_json: bool) -> None:
    """List formats and what each stores exactly.

    A scheme that a format cannot hold exactly is refused when planning, never approximated.
    """
    from exporter.formats import all_formats

    formats = all_formats().values()
    if as_json:
        print_json({f.name: {"for": f.title, "schemes": dict(f.schemes())} for f in formats})
        return
    rows = [(f.name, f.title, scheme, kind) for f in formats for scheme, kind in f.schemes().items()]
    print_table(("format", "for", "numbers", "stored as"), rows)
