"""What an artifact says of itself: the verdict in it, provenance.json, and both at once or not at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import ExporterError
from exporter.pipeline import seal as sealing
from exporter.pipeline.provenance import statement
from exporter.pipeline.seal import proof_of, require_sealed, seal, seal_proof

MANIFEST = {
    "exporter": "0.1.0",
    "command": "exporter quantize org/tuned@abc --profile 16gb --format gguf",
    "versions": {"exporter": "0.1.0", "python": "3.11.7", "numpy": "2.4.6"},
    "model": "tuned",
    "format": "gguf",
    "target": "",
    "recipe": {"name": "gptq-int4", "title": "INT4", "sha256": "1" * 64},
    "calibration": {"text": "self", "sha256": "2" * 64, "windows": 4, "length": 512},
    "source": {"repo": "org/tuned", "revision": "abc", "layout": "hf-mxfp4", "files": {}},
    "files": {},
    "layout": "3" * 64,
    "digest": "4" * 64,
    "digest_algorithm": "blake3",
    "tensors": {},
}
REPORT: dict[str, Any] = {
    "status": "passed",
    "subject": {"class": "near"},
    "profile": {"name": "16gb", "sha256": "5" * 64},
    "text": {"source": "held-out files", "sha256": "6" * 64, "tokens": 2048},
    "runtime": {"name": "llama.cpp", "version": "0.6", "threads": 2},
    "gates": [{"name": "release_kl_mean", "value": 0.00251, "limit": 0.01, "passed": True}],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.gguf").write_bytes(b"numbers")
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    seal(tmp_path, {"b.safetensors": "8" * 64, "a.json": "7" * 64}, {"model.gguf": sha256(tmp_path / "model.gguf")})
    return tmp_path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_verdict_is_sealed_with_the_files(folder: Path) -> None:
    assert proof_of(json.loads((folder / "manifest.json").read_text())) is None
    seal_proof(folder, REPORT)
    proof = proof_of(json.loads((folder / "manifest.json").read_text()))
    assert proof is not None
    assert proof["gates"] == [{"name": "release_kl_mean", "limit": 0.01, "passed": True}]
    sums = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert sums == {name: sha256(folder / name) for name in ("manifest.json", "model.gguf", "provenance.json")}


def test_measured_values_do_not_change_what_is_sealed(folder: Path) -> None:
    seal_proof(folder, REPORT)
    before = contents(folder)
    other = REPORT | {"gates": [REPORT["gates"][0] | {"value": 0.0026}], "speed": {"load_seconds": 3}}
    seal_proof(folder, other)
    assert contents(folder) == before
    seal_proof(folder, REPORT | {"status": "gate failed"})
    assert contents(folder)["manifest.json"] != before["manifest.json"]


class Killed(BaseException):
    pass


def until_killed(real: Callable[..., Any], left: list[int]) -> Callable[..., Any]:
    """`real`, until it and its like were called left[0] times."""

    def step(*arguments: Any) -> Any:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return real(*arguments)

    return step


@pytest.mark.parametrize("proved_before", [False, True])
def test_a_kill_between_two_writes_leaves_one_of_the_two_states(
    folder: Path, monkeypatch: pytest.MonkeyPatch, proved_before: bool
) -> None:
    if proved_before:
        seal_proof(folder, REPORT | {"status": "gate failed"})
    old = contents(folder)
    for at in range(20):
        for name in old.keys() | contents(folder).keys():
            (folder / name).write_bytes(old[name]) if name in old else (folder / name).unlink()
        left = [at]
        with monkeypatch.context() as patch:
            for owner, name in ((sealing.os, "replace"), (sealing, "write_whole"), (sealing, "sync_folder")):  # type: ignore[attr-defined]
                patch.setattr(owner, name, until_killed(getattr(owner, name), left))
            try:
                seal_proof(folder, REPORT)
                break
            except Killed:
                pass
        require_sealed(folder)
        settled = contents(folder)
        assert settled == old or b'"passed": true' in settled["manifest.json"]
        assert "SHA256SUMS.next" not in settled
    else:
        pytest.fail("never got to its end")
    assert at >= 5  # every write was one of the places


@pytest.mark.parametrize("name", ["manifest.json", "provenance.json", "SHA256SUMS"])
def test_a_changed_byte_in_what_it_says_is_found(folder: Path, name: str) -> None:
    seal_proof(folder, REPORT)
    raw = (folder / name).read_bytes()
    (folder / name).write_bytes(raw.replace(b"0", b"1", 1))
    with pytest.raises(ExporterError, match="not the one in SHA256SUMS"):
        require_sealed(folder)


def test_the_provenance_names_what_it_was_made_of(folder: Path) -> None:
    seal_proof(folder, REPORT)
    text = (folder / "provenance.json").read_text()
    assert text == statement((folder / "manifest.json").read_text())
    value = json.loads(text)
    assert {each["name"]: each["digest"]["sha256"] for each in value["subject"]} == {
        name: sha256(folder / name) for name in ("manifest.json", "model.gguf")
    }
    build = value["predicate"]["buildDefinition"]
    assert build["externalParameters"]["command"] == MANIFEST["command"]
    materials = {each["name"]: each["digest"]["sha256"] for each in build["resolvedDependencies"]}
    assert materials == {
        "a.json": "7" * 64,
        "b.safetensors": "8" * 64,
        "recipe gptq-int4": "1" * 64,
        "calibration text": "2" * 64,
        "profile 16gb": "5" * 64,
        "text that it was measured on": "6" * 64,
    }
    assert build["resolvedDependencies"][0]["uri"] == "pkg:huggingface/org/tuned@abc#a.json"


def test_who_looks_does_not_disturb_who_seals(folder: Path) -> None:
    """A second process that met the first one's unfinished files once removed them, and the proof was lost."""
    torn = folder / "SHA256SUMS.next.partial"
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        require_sealed(folder)
        torn.write_text("half")
        with pytest.raises(ExporterError, match="is being sealed by another process"):
            require_sealed(folder)
        assert torn.exists()
    finally:
        os.close(descriptor)
    require_sealed(folder)  # as after a kill
    assert not torn.exists()


def test_a_disk_without_locks_on_folders_does_not_stop_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS: an exclusive lock needs a file that is open for writing, and no folder can be."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(sealing.fcntl, "flock", refuse)  # type: ignore[attr-defined]
    seal_proof(folder, REPORT)
    require_sealed(folder)
