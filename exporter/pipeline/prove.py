"""Prove a finished artifact: unpack it and compare digests, then run it against the reference."""

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

from exporter.errors import ExporterError
from exporter.formats.base import Format, Located
from exporter.model import parameter_count
from exporter.model.reference import ReferenceLogits, reference_logits
from exporter.numerics import decode
from exporter.numerics.floats import F32
from exporter.pipeline import leaves as parallel
from exporter.pipeline.files import write_whole
from exporter.pipeline.plan import ArtifactPlan
from exporter.pipeline.progress import Progress
from exporter.pipeline.quantize import tasks
from exporter.pipeline.source import OpenedModel
from exporter.types import leaf_count, leaf_range, tensor_digest
from exporter.types.profile import Profile
from exporter.types.recipe import Step
from exporter.validate import gates, llama_cpp, text
from exporter.validate.runtime import prove_gguf

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
    progress.stage("digests", sum(p.nbytes for p in located.values()))
    digests: dict[str, list[bytes]] = {s.name: [b""] * leaf_count(s.spec.shape) for s in steps}
    descriptors = {path: os.open(path, os.O_RDONLY) for path in {p.path for p in located.values()}}
    damaged: dict[str, str] = {}
    lock = threading.Lock()

    def work(task: tuple[Step, int]) -> None:
        step, leaf = task
        raw = _read_leaf(descriptors, located[step.name], step, leaf)
        progress.advance(raw.size, step.name)
        try:
            digests[step.name][leaf] = fmt.unpack(step, raw).leaf_digest()
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


def _begins_with(path: Path, head: bytes) -> bool:
    with open(path, "rb") as f:
        return f.read(len(head)) == head


def _read_leaf(descriptors: Mapping[Path, int], place: Located, step: Step, leaf: int) -> np.ndarray[Any, Any]:
    start, stop = leaf_range(step.spec.shape, leaf)
    stride = place.nbytes // step.spec.shape[0]
    raw = os.pread(descriptors[place.path], (stop - start) * stride, place.offset + start * stride)
    if len(raw) != (stop - start) * stride:
        raise ExporterError(
            f"{place.path.name}: ends inside {step.name}", hint="exporter quantize ... --overwrite makes it again"
        )
    return np.frombuffer(raw, np.uint8)


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

    def _load_or_make(self, paths: list[Path], ropes: list[Any]) -> list[ReferenceLogits]:
        try:
            return [ReferenceLogits.load(p) for p in paths]
        except (OSError, ExporterError):
            pass
        config = self._model.checkpoint.config
        self._progress.stage("reference", parameter_count(config), "parameters")
        done = 0

        def on_progress(now: int, _total: int) -> None:
            nonlocal done
            self._progress.advance(now - done)
            done = now

        made = reference_logits(
            config,
            self._read,
            self.windows.tokens,
            ropes,
            top_k=min(config.vocab_size, REFERENCE_TOP_K),
            device=self._device,
            on_progress=on_progress,
        )
        self._progress.done()
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        for path, logits in zip(paths, made, strict=True):
            logits.save(path)
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
    heads: Mapping[str, bytes],
    profile: Profile,
    reference: Reference,
    expected: Mapping[str, str],
    workers: int,
    threads: int,
    progress: Progress,
) -> dict[str, Any]:
    """The report on one artifact, written to `report.json` in its folder as well.

    `heads`: what each file must begin with; `expected`: digest by tensor.
    """
    (folder / "report.json").unlink(missing_ok=True)  # whatever it said, it is judged anew
    digests = check_digests(folder, artifact.format, artifact.steps, expected, workers, progress)
    report: dict[str, Any] = {
        "digests": digests,
        "digests_equal": digests["equal"] == digests["tensors"],
        "head_equal": all(_begins_with(folder / name, head) for name, head in heads.items()),
        "predicted_memory": {**asdict(artifact.fit), "total": artifact.fit.total},
        "text": {
            "source": reference.windows.source,
            "sha256": reference.windows.sha256,
            "tokens": int(reference.windows.tokens.size),
            "windows": list(reference.windows.tokens.shape),
        },
        "profile": {"name": profile.name, "sha256": profile.sha256},
    }
    seen: dict[str, int] = {}

    def on_progress(what: str, done: int, total: int) -> None:
        if what not in seen:
            progress.done()
            progress.stage(f"llama.cpp: {what}", total, "steps")
        progress.advance(done - seen.get(what, 0))
        seen[what] = done

    report |= prove_gguf(
        sorted(folder.glob("*.gguf"))[0],
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
    verdicts = gates.evaluate(report, profile.gates)
    report["gates"] = [asdict(v) for v in verdicts]
    report["status"] = "passed" if all(v.passed for v in verdicts) else "gate failed"
    write_whole(folder / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    return report
