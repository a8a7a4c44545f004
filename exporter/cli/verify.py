"""exporter verify: check the files of an artifact, or judge an artifact of anyone's against a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from exporter.cli import options
from exporter.cli.failures import stoppable
from exporter.cli.output import print_json, progress, say
from exporter.cli.report import show_report
from exporter.cli.result import answer
from exporter.types.sizes import format_size


@click.command()
@click.argument("place", metavar="PATH")
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
@click.option(
    "--public-key",
    type=click.Path(path_type=Path),
    metavar="KEY.pub",
    help="Check that the owner of this key signed it: model.sig, offline.",
)
@click.option("--folder", metavar="NAME", default="", help="Of several artifacts, only the one in this folder.")
@options.quiet
@options.as_json
def command(
    place: str,
    against: str | None,
    profile: str | None,
    loss: str | None,
    text: str | None,
    out: Path | None,
    device: str,
    public_key: Path | None,
    folder: str,
    quiet: bool,
    as_json: bool,
) -> int:
    """Judge anyone's artifact against a checkpoint.

    PATH is a GGUF (its first part), an ONNX graph or its folder, or a folder of safetensors: MXFP4, GPTQ,
    compressed-tensors, floats. What it says of the model, every number that it holds and how it behaves in
    its runtime are compared with the checkpoint; report.json, report.md and report.html say what was found.
    Exit code 3 when a gate fails. A folder that exporter made is proved as by `exporter validate`.

    Without --against only files are looked at, and only of what exporter made: whether they are those that
    were sealed. PATH is then an artifact's folder, a folder with several, or a repository on the Hub
    (org/name[@revision]), which is downloaded into the Hub's cache and checked byte for byte. Who made it is
    known only with --public-key. Exit code 1 when something is not as it was, 3 when a gate had failed,
    4 when another key signed it, or none.

    \b
    Examples:
      exporter verify ./gpt-oss-20b-mxfp4.gguf --against openai/gpt-oss-20b
      exporter verify ./my-gptq --against ./my-fine-tune --profile 24gb
      exporter verify artifacts/gpt-oss-20b/16gb/gguf-mxfp4-q8
      exporter verify my-org/gpt-oss-20b-GGUF --public-key my-org.pub
    """
    from exporter.errors import UsageError
    from exporter.pipeline.delivered import hub_model
    from exporter.pipeline.integrity import find_artifacts, is_ours

    path, model = Path(place), hub_model(place)
    if against is not None:
        if public_key or folder:
            raise UsageError(
                "--public-key and --folder are for files alone, not for --against", hint="check the files first"
            )
        if model:
            raise _on_the_hub(model, against)
        if is_ours(path):
            return _prove(path, against, profile, loss, text, out, device, quiet, as_json)
        return _judge(path, against, profile, loss, text, out, device, quiet, as_json)
    if model is None and not find_artifacts(path):
        raise _no_artifact(path)
    for option, given in (("--profile", profile), ("--class", loss), ("--text", text), ("--out", out)):
        if given:
            raise UsageError(f"{option} is for a proof, and files alone are looked at", hint="--against MODEL")
    return _look(model or path, folder, public_key, quiet, as_json)


def _no_artifact(path: Path) -> Exception:
    from exporter.errors import UsageError
    from exporter.pipeline.integrity import is_ours

    if not path.exists():
        return UsageError(f"{path} does not exist", hint="a file, a folder, or a Hub id (org/name)")
    if path.is_file() and is_ours(path.parent):
        return UsageError(f"{path} is one file of an artifact", hint=f"exporter verify {path.parent}")
    return UsageError(f"{path} was not made by exporter", hint="--against MODEL: the checkpoint that it should be")


def _on_the_hub(model: Any, against: str) -> Exception:
    from exporter.errors import Refused

    name = model.repo.split("/")[-1]
    revision = f" --revision {model.revision}" if model.revision else ""
    return Refused(
        f"{model} is on the Hub, and a proof writes its report beside the files",
        hint=f"hf download {model.repo}{revision} --local-dir {name}, then: exporter verify {name} --against {against}",
    )


# Proofs


def _prove(
    path: Path,
    against: str,
    profile: str | None,
    loss: str | None,
    text: str | None,
    out: Path | None,
    device: str,
    quiet: bool,
    as_json: bool,
) -> int:
    """An artifact of ours, as `exporter validate` proves it."""
    from exporter.errors import UsageError
    from exporter.pipeline.validate import Ask, validate

    if loss or out:
        raise UsageError(f"{path} is an artifact of exporter's, which --class and --out are not for", hint="--help")
    ask = Ask(path, against, profile, text=text, device=device)
    return answer(lambda watch: validate(ask, watch), quiet, as_json)


def _judge(
    path: Path,
    against: str,
    profile: str | None,
    loss: str | None,
    text: str | None,
    out: Path | None,
    device: str,
    quiet: bool,
    as_json: bool,
) -> int:
    """An artifact of anyone's."""
    from exporter.pipeline.verify import Ask, folder_of, verify

    stoppable()
    ask = Ask(path, against, profile or "16gb", loss or "", text or "", out, device)
    report = verify(ask, progress(quiet or as_json))
    if as_json:
        print_json(report)
    else:
        show_report(report)
        say()
        say(report["target"]["statement"])
        say(f"{folder_of(ask)}/report.html")
    return 3 if report["status"] == "gate failed" else 0


# Files alone


def _look(place: Any, folder: str, public_key: Path | None, quiet: bool, as_json: bool) -> int:
    from exporter.pipeline.delivered import look

    stoppable()
    found = look(place, progress(quiet or as_json), folder=folder, public_key=public_key)
    rows = [_row(artifact) for artifact in found.artifacts]
    wrong = [artifact for artifact in found.artifacts if artifact.problems]
    wrong.sort(key=lambda artifact: _status(artifact) != "damaged")
    if as_json:
        status = _status(wrong[0]) if wrong else "sealed"
        head = {"path": found.place, "revision": found.revision or None, "folder": str(found.path), "status": status}
        print_json({**head, "artifacts": rows, "beside": list(found.beside)})
        if wrong:
            return wrong[0].problems[0].exit_code
    else:
        for row in rows:
            _show_row(row, found.place)
        for name in found.beside[:8]:
            say(f"{_plain(name)}: beside the artifacts, and of none of them")
        if wrong:
            raise wrong[0].problems[0]
        _show_limits(rows, public_key)
    failed = any(row["proof"] and row["proof"]["status"] != "passed" for row in rows)
    return 3 if failed else 0


def _row(artifact: Any) -> dict[str, Any]:
    from exporter.pipeline.delivered import gates_of, source_of

    checked = artifact.checked
    made, proof = checked.made, checked.proof
    row: dict[str, Any] = {
        "name": artifact.name,
        "path": str(checked.folder),
        "status": _status(artifact),
        "problems": [{"message": each.message, "hint": each.hint} for each in artifact.problems],
        "signature": artifact.signature,
        "proof": None,
    }
    if made:
        row |= {key: getattr(made, key) for key in ("model", "format", "target", "recipe")}
        row["source"] = {"repo": made.repo or None, "revision": made.revision or None, "name": source_of(checked)}
        row |= {"files": dict(made.files), "bytes": sum(made.sizes.values())}
    if proof:
        count, failed = gates_of(checked)
        row["proof"] = {"status": proof["status"], "gates": count, "failed": failed}
    return row


def _status(artifact: Any) -> str:
    """ "untrusted": every file is as sealed, and the key that was given did not sign them."""
    from exporter.errors import Refused

    if not artifact.problems:
        return "sealed"
    whole = artifact.checked.made is not None and not artifact.checked.problems
    return "untrusted" if whole and all(isinstance(each, Refused) for each in artifact.problems) else "damaged"


def _show_row(row: dict[str, Any], place: str) -> None:
    name = row["name"] or place
    if problems := row["problems"]:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        what = "NOT as it was made" if row["status"] == "damaged" else "as sealed, but NOT to be trusted"
        say(f"{_plain(name)}: {what}: {_plain(problems[0]['message'])}{more}")
        return
    what = " ".join(part for part in (row["format"], row["recipe"], row["target"]) if part)
    count = len(row["files"])
    files = (
        f"all {count} files ({format_size(row['bytes'])})" if count > 1 else f"its file ({format_size(row['bytes'])})"
    )
    whole = f"{files} as sealed"
    say(_plain(f"{name}: {what} of {row['source']['name']}; {whole}; {_verdict(row['proof'])}; {_signed(row)}"))


def _verdict(proof: dict[str, Any] | None) -> str:
    if proof is None:
        return "gates: never run"
    if proof["failed"] or proof["status"] != "passed":
        return f"gates: FAILED, {', '.join(proof['failed']) or proof['status']}"
    return f"gates: passed, all {proof['gates']}"


def _signed(row: dict[str, Any]) -> str:
    return {"none": "not signed", "not checked": "signed, by whom was not checked", "good": "signature good"}[
        row["signature"]
    ]


def _show_limits(rows: list[dict[str, Any]], public_key: Path | None) -> None:
    """What an answer without a complaint does not say."""
    if public_key:
        say(f"signed by the owner of {public_key}")
    elif any(row["signature"] == "not checked" for row in rows):
        say("who made it was not looked at: --public-key KEY.pub")
    else:
        say("nothing here says who made it: it is not signed")
    say("how it behaves was not looked at: --against MODEL")


def _plain(text: str) -> str:
    """Words out of a stranger's files, as part of a line."""
    return "".join(c if c.isprintable() else "?" for c in text)
