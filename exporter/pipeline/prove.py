"""Prove a finished artifact: unpack it and compare digests, then run it against the reference.

What runs it is the format's to say: llama.cpp for a GGUF; ONNX Runtime and onnxruntime-genai for an ONNX folder;
for a Hugging Face folder our own forward, on the weights as they are read back from its files.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import exporter
from exporter.formats.base import FileLayout, Format
from exporter.model import ModelConfig, parameter_count
from exporter.model.reference import ReferenceLogits
from exporter.pipeline import leaves as parallel
from exporter.pipeline.judge import against, begin, finish, subject, tasks_of, verdicts
from exporter.pipeline.manifest import total_digest
from exporter.pipeline.own import in_our_forward, own_forward, read_back, reading
from exporter.pipeline.plan import ArtifactPlan
from exporter.pipeline.progress import Progress, worker_stages
from exporter.pipeline.prove_onnx import in_onnxruntime, missing_provider, provider_for
from exporter.pipeline.prove_tensorrt import in_tensorrt
from exporter.pipeline.quantize import tasks
from exporter.pipeline.reference import Reference
from exporter.pipeline.target import limit_for
from exporter.types import leaf_count, leaf_range, tensor_digest
from exporter.types.gates import GATES, LossClass
from exporter.types.profile import Profile
from exporter.types.recipe import Step, loss_of
from exporter.validate.limits import Limit
from exporter.validate.runtime import prove_gguf

# What our own forward says of a whole model where a runtime computed only its first layers.
_FIGURES = ("export", "release", "accuracy", "twins", "floor", "generation", "router", "not_run")


def check_digests(
    folder: Path,
    fmt: Format,
    steps: Sequence[Step],
    expected: Mapping[str, str],
    workers: int,
    progress: Progress,
) -> dict[str, Any]:
    """Open the artifact, unpack every tensor and compare its digest with the one that was committed."""
    located = fmt.locate(folder, steps)
    progress.stage("digests", sum(s.spec.shape[0] * p.index_bytes for s in steps for p in located[s.name].parts))
    digests: dict[str, list[bytes]] = {s.name: [b""] * leaf_count(s.spec.shape) for s in steps}
    descriptors = {path: os.open(path, os.O_RDONLY) for path in {p.path for p in located.values()}}
    damaged: dict[str, str] = {}
    lock = threading.Lock()

    def work(task: tuple[Step, int]) -> None:
        step, leaf = task
        place = located[step.name]
        arrays = read_back(descriptors[place.path], place, step, *leaf_range(step.spec.shape, leaf))
        progress.advance(sum(a.size for a in arrays), step.name)
        try:
            digests[step.name][leaf] = fmt.unpack(step, arrays).leaf_digest()
        except ValueError as e:
            with lock:
                damaged[step.name] = str(e)

    try:
        parallel.each(tasks(steps), work, workers)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    progress.done()
    different = [s.name for s in steps if tensor_digest(s.scheme, s.spec.shape, digests[s.name]) != expected[s.name]]
    return {
        "tensors": len(steps),
        "equal": len(steps) - len(different),
        "different": [f"{name}: {damaged[name]}" if name in damaged else name for name in different],
    }


def as_laid_out(path: Path, layout: FileLayout) -> bool:
    """Whether all that is no tensor's is in the file: its head, and the bytes that are fixed beforehand."""
    with open(path, "rb") as f:
        if f.read(len(layout.head)) != layout.head or path.stat().st_size != layout.size:
            return False
        for fixed in layout.fixed:
            f.seek(fixed.offset)
            if f.read(fixed.nbytes) != fixed.make().tobytes():
                return False
    return True


@dataclass(frozen=True, eq=False)
class Proof:
    """What an artifact of ours is proved with.

    layouts: of its files, all digests known. name: of the model. expected: digest by tensor. rounded: whether blocks of
    floats off the MXFP4 grid were rounded to it, which its recipe does not tell.
    """

    artifact: ArtifactPlan
    layouts: Sequence[FileLayout]
    profile: Profile
    name: str
    reference: Reference
    expected: Mapping[str, str]
    workers: int
    threads: int
    progress: Progress
    rounded: bool = False

    @property
    def loss(self) -> LossClass:
        """What the artifact may lose."""
        return "lossy" if self.rounded else loss_of(self.artifact.steps)

    def prove(self, folder: Path) -> dict[str, Any]:
        """The report on the artifact in `folder`, written there as well."""
        before = begin(folder)
        report = self.examine(folder)
        return self.finish(folder, report | tasks_of(before, report["subject"]["digest"]))

    def finish(self, folder: Path, report: dict[str, Any]) -> dict[str, Any]:
        """The report with its gates and verdict, written."""
        return finish(folder, report, self.profile, self.limits(report), no_limit="no runtime was asked for memory")

    def examine(self, folder: Path, quick: bool = False) -> dict[str, Any]:
        """The report before it is judged. `quick`: nothing of speed, only what tells right from wrong."""
        artifact, steps = self.artifact, self.artifact.steps
        digests = check_digests(folder, artifact.format, steps, self.expected, self.workers, self.progress)
        files = [folder / layout.filename for layout in self.layouts]
        report: dict[str, Any] = {
            **against(self.reference, self.name),
            "subject": subject(
                self.name,
                artifact.format.name,
                files,
                self.loss,
                parameter_count(self.reference.checkpoint.config),
                recipe=artifact.recipe.name,
                to=artifact.spec.target,
                tool=f"exporter {exporter.__version__}",
                digest=total_digest(self.expected),
            ),
            "digests": digests,
            "digests_equal": digests["equal"] == digests["tensors"],
            "head_equal": all(as_laid_out(folder / each.filename, each) for each in self.layouts),
            "predicted_memory": {**asdict(artifact.fit), "total": artifact.fit.total},
        }
        return report | self._run(folder, limit_for(self.profile, files), quick)

    def limits(self, report: Mapping[str, Any]) -> dict[str, float | bool]:
        """All gates of the artifact: the format's, the profile's for its class, the recipe's."""
        own = _format_gates(self.artifact.format, report)
        if "controls_caught" in report:
            own["controls_caught"] = True
        if "limit_held" in report.get("memory", {}):
            own["memory_limit_held"] = True
        return {**own, **self.profile.gates.of(self.loss), **self.artifact.recipe.gates}

    def judge(self, folder: Path) -> tuple[list[str], float | None]:
        """The gates that the artifact in `folder` fails in a quick proof, and its mean KL."""
        report = self.examine(folder, quick=True)
        failed = [v.name for v in verdicts(report, self.limits(report)) if not v.passed]
        return failed, report["release"]["kl_mean"]

    # What the format's prover finds

    def _run(self, folder: Path, limit: Limit, quick: bool) -> dict[str, Any]:
        artifact, reference, threads = self.artifact, self.reference, self.threads
        prover, target, filename = artifact.format.prover, artifact.spec.target, self.layouts[0].filename
        if prover == "llama.cpp":
            return in_llama_cpp(folder / filename, reference, threads, limit, self.progress, quick)
        if prover == "reference":
            return self._in_our_forward(folder, quick)
        if prover == "tensorrt" and quick:  # an engine tells right from wrong no better than the weights in its graphs
            report = self._in_our_forward(folder, quick)
            report["not_run"]["tensorrt"] = "left out"
            return report
        if prover == "tensorrt":
            return self._in_tensorrt(folder)
        provider = provider_for(target, artifact.steps)
        if provider is None:
            report = self._in_our_forward(folder, quick)
            report["runtime"]["executed_on_target"] = False
            report["not_run"]["onnxruntime"] = missing_provider(target)
            return report
        own = own_forward(folder, artifact, reference)
        told = worker_stages(self.progress, "onnxruntime")
        report = in_onnxruntime(folder, filename, target, provider, reference, own, threads, limit, told, quick)
        self.progress.done()
        return report

    def _in_tensorrt(self, folder: Path) -> dict[str, Any]:
        def figures() -> dict[str, Any]:
            found = self._in_our_forward(folder, quick=False)
            return {key: found[key] for key in _FIGURES if key in found}

        def own(compared: Reference) -> ReferenceLogits:
            return own_forward(folder, self.artifact, compared)

        told = worker_stages(self.progress, "tensorrt")
        report = in_tensorrt(folder, self.reference, own, figures, self.threads, told)
        self.progress.done()
        return report

    def _in_our_forward(self, folder: Path, quick: bool) -> dict[str, Any]:
        with reading(folder, self.artifact) as read:
            tokenizer, name = folder / "tokenizer.json", self.artifact.format.name
            return in_our_forward(read, name, tokenizer, self.reference, _config(folder), quick)


def _config(folder: Path) -> ModelConfig | None:
    """What the folder's own config.json says of the model."""
    path = folder / "config.json"
    return ModelConfig.from_hf(json.loads(path.read_bytes()), str(path)) if path.is_file() else None


def _format_gates(fmt: Format, report: Mapping[str, Any]) -> dict[str, float | bool]:
    """The format's own limits on what its runtime measured: not on what `not_run` says it could not."""
    not_run = report.get("not_run", {})
    if fmt.prover in not_run:
        return {}
    return {
        name: limit
        for name, limit in fmt.gates.items()
        if not any(f"{GATES[name].metric}.".startswith(f"{key}.") for key in not_run)
    }


def in_llama_cpp(
    path: Path, reference: Reference, threads: int, limit: Limit, progress: Progress, quick: bool = False
) -> dict[str, Any]:
    """The report on a GGUF, anyone's."""
    report = prove_gguf(
        path,
        tokens=reference.windows.tokens,
        text=reference.sample,
        tokenizer_file=reference.tokenizer_file,
        release=reference.release,
        runtime=reference.runtime,
        further=reference.further(as_runtime=True, quick=quick),
        quick=quick,
        threads=threads,
        limit=limit,
        scratch=reference.scratch,
        on_progress=worker_stages(progress, "llama.cpp"),
    )
    progress.done()
    return report
