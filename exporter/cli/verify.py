"""exporter verify: judge an artifact of anyone's against a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from exporter.cli import options
from exporter.cli.failures import stoppable
from exporter.cli.output import print_json, progress, say
from exporter.cli.report import show_report
from exporter.cli.result import answer


@click.command()
@click.argument("path", metavar="PATH", type=click.Path(path_type=Path))
@click.option("--against", metavar="MODEL", help="The checkpoint that it should be, a folder or a Hub id.")
@click.option(
    "-p",
    "--profile",
    metavar="NAME|FILE",
    help="Whose gates and memory it is held to.  [default: 16gb; of exporter's, the one that it was made for]",
)
@click.option(
    "--class",
    "loss",
    type=click.Choice(["exact", "near", "lossy"]),
    help="What it may lose, in place of what its own types say.",
)
@options.text
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the reports go.  [default: artifacts/verified/NAME]",
)
@options.device
@options.quiet
@options.as_json
def command(
    path: Path,
    against: str | None,
    profile: str | None,
    loss: str | None,
    text: str | None,
    out: Path | None,
    device: str,
    quiet: bool,
    as_json: bool,
) -> int:
    """Judge anyone's artifact against a checkpoint.

    PATH is a GGUF (its first part), an ONNX graph or its folder, or a folder of safetensors: MXFP4, GPTQ,
    compressed-tensors, floats. What it says of the model, every number that it holds and how it behaves in
    its runtime are compared with the checkpoint; report.json, report.md and report.html say what was found.
    Exit code 3 when a gate fails.

    A folder that exporter made is proved as by `exporter validate`. Without --against only its files are
    looked at: whether they are those that were sealed.

    \b
    Examples:
      exporter verify ./gpt-oss-20b-mxfp4.gguf --against openai/gpt-oss-20b
      exporter verify ./my-gptq --against ./my-fine-tune --profile 24gb
      exporter verify artifacts/gpt-oss-20b/16gb/gguf-mxfp4-q8
    """
    from exporter.errors import UsageError
    from exporter.pipeline.verify import Ask, folder_of, is_ours, require_sealed_files, verify

    if is_ours(path):
        if against is None:
            files = require_sealed_files(path, progress(quiet or as_json))
            return _integrity(path, files, as_json)
        from exporter.pipeline.validate import Ask as OwnAsk
        from exporter.pipeline.validate import validate

        if loss or out:
            raise UsageError(f"{path} is an artifact of exporter's, which --class and --out are not for", hint="--help")
        own = OwnAsk(path, against, profile, text=text, device=device)
        return answer(lambda watch: validate(own, watch), quiet, as_json)
    if against is None:
        raise UsageError(f"{path} was not made by exporter", hint="--against MODEL: the checkpoint that it should be")
    stoppable()
    ask = Ask(path, against, profile or "16gb", loss or "", text or "", out, device)
    report = verify(ask, progress(quiet or as_json))
    if as_json:
        print_json(report)
    else:
        _show(report, folder_of(ask))
    return 3 if report["status"] == "gate failed" else 0


def _integrity(path: Path, files: dict[str, str], as_json: bool) -> int:
    if as_json:
        print_json({"path": str(path), "status": "sealed", "files": files})
    else:
        say(f"{path}: all {len(files)} files are as SHA256SUMS says")
        say("how it behaves was not looked at: --against MODEL")
    return 0


def _show(report: dict[str, Any], folder: Path) -> None:
    show_report(report)
    say()
    say(report["target"]["statement"])
    say(f"{folder}/report.html")
