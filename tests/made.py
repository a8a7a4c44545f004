"""An artifact of the demo in this process: exported, with what it is proved with, and not proved yet."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from exporter.formats.base import ExportJob
from exporter.pipeline.controls import Copy
from exporter.pipeline.machine import runtime_threads
from exporter.pipeline.manifest import provenance
from exporter.pipeline.profiles import source_text
from exporter.pipeline.progress import Progress
from exporter.pipeline.prove import Proof
from exporter.pipeline.request import RunRequest
from exporter.pipeline.run import Run
from tests.conftest import DEMO


def short_profile(root: Path, fmt: str, recipe: str, target: str = "") -> Path:
    """A profile of one artifact, with the gates of the CPU's and 768 tokens of text, most of them past the window."""
    text = source_text("cpu")
    hardware, rest = text[: text.index("[[artifact]]")], text[text.index("[validate]") :]
    artifact = f'[[artifact]]\nformat = "{fmt}"\nrecipe = "{recipe}"\ntarget = "{target}"\n\n'
    path = root / f"{fmt}.toml"
    path.write_text(hardware + artifact + rest.replace("windows = 4", "windows = 2").replace("512", "384"))
    return path


@dataclass(frozen=True)
class Made:
    """`folder` of the artifact, the job that laid it out, and its proof."""

    folder: Path
    job: ExportJob
    proof: Proof

    def copy(self, root: Path) -> Copy:
        return Copy(shutil.copytree(self.folder, root / "copy"), self.proof.artifact, self.job, self.proof.layouts)


def make(root: Path, fmt: str, recipe: str, target: str = "") -> Made:
    path = short_profile(root, fmt, recipe, target)
    run = Run(RunRequest(str(DEMO), str(path), out=root / "out", until="export"), Progress())
    (result,) = run.run().artifacts
    tensors = json.loads((result.path / "manifest.json").read_text())["tensors"]
    facts = provenance(run.model, result.plan, {name: tensor["digest"] for name, tensor in tensors.items()})
    job = run.maker.job(result.plan, facts)
    proof = Proof(
        artifact=result.plan,
        layouts=result.plan.format.layout(job),
        profile=run.plan.profile,
        name="tiny-gpt-oss",
        reference=run.maker._reference,
        expected=facts.tensor_digests,
        workers=1,
        threads=runtime_threads(),
        progress=Progress(),
    )
    return Made(result.path, job, proof)
