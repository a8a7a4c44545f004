"""Prove a finished artifact: unpack it and compare digests, then run it against the reference.

What runs it is the format's to say: llama.cpp for a GGUF; for a Hugging Face folder our own forward, on the
weights as they are read back from its files.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import exporter
from exporter.errors import ExporterError
from exporter.formats.base import FileLayout, Format, Located
from exporter.model import parameter_count
from exporter.model.config import RopeConfig
from exporter.model.layer import Read
from exporter.model.reference import ReferenceLogits, reference_logits
from exporter.numerics import decode
from exporter.numerics.floats import F32
from exporter.pipeline import leaves as parallel
from exporter.pipeline import regions
from exporter.pipeline.files import write_whole
from exporter.pipeline.plan import ArtifactPlan
from exporter.pipeline.progress import Progress
from exporter.pipeline.quantize import tasks
from exporter.pipeline.source import OpenedModel
from exporter.types import leaf_count, leaf_range, tensor_digest
from exporter.types.profile import Profile
from exporter.types.qtensor import U8
from exporter.types.recipe import Step
from exporter.validate import gates, llama_cpp, text
from exporter.validate.metrics import between, summary
from exporter.validate.runtime import compare_ids, prove_gguf

REFERENCE_TOP_K = 1024


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


class Reference:
    """Reference logits of one checkpoint on the held-out text, made once and kept in `folder`."""

    def __init__(self, model: OpenedModel, profile: Profile, folder: Path, device: str, progress: Progress) -> None:
        assert model.checkpoint.tokenizer_file is not None  # Run has looked
        self.tokenizer_file = model.checkpoint.tokenizer_file
        self.sample = text.standard_library()
        self.windows = text.windows(self.tokenizer_file, self.sample, profile.validate.windows, profile.validate.length)
        rope = model.checkpoint.config.rope
        self._model, self._device, self._progress = model, device, progress
        self.scratch = folder.parent
        ropes = [rope, llama_cpp.runtime_rope(rope)]
        key = _key(model.fingerprint(), self.windows.tokens, f"{REFERENCE_TOP_K} {ropes} {device}")
        self.release, self.runtime = self._load_or_make(
            [folder / f"{key}-{name}.npz" for name in ("release", "llama.cpp")], ropes
        )

    def _load_or_make(self, paths: list[Path], ropes: list[RopeConfig]) -> list[ReferenceLogits]:
        try:
            return [ReferenceLogits.load(p) for p in paths]
        except (OSError, ExporterError):
            pass
        made = self._forward(self._read, ropes, "reference")
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        for path, logits in zip(paths, made, strict=True):
            logits.save(path)
        return made

    def predict(self, read: Read, stage: str) -> ReferenceLogits:
        """What other weights predict on the same text, in the arithmetic of `release`."""
        return self._forward(read, [self._model.checkpoint.config.rope], stage)[0]

    def _forward(self, read: Read, ropes: list[RopeConfig], stage: str) -> list[ReferenceLogits]:
        config = self._model.checkpoint.config
        self._progress.stage(stage, parameter_count(config), "parameters")
        done = 0

        def on_progress(now: int, _total: int) -> None:
            nonlocal done
            self._progress.advance(now - done)
            done = now

        made = reference_logits(
            config,
            read,
            self.windows.tokens,
            ropes,
            top_k=min(config.vocab_size, REFERENCE_TOP_K),
            device=self._device,
            on_progress=on_progress,
        )
        self._progress.done()
        return made

    def _read(self, name: str, start: int, stop: int) -> F32:
        return decode.values(self._model.checkpoint.read(name, start, stop))


def _key(fingerprint: str, tokens: np.ndarray[Any, Any], settings: str) -> str:
    """Names one reference: checkpoint, text, and how it is computed."""
    h = hashlib.sha256(f"{fingerprint} {settings}\n".encode())
    h.update(np.ascontiguousarray(tokens).tobytes())
    return h.hexdigest()[:24]


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
    if artifact.format.prover == "llama.cpp":
        report |= _in_llama_cpp(folder / layouts[0].filename, reference, threads, progress)
    else:
        report |= _in_our_forward(folder, artifact, reference, progress)
    verdicts = gates.evaluate(report, {**profile.gates, **artifact.recipe.gates})
    report["gates"] = [asdict(v) for v in verdicts]
    report["status"] = "passed" if all(v.passed for v in verdicts) else "gate failed"
    write_whole(folder / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    return report


def _in_llama_cpp(path: Path, reference: Reference, threads: int, progress: Progress) -> dict[str, Any]:
    seen: dict[str, int] = {}

    def on_progress(what: str, done: int, total: int) -> None:
        if what not in seen:
            progress.done()
            progress.stage(f"llama.cpp: {what}", total, "steps")
        progress.advance(done - seen.get(what, 0))
        seen[what] = done

    report = prove_gguf(
        path,
        tokens=reference.windows.tokens,
        text=reference.sample,
        tokenizer_file=reference.tokenizer_file,
        release=reference.release,
        runtime=reference.runtime,
        threads=threads,
        scratch=reference.scratch,
        on_progress=on_progress,
    )
    progress.done()
    return report


def _in_our_forward(folder: Path, artifact: ArtifactPlan, reference: Reference, progress: Progress) -> dict[str, Any]:
    """The same figures without a runtime: the reference's arithmetic on the weights in the files.

    There is no second arithmetic, so "export" and "release" are one comparison. No speed, no memory.
    """
    located = artifact.format.locate(folder, artifact.steps)
    steps = {step.name: step for step in artifact.steps}
    descriptors = {path: os.open(path, os.O_RDONLY) for path in {p.path for p in located.values()}}

    def read(name: str, start: int, stop: int) -> F32:
        step, place = steps[name], located[name]
        arrays = read_back(descriptors[place.path], place, step, start, stop)
        return decode.values(artifact.format.unpack(step, arrays))

    try:
        made = reference.predict(read, f"{artifact.format.name}: logits")
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
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
