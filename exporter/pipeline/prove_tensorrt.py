"""Prove a TensorRT folder: whole where this machine can compute it, else its first layers beside our own forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from exporter.model import ModelConfig, parameter_count
from exporter.model.reference import ReferenceLogits
from exporter.pipeline.prove_onnx import expected_of
from exporter.pipeline.reference import Reference
from exporter.types.sizes import format_size
from exporter.validate.child import OnProgress
from exporter.validate.tensorrt_prove import Limits, prove_tensorrt

# ONNX Runtime's CPU decodes every expert anew for each token: above this many parameters it is seconds for one.
_WHOLE = 2 * 10**9
_COPIES = 6  # of a layer's experts in float32 that ONNX Runtime's CPU has at once: 20 GB at the peak for 20b
_STEPS = 4  # tokens that such a model decodes one by one
_SECONDS = 1800.0  # for one engine
_SHARE = 0.8  # of the memory that is free


def engine_limits() -> Limits:
    """What building one engine may take here."""
    return Limits(_SECONDS, int(_SHARE * psutil.virtual_memory().available))


def _too_little(config: ModelConfig) -> str:
    """Why ONNX Runtime cannot compute the first layers here, or ""."""
    experts = config.num_local_experts * 3 * config.intermediate_size * config.hidden_size * 4  # of a layer, in float32
    need, free = _COPIES * experts, psutil.virtual_memory().available
    if need <= free:
        return ""
    return f"graphs in ONNX Runtime: {format_size(need)} of memory for a layer's experts, {format_size(free)} are free"


def depth(config: ModelConfig) -> int:
    """Layers that are computed: all, or as many as it takes to have one of each kind."""
    if parameter_count(config) <= _WHOLE:
        return config.num_hidden_layers
    return max(config.layer_types.index(kind) for kind in set(config.layer_types)) + 1


def in_tensorrt(
    folder: Path,
    reference: Reference,
    own: Callable[[Reference], ReferenceLogits],
    figures: Callable[[], Mapping[str, Any]],
    threads: int,
    on_progress: OnProgress,
) -> dict[str, Any]:
    """The report on a folder; see `prove_tensorrt`. `own(reference)`: what our forward predicts with its weights.

    Of a model that is not computed whole "export" and "release" are `figures()`: our own forward's, of all layers.
    """
    config = reference.config
    layers = depth(config)
    whole = layers == config.num_hidden_layers
    compared = reference if whole else reference.shallow(layers)
    expected = expected_of(compared, own(compared), long=whole)
    if not whole:
        tokens = expected.release.tokens.shape[1]
        release, arithmetic = expected.release.first(1), expected.arithmetic.first(1)
        expected = replace(expected, release=release, arithmetic=arithmetic, routes=expected.routes[:, :tokens])
    report = prove_tensorrt(
        folder,
        expected,
        layers=layers,
        steps=0 if whole else _STEPS,
        of_layers=config.num_hidden_layers,
        text=reference.sample,
        tokenizer_file=reference.tokenizer_file,
        threads=threads,
        limits=engine_limits(),
        scratch=reference.scratch,
        on_progress=on_progress,
        left_out="" if whole else _too_little(config),
    )
    if not whole:
        found = dict(figures())
        report["not_run"] = {**found.pop("not_run", {}), **report["not_run"]}
        # Of the router, what the graphs chose where they ran.
        report |= {key: value for key, value in found.items() if key != "router" or key not in report}
        what = "graphs and engines" if "arithmetic" in report else "engines"
        if "arithmetic" in report:
            report["not_run"]["long"] = "no long text: each token of a model this large takes seconds in ONNX Runtime"
        report["not_run"]["depth"] = (
            f"{what} of {layers} of {config.num_hidden_layers} layers; "
            "KL and top-1 are of our own forward on the weights in the files"
        )
    return report
