"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from exporter.types.sizes import parse_size


class Size(click.ParamType[int]):
    """A byte count like 12G or 11.5GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return value if isinstance(value, int) else parse_size(str(value))


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

model = click.argument("model", required=False)
profile = click.option(
    "-p", "--profile", metavar="NAME|FILE", required=True, help="For which hardware; see `exporter profiles`."
)
formats = click.option(
    "-f",
    "--format",
    "formats",
    metavar="NAME",
    multiple=True,
    help="Only these formats, also those on request. Repeatable.",
)
targets = click.option(
    "-t", "--target", "targets", metavar="NAME", multiple=True, help="Only artifacts for these targets. Repeatable."
)
recipe = click.option("--recipe", metavar="NAME|FILE", help="Use this recipe in place of the profile's.")
context = click.option("-c", "--context", type=click.IntRange(1), metavar="TOKENS", help="Context length to fit.")
out = click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("artifacts"),
    show_default=True,
    help="Artifacts go to OUT/<model>/<profile>/.",
)
max_memory = click.option(
    "--max-memory", type=Size(), default="4G", show_default=True, help="Ceiling for what conversion holds."
)
calibration = click.option(
    "--calibration",
    metavar="TEXT",
    help="What gptq learns from: standard-library, self, a file or folder, or a Hub dataset; see docs/calibration.md.",
)
text = click.option(
    "--text",
    metavar="TEXT",
    help='What to measure on: a file or folder of rows {"messages"} or {"text"}, or a Hub dataset; see docs/proof.md.',
)
device = click.option(
    "--device",
    metavar="NAME",
    default="auto",
    show_default=True,
    help="For calibration and reference: auto, cpu, cuda.",
)
quiet = click.option("-q", "--quiet", is_flag=True, help="No progress.")
as_json = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
