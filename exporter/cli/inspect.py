"""exporter inspect: what a checkpoint is, from its headers."""

from __future__ import annotations

from typing import Any

import click

from exporter.cli import options
from exporter.cli.output import print_json, print_table, progress
from exporter.types.sizes import format_size


@click.command()
@click.argument("model")
@options.as_json
def command(model: str, as_json: bool) -> None:
    """Describe a checkpoint.

    Layout, types, parameters, bytes (predicted from the configuration, and found in the files).
    Reads headers and small files only.

    \b
    Examples:
      exporter inspect ./my-fine-tune
      exporter inspect openai/gpt-oss-20b --json
    """
    from exporter.checkpoint.summary import describe
    from exporter.pipeline.source import open_model

    opened = open_model(model, progress(as_json))
    with opened.checkpoint as checkpoint:
        facts = describe(checkpoint)
    if as_json:
        print_json(facts)
    else:
        print_table((opened.name, ""), _rows(facts))


def _rows(f: dict[str, Any]) -> list[tuple[str, str]]:
    source = f"{f['repo']} at {f['revision']}" if f["repo"] else f["path"]
    heads, kv_heads, head_dim = f["heads"]
    rope = f["rope"]
    agree = "as predicted from config.json" if f["tensor_bytes"] == f["predicted_bytes"] else "see notes"
    shards = f"{len(f['shards'])} file{'s' if len(f['shards']) > 1 else ''}"
    rows = [
        ("source", source),
        ("layout", f["layout"]),
        ("sizes of", f["architecture_of"] or "no released model"),
        ("parameters", f"{f['parameters']:,}"),
        ("tensors", f"{f['tensors']} in {shards}{', numbered from zero' if f['shards_off_by_one'] else ''}"),
        ("tensor bytes", f"{f['tensor_bytes']:,} ({format_size(f['tensor_bytes'])}), {agree}"),
        ("types", ", ".join(f"{role} {types}" for role, types in f["types"].items())),
        ("layers", f"{f['layers']}, {f['experts']} experts, {f['experts_per_token']} used per token"),
        ("widths", f"hidden {f['hidden_size']}, expert {f['intermediate_size']}, vocabulary {f['vocab_size']:,}"),
        ("attention", f"{heads} heads of {head_dim}, {kv_heads} for keys, window {f['sliding_window']}"),
        ("context", f"{f['context']:,}"),
        ("rope", f"{rope['kind']}, theta {rope['theta']:g}, factor {rope['factor']:g}, {_truncate(rope)}"),
        ("tokenizer", f"{f['tokenizer'] or 'none'}, {'with' if f['chat_template'] else 'no'} chat template"),
    ]
    return rows + [("note", note) for note in f["notes"]]


def _truncate(rope: dict[str, Any]) -> str:
    return f"truncate {str(rope['truncate']).lower()} ({rope['spelling']})"
