"""Artifacts of the demo that are sealed as after a proof, with a made-up report, and keys to sign them with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from exporter.pipeline.seal import seal, seal_proof
from tests.conftest import DEMO, make_artifact
from tests.report_sample import full


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sealed(root: Path, fmt: str = "gguf", recipe: str = "mxfp4-q8", target: str = "") -> Path:
    """The folder of an artifact with everything that a proof leaves in it."""
    root.mkdir(parents=True, exist_ok=True)
    folder = make_artifact(root, fmt, recipe, target)
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {
        p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"
    }
    seal(folder, {p.name: sha256(p) for p in DEMO.iterdir()}, {name: sha256(p) for name, p in files.items()})
    report = full()
    report["subject"] |= {"format": fmt, "recipe": recipe, "target": target, "digest": manifest["digest"]}
    report["status"] = "passed"
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "report.md").write_text("# A report\n")
    (folder / "report.html").write_text("<h1>A report</h1>\n")
    seal_proof(folder, report)
    return folder


def resealed(folder: Path) -> None:
    """All lists and the verdict made to agree with the files as they are now, as a careful forger would."""
    body = json.loads((folder / "manifest.json").read_text())
    body.pop("proof", None)
    (folder / "manifest.json").write_text(json.dumps(body))
    seal(folder, body["source"]["files"], {name: sha256(folder / name) for name in body["files"]})
    seal_proof(folder, json.loads((folder / "report.json").read_text()))


def make_key(root: Path, name: str, curve: str = "secp256r1", password: str = "") -> tuple[Path, Path]:
    """A private and a public key in PEM."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec

    curves = {each.name: each for each in (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1, ec.SECP256K1)}
    key = ec.generate_private_key(curves[curve]())
    hidden = s.BestAvailableEncryption(password.encode()) if password else s.NoEncryption()
    private, public = root / f"{name}.pem", root / f"{name}.pub"
    private.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, hidden))
    public.write_bytes(key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo))
    return private, public
