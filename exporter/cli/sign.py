"""exporter sign: model.sig for finished artifacts."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from exporter.cli import options
from exporter.cli.failures import stoppable
from exporter.cli.output import print_json, progress, say

_PASSWORD = "EXPORTER_KEY_PASSWORD"


@click.command()
@click.argument("artifacts", metavar="ARTIFACT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-k",
    "--key",
    type=click.Path(path_type=Path),
    metavar="KEY.pem",
    required=True,
    help="An EC private key in PEM, on the curve P-256, P-384 or P-521.",
)
@options.quiet
@options.as_json
def command(artifacts: tuple[Path, ...], key: Path, quiet: bool, as_json: bool) -> int:
    """Sign an artifact with a key of yours.

    Every file of ARTIFACT's folder is hashed, must be as it was sealed, and is named in model.sig: a sigstore
    bundle, as the model-signing library writes and reads it. Nothing is sent anywhere. The password of an
    encrypted key is asked for, or taken from EXPORTER_KEY_PASSWORD.

    Sign last: a proof that is made anew writes other reports than those that were signed. A card beside them
    is not covered. `exporter verify ARTIFACT --public-key KEY.pub` checks the signature, offline.

    \b
    Examples:
      exporter sign artifacts/gpt-oss-20b/16gb/gguf-mxfp4-q8 --key my-org.pem
      openssl ecparam -name prime256v1 -genkey -noout -out my-org.pem
      openssl ec -in my-org.pem -pubout -out my-org.pub
    """
    from exporter.errors import UsageError
    from exporter.pipeline.integrity import check_artifact
    from exporter.pipeline.sign import needs_password, private_key, sign_checked

    stoppable()
    if missing := next((path for path in artifacts if not path.is_dir()), None):
        raise UsageError(f"no folder {missing}", hint="give an artifact's folder: OUT/MODEL/PROFILE/ARTIFACT")
    password = _password(key) if needs_password(key) else ""
    owner = private_key(key, password)  # a wrong key is said before anything is hashed
    watch = progress(quiet or as_json)
    rows = []
    for artifact in artifacts:
        checked = check_artifact(artifact, watch)
        path = sign_checked(checked, key, password)
        files = sum(1 for name in checked.hashes if name != path.name)
        status = checked.proof["status"] if checked.proof else None
        rows.append({"path": str(artifact), "signature": str(path), "files": files, "proof": status})
        if not as_json:
            say(f"{path}: {files} files signed")
        if status != "passed":
            _warn(artifact, status)
    if as_json:
        print_json({"key_sha256": owner, "artifacts": rows})
    return 0


def _warn(artifact: Path, status: Any) -> None:
    what = "its gates failed" if status else "it was never proved: exporter validate"
    print(f"warning: {artifact} is signed, and {what}", file=sys.stderr)


def _password(key: Path) -> str:
    """Never an option: what stands in a command line, every process can read."""
    if _PASSWORD in os.environ:
        return os.environ[_PASSWORD]
    return str(click.prompt(f"Password of {key}", hide_input=True, err=True)) if sys.stdin.isatty() else ""
