"""exporter card: the model card of artifacts."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from exporter.cli import options
from exporter.cli.output import print_json, say


@click.command()
@click.argument("artifacts", metavar="ARTIFACT...", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--repo", metavar="USER/NAME", default="", help="The repository whose name the commands have.")
@click.option("--license", "license", metavar="ID", default="", help="Where it is not that of OpenAI's release.")
@click.option("--base-model", metavar="USER/NAME", default="", help="Where the artifacts were made of a folder.")
@click.option(
    "-o",
    "--out",
    metavar="FOLDER",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write README.md and its pictures there.",
)
@options.quiet
@options.as_json
def command(
    artifacts: tuple[Path, ...], repo: str, license: str, base_model: str, out: Path | None, quiet: bool, as_json: bool
) -> None:
    """Write the model card of one or several artifacts.

    The card has what the Hub reads (license, base model, tags), a table of which file is for which device, the
    commands that run each, what the proof found and what was not run, and where everything comes from. It holds
    nothing but what the artifacts' own files say. `exporter publish` makes the same one.

    One artifact is described at the root of a repository, several in folders of their own.

    \b
    Examples:
      exporter card artifacts/gpt-oss-20b/16gb/gguf-mxfp4-q8 --repo me/gpt-oss-20b-GGUF
      exporter card artifacts/my-fine-tune/16gb/* --base-model me/my-fine-tune --license mit -o card
    """
    from exporter.pipeline.card import make_card, read_entries, write_card

    found = read_entries(artifacts)
    card = make_card(repo, found, license=license, base_model=base_model)
    written = write_card(out, card) if out else []
    if as_json:
        print_json(
            {
                "repo": repo,
                "artifacts": [
                    {"path": str(path), "folder": each.prefix} for path, each in zip(artifacts, found, strict=True)
                ],
                "text": card.text,
                "pictures": sorted(card.pictures),
                "written": [str(path) for path in written],
            }
        )
    elif written:
        for path in written if not quiet else ():
            say(str(path))
    else:
        sys.stdout.write(card.text)
