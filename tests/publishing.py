"""Small artifacts that can be published, a Hub on loopback to publish them to, and what is there afterwards."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exporter.pipeline.manifest import total_digest
from exporter.pipeline.progress import Progress
from exporter.pipeline.publish import PublishAsk, Published, plan_publish, publish
from exporter.pipeline.seal import seal, seal_proof
from tests.loopback_hub import LoopbackHub
from tests.report_sample import full

TOKEN = "hf_loopback"
REPO = "me/tiny-GGUF"


def small_artifact(
    root: Path,
    fmt: str = "gguf",
    recipe: str = "mxfp4-q8",
    *,
    files: Mapping[str, bytes] | None = None,
    proof: str = "passed",
    repo: str = "demo/tiny",
    model: str = "tiny",
) -> Path:
    """The folder of an artifact as `exporter quantize` leaves it, of made-up numbers. proof "": not proved."""
    folder = root / model / "16gb" / f"{fmt}-{recipe}"
    digests = {"model.norm.weight": hashlib.sha256(recipe.encode()).hexdigest()}
    files = files or {f"{model}-{recipe}.gguf": b"GGUF\0" + recipe.encode() * 40_000}
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    body = {
        "exporter": "0.1.0",
        "command": f"exporter quantize {repo} --profile 16gb",
        "versions": {"numpy": "2.0.0"},
        "model": model,
        "format": fmt,
        "target": "",
        "recipe": {"name": recipe, "title": "Of the tests", "sha256": "0" * 64},
        "calibration": None,
        "source": {"repo": repo, "revision": "1" * 40, "layout": "hf-mxfp4", "files": {}},
        "files": {},
        "layout": "0" * 64,
        "digest": total_digest(digests),
        "digest_algorithm": "blake3",
        "tensors": {
            name: {"digest": digest, "scheme": "bf16", "method": "keep", "type": "BF16"}
            for name, digest in digests.items()
        },
    }
    (folder / "manifest.json").write_text(json.dumps(body))
    seal(folder, {"model.safetensors": "2" * 64}, {n: hashlib.sha256(d).hexdigest() for n, d in files.items()})
    if proof:
        _prove(folder, body, proof)
    return folder


def _prove(folder: Path, body: Mapping[str, Any], status: str) -> None:
    report = full()
    report["subject"] |= {"format": body["format"], "recipe": body["recipe"]["name"], "digest": body["digest"]}
    report["subject"] |= {"name": body["model"], "target": ""}
    report["status"] = status
    if status != "passed":
        report["gates"][0]["passed"] = False
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "report.md").write_text("# A report\n")
    (folder / "report.html").write_text("<h1>A report</h1>\n")
    seal_proof(folder, report)


@contextmanager
def loopback(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[LoopbackHub]:
    """A Hub that this process publishes to, without Xet, and without waiting: `hub.slept` is what it would have."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    from exporter.hub import client
    from exporter.publish import pulls, repository, transaction

    slept: list[float] = []
    with LoopbackHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for name in ("HF_OIDC_RESOURCE", "HF_OIDC_ID_TOKEN", "HUGGING_FACE_HUB_TOKEN", "GITHUB_ACTIONS"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(client, "ASK_WAITS", (0.0, 0.0))
        monkeypatch.setattr(client, "DOWNLOAD_WAITS", (0.0, 0.0))
        monkeypatch.setattr(repository, "ASK_WAITS", (0.0, 0.0))
        monkeypatch.setattr(transaction, "COMMIT_WAITS", (0.0, 0.0, 0.0))
        monkeypatch.setattr(pulls, "COMMIT_WAITS", (0.0, 0.0, 0.0))
        for module in (_http, client, pulls, transaction):
            monkeypatch.setattr(module, "time", SimpleNamespace(sleep=slept.append, time=time.time))
        hub.slept = slept  # type: ignore[attr-defined]
        yield hub


def put(*artifacts: Path, repo: str = REPO, **more: Any) -> Published:
    """Publish from this process."""
    return publish(plan_publish(PublishAsk(artifacts, repo, **more), Progress()), Progress())


def contents(hub: LoopbackHub, repo: str = REPO, revision: str = "main") -> dict[str, bytes]:
    """Every file of a branch."""
    return {name: blob.data for name, blob in hub.repos[repo].tree(revision).items()}


def holds(hub: LoopbackHub, folder: Path, prefix: str = "", repo: str = REPO, revision: str = "main") -> bool:
    """Whether a branch has every file of an artifact, byte for byte."""
    there = contents(hub, repo, revision)
    here = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return all(there.get(f"{prefix}/{name}" if prefix else name) == data for name, data in here.items())
