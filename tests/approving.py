"""Proofs as the jobs of a workflow upload them, of made-up numbers, and ways to change them."""

import json
import shutil
from hashlib import sha256

from exporter.pipeline.approval import PROOF
from exporter.pipeline.judge import finish
from exporter.pipeline.provenance import statement
from exporter.pipeline.seal import seal, seal_proof
from tests.publishing import small_artifact
from tests.report_sample import figure, full


def prove(planned, root, **changes):
    """The folder of a small artifact under `root`, proved for the cell's profile; changes: of its report."""
    cell = planned.cell
    folder = small_artifact(root, cell.format, cell.recipe, proof="", model=cell.model_name)
    body = json.loads((folder / "manifest.json").read_text())
    body["recipe"]["sha256"] = planned.artifact.recipe.sha256
    (folder / "manifest.json").write_text(json.dumps(body))
    seal(folder, {"model.safetensors": "2" * 64}, {name: each["sha256"] for name, each in body["files"].items()})
    report = full() | {"release": figure(0.0005), "export": figure(0.0005)}
    report["generation"] |= {"length_difference": 0.01}
    report["subject"] |= {"name": cell.model_name, "format": cell.format, "recipe": cell.recipe, "target": cell.target}
    report["subject"] |= {"digest": body["digest"], "class": "near"}
    profile = planned.plan.profile
    finish(folder, report | changes, profile, {**profile.gates.of("near"), **planned.artifact.recipe.gates})
    seal_proof(folder, json.loads((folder / "report.json").read_text()))
    return folder


def uploaded(folders, to):
    """What goes from job to job: a folder for each, nothing of the cell in its name."""
    for number, folder in enumerate(folders):
        target = to / f"proof-{number}"
        target.mkdir(parents=True)
        for name in PROOF:
            if (folder / name).exists():
                shutil.copyfile(folder / name, target / name)
    return to


def write(path, body):
    path.write_text(json.dumps(body, indent=1) + "\n")


def edited(name, change):
    """A fault of the first proof: `change` of one of its files."""

    def fault(folder):
        path = folder / "proof-0" / name
        body = json.loads(path.read_text())
        change(body)
        write(path, body)

    return fault


def resealed(change):
    """A change of manifest.json with provenance.json and SHA256SUMS as exporter would have written them."""

    def fault(folder):
        edited("manifest.json", change)(folder)
        reseal(folder / "proof-0")

    return fault


def judged(change):
    """A change of report.json, with its verdict sealed as if it had been found so."""

    def fault(folder):
        edited("report.json", change)(folder)
        seal_proof(folder / "proof-0", json.loads((folder / "proof-0" / "report.json").read_text()))

    return fault


def reseal(place):
    text = (place / "manifest.json").read_text()
    (place / "provenance.json").write_text(statement(text))
    sums = {name: each["sha256"] for name, each in json.loads(text)["files"].items()}
    own = ("manifest.json", "provenance.json")
    sums |= {name: sha256((place / name).read_bytes()).hexdigest() for name in own}
    (place / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))
