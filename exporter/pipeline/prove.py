"""Prove a finished artifact: unpack it and compare digests, then run it against the reference.

What runs it is the format's to say: llama.cpp for a GGUF; ONNX Runtime and onnxruntime-genai for an ONNX folder;
for a Hugging Face folder our own forward, on the weights as they are read back from its files.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import exporter
from exporter.errors import ExporterError
from exporter.formats.base import FileLayout, Format, Located
from exporter.model.reference import ReferenceLogits
from exporter.numerics import decode
from exporter.numerics.floats import F32
from exporter.pipeline import leaves as parallel
from exporter.pipeline import regions
from exporter.pipeline.files import write_whole
from exporter.pipeline.plan import ArtifactPlan
from exporter.pipeline.progress import Progress, worker_stages
from exporter.pipeline.prove_onnx import in_onnxruntime, missing_provider, provider_for
from exporter.pipeline.prove_tensorrt import in_tensorrt
from exporter.pipeline.quantize import tasks
from exporter.pipeline.reference import Reference
from exporter.types import leaf_count, leaf_range, tensor_digest
from exporter.types.gates import GATES
from exporter.types.profile import Profile
from exporter.types.qtensor import U8
from exporter.types.recipe import Step
from exporter.validate import gates, text
from exporter.validate.metrics import between, summary
from exporter.validate.runtime import compare_ids, prove_gguf


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


def read_back(descriptor: int, place: Located, step: Step, start: int, stop: int) -> list[U8]:
    """The arrays of some leading indices of a tensor, from the open file that has them."""
    arrays = regions.read_all(descriptor, place.parts, start, stop)
    if arrays is None:
        raise ExporterError(
            f"{place.path.name}: ends inside {step.name}", hint="exporter quantize ... --overwrite makes it again"
        )
    return arrays


def prove(
    folder: Path,
    artifact: ArtifactPlan,
    layouts: Sequence[FileLayout],
    profile: Profile,
    reference: Reference,
    expected: Mapping[str, str],
    workers: int,
    threads: int,
    progress: Progress,
) -> dict[str, Any]:
    """The report on one artifact, written to `report.json` in its folder as well.

    `layouts`: of its files, all digests known; `expected`: digest by tensor.
    """
    (folder / "report.json").unlink(missing_ok=True)  # whatever it said, it is judged anew
    digests = check_digests(folder, artifact.format, artifact.steps, expected, workers, progress)
    report: dict[str, Any] = {
        "digests": digests,
        "digests_equal": digests["equal"] == digests["tensors"],
        "head_equal": all(as_laid_out(folder / each.filename, each) for each in layouts),
        "predicted_memory": {**asdict(artifact.fit), "total": artifact.fit.total},
        "text": {
            "source": reference.windows.source,
            "sha256": reference.windows.sha256,
            "tokens": int(reference.windows.tokens.size),
            "windows": list(reference.windows.tokens.shape),
        },
        "profile": {"name": profile.name, "sha256": profile.sha256},
    }
    report |= _run(folder, artifact, layouts[0].filename, reference, threads, progress)
    limits = {**_format_gates(artifact.format, report), **profile.gates, **artifact.recipe.gates}
    verdicts = gates.evaluate(report, limits)
    report["gates"] = [asdict(v) for v in verdicts]
    report["status"] = "passed" if all(v.passed for v in verdicts) else "gate failed"
    write_whole(folder / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    return report


def _run(
    folder: Path, artifact: ArtifactPlan, filename: str, reference: Reference, threads: int, progress: Progress
) -> dict[str, Any]:
    """What the format's prover finds; `filename`: the artifact's first file."""
    prover, target = artifact.format.prover, artifact.spec.target
    if prover == "llama.cpp":
        return _in_llama_cpp(folder / filename, reference, threads, progress)
    if prover == "reference":
        return _in_our_forward(folder, artifact, reference)
    if prover == "tensorrt":
        return _in_tensorrt(folder, artifact, reference, threads, progress)
    provider = provider_for(target, artifact.steps)
    if provider is None:
        report = _in_our_forward(folder, artifact, reference)
        report["runtime"]["executed_on_target"] = False
        return report | {"not_run": {"onnxruntime": missing_provider(target)}}
    own = _own_forward(folder, artifact, reference)
    told = worker_stages(progress, "onnxruntime")
    report = in_onnxruntime(folder, filename, target, provider, reference, own, threads, told)
    progress.done()
    return report


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


def _in_llama_cpp(path: Path, reference: Reference, threads: int, progress: Progress) -> dict[str, Any]:
    report = prove_gguf(
        path,
        tokens=reference.windows.tokens,
        text=reference.sample,
        tokenizer_file=reference.tokenizer_file,
        release=reference.release,
        runtime=reference.runtime,
        threads=threads,
        scratch=reference.scratch,
        on_progress=worker_stages(progress, "llama.cpp"),
    )
    progress.done()
    return report


def _in_tensorrt(
    folder: Path, artifact: ArtifactPlan, reference: Reference, threads: int, progress: Progress
) -> dict[str, Any]:
    def figures() -> dict[str, Any]:
        found = _in_our_forward(folder, artifact, reference)
        return {key: found[key] for key in ("export", "release")}

    def own(compared: Reference) -> ReferenceLogits:
        return _own_forward(folder, artifact, compared)

    report = in_tensorrt(folder, reference, own, figures, threads, worker_stages(progress, "tensorrt"))
    progress.done()
    return report


def _own_forward(folder: Path, artifact: ArtifactPlan, reference: Reference) -> ReferenceLogits:
    """What the reference's arithmetic predicts with the weights as they are read back from the files."""
    located = artifact.format.locate(folder, artifact.steps)
    steps = {step.name: step for step in artifact.steps}
    descriptors = {path: os.open(path, os.O_RDONLY) for path in {p.path for p in located.values()}}

    def read(name: str, start: int, stop: int) -> F32:
        step, place = steps[name], located[name]
        arrays = read_back(descriptors[place.path], place, step, start, stop)
        try:
            return decode.values(artifact.format.unpack(step, arrays))
        except ValueError as error:
            raise ExporterError(
                f"{place.path}: {name} is damaged: {error}", hint="exporter quantize ... --overwrite makes it again"
            ) from error

    try:
        return reference.predict(read, f"{artifact.format.name}: logits")
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _in_our_forward(folder: Path, artifact: ArtifactPlan, reference: Reference) -> dict[str, Any]:
    """The same figures without a runtime: the reference's arithmetic on the weights in the files.

    There is no second arithmetic, so "export" and "release" are one comparison. No speed, no memory.
    """
    made = _own_forward(folder, artifact, reference)
    tokenizer = text.load_tokenizer(reference.tokenizer_file)
    found = text.load_tokenizer(folder / "tokenizer.json")
    pieces = text.pieces(tokenizer, reference.sample)
    ids = compare_ids(pieces, [text.encode(tokenizer, p) for p in pieces], [text.encode(found, p) for p in pieces])
    figures = summary(between(reference.release, made))
    return {
        "export": figures,
        "release": figures,
        "tokenizer_equal": ids["first_difference"] is None,
        "tokenizer": ids,
        "runtime": {"name": "exporter reference", "version": exporter.__version__, "arithmetic": "float32"},
    }
