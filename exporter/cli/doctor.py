"""exporter doctor: everything that is wrong with a checkpoint, not only the first thing."""

from __future__ import annotations

from dataclasses import asdict

import click

from exporter.cli import options
from exporter.cli.output import print_json, print_table, progress, say


@click.command()
@click.argument("model")
@click.option("--fast", is_flag=True, help="Headers and small files only; do not read the weights.")
@options.as_json
def command(model: str, fast: bool, as_json: bool) -> int:
    """Look for everything that is wrong with a checkpoint.

    Missing and misshapen tensors, NaN and infinity, scales of 255, dead experts, routers, sinks and
    biases, tokenizer ids, the chat template. Exit code 4 when there are errors.

    \b
    Examples:
      exporter doctor ./my-fine-tune
      exporter doctor ./my-fine-tune --fast
    """
    from exporter.pipeline.examine import examine
    from exporter.pipeline.source import local_folder

    watch = progress(as_json)
    folder = local_folder(model, watch)
    done = 0

    def on_progress(now: int, total: int) -> None:
        nonlocal done
        if not done:
            watch.stage("read", total)
        watch.advance(now - done)
        done = now

    diagnosis = examine(folder, not fast, on_progress)
    watch.done()
    if diagnosis.checkpoint:
        diagnosis.checkpoint.close()
    if as_json:
        print_json(
            {
                "path": str(folder),
                "sound": diagnosis.sound,
                "weights_read": diagnosis.deep,
                "findings": [asdict(f) for f in diagnosis.findings],
                "tokenizer": diagnosis.tokenizer,
            }
        )
    else:
        rows = [(f.level, f.what + (f"\n{f.cure}" if f.cure else ""), f.where) for f in diagnosis.findings]
        if rows:
            print_table(("", "finding", "where"), rows)
        errors, warnings = diagnosis.count("error"), diagnosis.count("warning")
        read = "every tensor was read" if diagnosis.deep else "the weights were not read"
        say(f"{model}: {errors} errors, {warnings} warnings; {read}")
    return 0 if diagnosis.sound else 4
