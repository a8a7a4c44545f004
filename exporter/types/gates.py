"""Gates: the measured values that decide whether an artifact is good, and in which direction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from exporter.errors import UsageError
from exporter.types import toml


@dataclass(frozen=True)
class GateKind:
    """`metric` is a dotted path into an artifact's report; `sense` says on which side the limit lies.

    floor: of an artifact as it is served, so a limit below the noise of that (`report["floor"]`) promises nothing.
    """

    metric: str
    sense: Literal["max", "min", "equal"]
    meaning: str
    floor: bool = False


# What an artifact may lose: nothing is rounded; nothing but 16-bit numbers to 8 bits; anything else.
LossClass = Literal["exact", "near", "lossy"]
CLASSES: tuple[LossClass, ...] = ("exact", "near", "lossy")


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
    "release_kl_mean": GateKind("release.kl_mean", "max", "mean KL against the released arithmetic, nats", True),
    "release_kl_p99": GateKind("release.kl_p99", "max", "99th percentile of that KL, nats"),
    "release_kl_p999": GateKind("release.kl_p999", "max", "99.9th percentile of that KL, nats"),
    "release_top1": GateKind("release.top1", "min", "share of positions with the same most likely token"),
    "release_flips": GateKind("release.flips", "max", "share of tokens that only one of the two gets right"),
    "conversations_kl_mean": GateKind(
        "accuracy.conversations.all.kl_mean", "max", "mean KL on what the assistant says in conversations, nats", True
    ),
    "conversations_top1": GateKind(
        "accuracy.conversations.all.top1", "min", "share of the assistant's tokens with the same most likely token"
    ),
    "depth_kl_mean": GateKind(
        "accuracy.long.as_runtime.kl_mean",
        "max",
        "mean KL on a text beyond the length trained on, against the runtime's own arithmetic, nats",
        True,
    ),
    "behaves_as_released": GateKind(
        "twins.passed", "equal", "nearer to the release than to the same weights computed with any known mistake"
    ),
    "nearest_is_released": GateKind(
        "twins.nearest_is_released", "equal", "nearer to the release than to any known mistake, by the count alone"
    ),
    "greedy_agreement": GateKind(
        "generation.agreement", "min", "share of the likeliest text before it first differs from the reference's"
    ),
    "length_difference": GateKind(
        "generation.length_difference", "max", "how far the mean length of answers is from the reference's, of 1"
    ),
    "memory_limit_held": GateKind(
        "memory.limit_held", "equal", "the runtime took no more of the device than the profile leaves to it"
    ),
    "controls_caught": GateKind("controls_caught", "equal", "every copy with a known mistake fails a gate"),
    "config_equal": GateKind("config_equal", "equal", "what the file says of the model is what the checkpoint says"),
    "chat_equal": GateKind(
        "chat.equal", "equal", "conversations are rendered, and answers end, as the checkpoint has it"
    ),
    "weights_sound": GateKind(
        "weights.sound", "equal", "every tensor has the checkpoint's numbers, as far as its type can"
    ),
    "arithmetic_kl_mean": GateKind("arithmetic.kl_mean", "max", "mean KL against our forward on the same weights"),
    "cached_kl_mean": GateKind("cached.release.kl_mean", "max", "mean KL of decoding with the cache, nats"),
    "cached_difference": GateKind(
        "cached.logit_difference",
        "max",
        "what decoding with the cache changes in a logit of prefill, at most",
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
        "optimizer.release.relative_difference",
        "max",
        "what it changes in the graphs as shipped, of tokens with the same experts",
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
    """One gate after measuring. `value` None: not measured, which never passes. note: why else it did not pass."""

    name: str
    value: float | bool | None
    limit: float | bool
    passed: bool
    note: str = ""


@dataclass(frozen=True)
class Limits:
    """Limits by gate name: for every artifact, and for those of each class beside them."""

    every: Mapping[str, float | bool]
    classes: Mapping[LossClass, Mapping[str, float | bool]]

    def of(self, loss: LossClass) -> dict[str, float | bool]:
        """All that hold for an artifact of a class; where both name a gate, the class's."""
        return {**self.every, **self.classes.get(loss, {})}


def read_limits(raw: object, where: str) -> Limits:
    """[gates], and in it [gates.exact], [gates.near], [gates.lossy]."""
    table = dict(raw) if isinstance(raw, Mapping) else raw
    classes = {name: table.pop(name) for name in CLASSES if name in table} if isinstance(table, dict) else {}
    return Limits(
        read_gates(table, where), {name: read_gates(each, f"{where[:-1]}.{name}]") for name, each in classes.items()}
    )


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
