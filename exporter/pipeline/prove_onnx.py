"""Prove an ONNX artifact: on the device that it is for where it is here, else on the CPU, and say which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exporter.errors import ExporterError
from exporter.model.reference import ReferenceLogits
from exporter.pipeline.calibration.chat import render
from exporter.pipeline.calibration.rows import Row
from exporter.pipeline.reference import Reference
from exporter.types.recipe import Step
from exporter.validate.child import OnProgress
from exporter.validate.genai import Chat
from exporter.validate.limits import Limit
from exporter.validate.onnx_kernels import CPU, CUDA, WEBGPU
from exporter.validate.onnx_session import import_onnxruntime
from exporter.validate.onnxruntime import Expected, prove_foreign, prove_onnx

PROVIDERS = {"cpu": CPU, "cuda": CUDA, "webgpu": WEBGPU}
_PACKAGES = {"cuda": "onnxruntime-gpu", "webgpu": "a build of onnxruntime with WebGPU"}

_MESSAGES = [
    {"role": "system", "content": "Answer in one line."},
    {"role": "user", "content": "What is 2 + 2? <b>&\u00e9</b>"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And\n\n\u4e2d\u6587?"},
]


def provider_for(target: str, steps: Sequence[Step]) -> str | None:
    """The execution provider to prove on: the target's own, else the CPU's; None where neither computes it.

    FP4 experts are CUDA's alone: on a CPU the same operator computes something else.
    """
    own = PROVIDERS[target or "cpu"]
    if own in import_onnxruntime().get_available_providers():
        return own
    return None if any(step.scheme.kind == "e2m1" for step in steps) else CPU


def missing_provider(target: str) -> str:
    """Why an artifact did not run on its target."""
    return f"onnxruntime has no {PROVIDERS[target]} here; {_PACKAGES[target]} brings it"


def in_onnxruntime(
    folder: Path,
    graph: str,
    target: str,
    provider: str,
    reference: Reference,
    own: ReferenceLogits,
    threads: int,
    limit: Limit,
    on_progress: OnProgress,
    quick: bool = False,
) -> dict[str, Any]:
    """The report on the artifact in `folder`, of which `graph` is the plain graph's file; see prove_onnx.

    `own`: what our forward predicts with the weights in the artifact.
    """
    report = prove_onnx(
        folder,
        folder / graph,
        expected_of(reference, own, quick=quick),
        provider=provider,
        text=reference.sample,
        tokenizer_file=reference.tokenizer_file,
        chat=_chat(reference),
        threads=threads,
        limit=limit,
        quick=quick,
        scratch=reference.scratch,
        on_progress=on_progress,
    )
    report["runtime"]["device"] = next(name for name, known in PROVIDERS.items() if known == provider)
    report["runtime"]["executed_on_target"] = provider == PROVIDERS[target or "cpu"]
    if not report["runtime"]["executed_on_target"]:
        report["not_run"]["target"] = missing_provider(target)
    return report


def in_foreign_onnxruntime(
    graph: Path,
    device: str,
    head_size: int,
    own_tokenizer: Path | None,
    reference: Reference,
    threads: int,
    limit: Limit,
    on_progress: OnProgress,
) -> dict[str, Any]:
    """The report on a graph that any tool wrote, on the `device` it is for where that is here, else on the CPU."""
    here = PROVIDERS[device] in import_onnxruntime().get_available_providers()
    device = device if here else "cpu"
    expected = expected_of(reference, reference.release)
    report = prove_foreign(
        graph,
        expected,
        provider=PROVIDERS[device],
        head_size=head_size,
        text=reference.sample,
        tokenizer_file=reference.tokenizer_file,
        own_tokenizer=own_tokenizer,
        threads=threads,
        limit=limit,
        scratch=reference.scratch,
        on_progress=on_progress,
    )
    report["runtime"]["device"] = device
    return report


def expected_of(reference: Reference, own: ReferenceLogits, long: bool = True, quick: bool = False) -> Expected:
    """What graphs of a folder are compared with; `own`: what our forward predicts with the weights in it.

    `long`: also on a text beyond the length that the rope was made for, and all that is measured further; `quick`: of
    that only what tells right from wrong.
    """
    return Expected(
        release=reference.release,
        routes=reference.routes,
        window=reference.config.sliding_window,
        trained=reference.trained,
        arithmetic=own,
        long=reference.long if long and not quick else None,
        further=reference.further(quick=quick) if long else None,
    )


def _chat(reference: Reference) -> Chat | str:
    """A conversation as the checkpoint's own template renders it, or why there is none."""
    if reference.checkpoint.chat_template is None:
        return "the checkpoint has no chat template"
    try:
        (rendered,) = render(reference.checkpoint, [Row("a conversation", chat={"messages": _MESSAGES})])
    except ExporterError as error:
        return error.message
    return Chat(_MESSAGES, rendered)
