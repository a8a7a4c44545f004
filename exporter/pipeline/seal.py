"""An artifact's own word on itself: manifest.json, provenance.json, SHA256SUMS, and how they change together.

An artifact is sealed when its files are hashed, and once more when it was proved: the verdict of every gate goes into
manifest.json. Measured values do not, they are in report.json: what is sealed has the same bytes in every run.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from exporter.errors import ExporterError
from exporter.pipeline.files import sync_folder, write_whole
from exporter.pipeline.provenance import statement

REPORTS = ("report.json", "report.md", "report.html")
SIGNATURE = "model.sig"
# What may lie beside an artifact's data.
OWN_FILES = frozenset({"manifest.json", "provenance.json", "SHA256SUMS", SIGNATURE, *REPORTS})
OWN_CAP = 64 << 20  # bytes of any of these; a larger one is none of ours, and is not read
_NEXT = "SHA256SUMS.next"


def seal(folder: Path, source_hashes: Mapping[str, str], file_hashes: Mapping[str, str]) -> None:
    """Complete manifest.json with the hashes of every source file and every file of the artifact; write SHA256SUMS."""
    body = json.loads((folder / "manifest.json").read_text())
    body["source"]["files"] = dict(sorted(source_hashes.items()))
    body["files"] = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in sorted(file_hashes.items())
    }
    write_whole(folder / "manifest.json", _text(body))
    write_whole(folder / "SHA256SUMS", _sums(body, _text(body), None))


def seal_proof(folder: Path, report: Mapping[str, Any]) -> None:
    """Put the verdict of `report` into the manifest.json of a sealed artifact, and all that follows from that.

    Killed at any point, the artifact is as it was or as it becomes: `require_sealed` finishes what was begun.
    """
    with _alone(folder, wait=True):  # who looks holds it for a moment
        _require(folder, settle=True)
        body = json.loads((folder / "manifest.json").read_text())
        body["proof"] = verdict(report)
        text = _text(body)
        provenance = statement(text)
        sums = _sums(body, text, provenance)
        if (folder / "SHA256SUMS").read_text() == sums and _reads(folder / "provenance.json", provenance):
            return
        write_whole(folder / _NEXT, sums)
        write_whole(folder / "manifest.json", text)
        _finish(folder, provenance)


def require_sealed(folder: Path) -> None:
    """Raises ExporterError where SHA256SUMS does not hold what manifest.json says, and manifest.json itself.

    A change that a kill cut short is finished; one that is being made is left alone, and told.
    """
    if any((folder / name).exists() for name in (_NEXT, *_torn())):
        with _alone(folder):
            _require(folder, settle=True)
    else:
        _require(folder, settle=False)


def _require(folder: Path, settle: bool) -> None:
    try:
        text = (folder / "manifest.json").read_text()
        body = json.loads(text)
        provenance = statement(text) if proof_of(body) is not None else None
        expected = _sums(body, text, provenance)
        if settle:
            _settle(folder, expected, provenance)
        same = expected == (folder / "SHA256SUMS").read_text()
        same = same and (provenance is None or _reads(folder / "provenance.json", provenance))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        same = False
    if not same:
        raise ExporterError(
            f"{folder}/manifest.json is not the one in SHA256SUMS, or not of its files",
            hint="--overwrite makes the artifact again",
        )


def proof_of(manifest: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The verdict in a manifest.json; None where the artifact was never proved."""
    proof = manifest.get("proof")
    return proof if isinstance(proof, Mapping) else None


def verdict(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a proof found that does not depend on when and how fast it ran."""
    return {
        "status": report["status"],
        "class": report["subject"]["class"],
        "profile": report["profile"],
        "text": {key: report["text"][key] for key in ("source", "sha256")},
        "runtime": {key: report["runtime"].get(key, "") for key in ("name", "version")},
        "gates": [{key: gate[key] for key in ("name", "limit", "passed")} for gate in report["gates"]],
    }


def _text(body: Mapping[str, Any]) -> str:
    return json.dumps(body, indent=1) + "\n"


def _sums(body: Mapping[str, Any], manifest: str, provenance: str | None) -> str:
    sums = {name: each["sha256"] for name, each in body["files"].items()}
    sums["manifest.json"] = sha256(manifest.encode()).hexdigest()
    if provenance is not None:
        sums["provenance.json"] = sha256(provenance.encode()).hexdigest()
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def _settle(folder: Path, expected: str, provenance: str | None) -> None:
    """Finish, or undo, a change that a kill cut short: manifest.json is the new one or still the old one."""
    for name in _torn():
        (folder / name).unlink(missing_ok=True)
    if not (folder / _NEXT).is_file():
        return
    begun = (folder / _NEXT).read_text()
    if begun == expected and provenance is not None:
        _finish(folder, provenance)
    else:
        (folder / _NEXT).unlink()


def _torn() -> list[str]:
    """Names of what a kill leaves of a file that was being written."""
    return [f"{name}.partial" for name in (*OWN_FILES, _NEXT)]


@contextlib.contextmanager
def _alone(folder: Path, wait: bool = False) -> Iterator[None]:
    """Raises ExporterError while another process seals the folder, unless it is to wait for that.

    The kernel lets go when a process dies.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, folder, wait)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise ExporterError(
            f"{folder} is being sealed by another process", hint="run the same command again when it has ended"
        ) from None
    except OSError as error:
        # NFS locks nothing that is not open for writing, and some disks nothing at all: the run's own lock must do.
        if error.errno not in (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
            raise


def _finish(folder: Path, provenance: str) -> None:
    write_whole(folder / "provenance.json", provenance)
    os.replace(folder / _NEXT, folder / "SHA256SUMS")
    sync_folder(folder)


def _reads(path: Path, text: str) -> bool:
    return path.is_file() and path.stat().st_size == len(text.encode()) and path.read_text() == text
