"""Gates: the measured values that decide whether an artifact is good, and in which direction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from exporter.errors import UsageError
from exporter.types import toml


@dataclass(frozen=True)
class GateKind:
    """`metric` is a dotted path into an artifact's report; `sense` says on which side the limit lies."""

    metric: str
    sense: Literal["max", "min", "equal"]
    meaning: str


# Profiles name these under [gates]. "export" compares with the reference computed the way the runtime
# computes it (an export error shows here); "release" compares with the reference as released, so a
# difference of the runtime itself (llama.cpp rounds the YaRN range) is included. Of an ONNX artifact
# "export" is with float32 activations and "release" as shipped; "arithmetic" is as "export", but against
# the same weights, so that no rounding of theirs hides an error.
GATES: dict[str, GateKind] = {
    "digests_equal": GateKind("digests_equal", "equal", "every tensor unpacked from the file is the one stored"),
    "head_equal": GateKind("head_equal", "equal", "metadata and tensor tables are, byte for byte, the ones meant"),
    "tokenizer_equal": GateKind("tokenizer_equal", "equal", "the runtime's token ids equal the tokenizer's"),
    "export_kl_mean": GateKind("export.kl_mean", "max", "mean KL against the runtime's own arithmetic, nats"),
    "export_kl_p99": GateKind("export.kl_p99", "max", "99th percentile of that KL, nats"),
    "export_top1": GateKind("export.top1", "min", "share of positions with the same most likely token"),
    "release_kl_mean": GateKind("release.kl_mean", "max", "mean KL against the released arithmetic, nats"),
    "release_kl_p99": GateKind("release.kl_p99", "max", "99th percentile of that KL, nats"),
    "release_top1": GateKind("release.top1", "min", "share of positions with the same most likely token"),
    "arithmetic_kl_mean": GateKind("arithmetic.kl_mean", "max", "mean KL against our forward on the same weights"),
    "cached_kl_mean": GateKind("cached.release.kl_mean", "max", "mean KL of decoding with the cache, nats"),
    "cached_difference": GateKind(
        "cached.logit_difference", "max", "what decoding with the cache changes in a logit of prefill, at most"
    ),
    "long_kl_mean": GateKind("long.release.kl_mean", "max", "mean KL beyond the length trained on, nats"),
    "router_flips": GateKind("router.release.share", "max", "share of tokens and layers with other experts"),
    "genai_kl_mean": GateKind("genai.kl_mean", "max", "mean KL in onnxruntime-genai, nats"),
    "genai_difference": GateKind("genai.difference", "max", "mean difference of that KL from the plain graph's, nats"),
    "genai_tokenizer_equal": GateKind("genai.tokenizer_equal", "equal", "onnxruntime-genai's token ids are equal"),
    "genai_chat_equal": GateKind("genai.chat_equal", "equal", "onnxruntime-genai renders conversations equally"),
    "optimizer_difference": GateKind(
        "optimizer.export.relative_difference", "max", "what ONNX Runtime's rewriting changes, of the largest logit"
    ),
    "optimizer_shipped_difference": GateKind(
        "optimizer.release.relative_difference", "max", "what it changes in the graphs as shipped"
    ),
    "parser_rules_kept": GateKind("rules.kept", "equal", "the graphs keep the rules of TensorRT's parser"),
    "engines_built": GateKind("engines.built", "equal", "TensorRT-RTX builds an engine of each graph for each GPU"),
    "engines_expansion": GateKind(
        "engines.expansion", "max", "share of quantized weights that an engine has in more bits than the file"
    ),
    "engines_fused": GateKind("engines.fused", "equal", "attention of every layer is one fused kernel in each engine"),
    "gpu_kl_mean": GateKind(
        "gpu.kl_mean", "max", "mean KL of the engines on the GPU against our forward on the same weights"
    ),
    "ppl_ratio": GateKind("release.ppl_ratio", "max", "perplexity of the artifact over that of the reference"),
}


@dataclass(frozen=True)
class Verdict:
    """One gate after measuring. `value` None: not measured, which never passes."""

    name: str
    value: float | bool | None
    limit: float | bool
    passed: bool


def read_gates(raw: object, where: str) -> dict[str, float | bool]:
    """Limits by gate name from a TOML table, checked."""
    t = toml.Table(raw, where, GATES)
    limits: dict[str, float | bool] = {}
    for key in t.raw:
        kind = bool if GATES[key].sense == "equal" else (int, float)
        limits[key] = t.get(key, kind)
        if not math.isfinite(limits[key]):
            raise UsageError(f'{where}: "{key}" must be a finite number', hint="see docs/profiles.md")
    return limits
