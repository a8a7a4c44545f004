"""exporter profiles: what hardware is known, and which recipes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from exporter.cli import options
from exporter.cli.output import print_json, print_table
from exporter.types.sizes import format_size


def _made(artifacts: Any) -> str:
    """Names of artifacts; in brackets those that are made only when their format is asked for."""
    return ", ".join(a.folder if a.default else f"({a.folder})" for a in artifacts)


@click.command()
@click.argument("name", required=False)
@options.as_json
def command(name: str | None, as_json: bool) -> None:
    """List profiles and recipes, or print one.

    A profile says for which hardware, a recipe which numbers. Both are short TOML files; copy one,
    change it, and pass its path as --profile or --recipe. Artifacts in brackets are made when --format
    asks for them.

    \b
    Examples:
      exporter profiles
      exporter profiles 16gb
      exporter profiles mxfp4-q8
    """
    from exporter.pipeline import profiles as shipped

    if name:
        click.echo(shipped.source_text(name), nl=False)
        return
    loaded = [shipped.load_profile(n) for n in shipped.profile_names()]
    recipes = [shipped.load_recipe(n) for n in shipped.recipe_names()]
    if as_json:
        print_json(
            {
                "profiles": [
                    {"name": p.name, "title": p.title, "model": p.model, "hardware": asdict(p.hardware)}
                    | {
                        "artifacts": [asdict(a) for a in p.artifacts],
                        "gates": {
                            "every": dict(p.gates.every),
                            **{str(name): dict(g) for name, g in p.gates.classes.items()},
                        },
                    }
                    for p in loaded
                ],
                "recipes": [{"name": r.name, "title": r.title} for r in recipes],
            }
        )
        return
    rows = [
        (
            p.name,
            p.title,
            format_size(p.hardware.usable),
            f"{p.hardware.context:,}",
            p.model,
            _made(p.artifacts),
        )
        for p in loaded
    ]
    print_table(("profile", "for", "usable", "context", "model", "makes"), rows, right=(2, 3))
    print_table(("recipe", "numbers"), [(r.name, r.title) for r in recipes])
