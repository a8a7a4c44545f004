"""The configuration of a gpt-oss model, read strictly from any of its three spellings.

HF as released (`rope_theta` + `rope_scaling`), HF as transformers 5 saves it (`rope_parameters`),
and OpenAI's `original/config.json`. Every number is checked against a cap before anything is built
from it: a hostile `num_hidden_layers` of 4e8 hangs transformers' AutoConfig.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporter.errors import BadCheckpoint

SLIDING, FULL = "sliding_attention", "full_attention"

# Far above every gpt-oss, far below what would hang or exhaust a machine.
_CAPS = {
    "num_hidden_layers": 1024,
    "num_local_experts": 4096,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 17,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 4096,
    "vocab_size": 1 << 22,
    "max_position_embeddings": 1 << 26,
    "sliding_window": 1 << 26,
    "num_experts_per_tok": 4096,
    "original_max_position_embeddings": 1 << 26,
}


_YARN_KEYS = ("factor", "beta_fast", "beta_slow", "truncate", "original_max_position_embeddings")
_ROPE_KEYS = frozenset(("rope_type", "type", "rope_theta", *_YARN_KEYS))


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding; `kind` is "yarn" (Peng et al. 2023, arXiv 2309.00071) or "default".

    `truncate` false, as released, keeps the correction range fractional (8.09 to 17.40 for 20b).
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_max_position: int = 4096
    truncate: bool = True


@dataclass(frozen=True)
class Variant:
    """One way to compute the same weights: as released, or with one thing otherwise.

    window: keys that sliding layers see, None for as many as the configuration says. sinks: whether attention has them.
    swapped: the experts' gate and up in each other's place. rounded: what goes between the operations has the precision
    of bfloat16, as the release is computed on GPUs (sums stay in float32).
    """

    rope: RopeConfig
    window: int | None = None
    sinks: bool = True
    swapped: bool = False
    rounded: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """One gpt-oss architecture. Sizes are counts of elements; `layer_types` has one entry a layer."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    vocab_size: int
    max_position_embeddings: int
    sliding_window: int
    layer_types: tuple[str, ...]
    rms_norm_eps: float
    swiglu_limit: float
    swiglu_alpha: float
    hidden_act: str
    tie_word_embeddings: bool
    rope: RopeConfig
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    @staticmethod
    def from_hf(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """From config.json as released or as transformers 5 saves it. Raises BadCheckpoint."""
        read = _Reader(raw, where)
        if raw.get("model_type") != "gpt_oss":
            found = raw.get("model_type") or raw.get("architectures") or "no model_type"
            raise BadCheckpoint(
                f"{where}: not a gpt-oss model ({found})",
                hint="exporter takes checkpoints whose model_type is gpt_oss",
            )
        layers = read.count("num_hidden_layers")
        heads = read.count("num_attention_heads")
        hidden = read.count("hidden_size")
        positions = read.count("max_position_embeddings", 131072)
        config = ModelConfig(
            hidden_size=hidden,
            intermediate_size=read.count("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=read.count("num_key_value_heads", heads),
            head_dim=read.count("head_dim", hidden // heads),
            num_local_experts=read.count("num_local_experts", raw.get("num_experts")),
            num_experts_per_tok=read.count("num_experts_per_tok", raw.get("experts_per_token")),
            vocab_size=read.count("vocab_size"),
            max_position_embeddings=positions,
            sliding_window=read.count("sliding_window"),
            layer_types=read.layer_types(layers),
            rms_norm_eps=read.number("rms_norm_eps", 1e-5),
            swiglu_limit=read.number("swiglu_limit", 7.0),
            swiglu_alpha=read.number("swiglu_alpha", 1.702),
            hidden_act=str(raw.get("hidden_act", "silu")),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            rope=read.rope(),
            bos_token_id=read.token("bos_token_id"),
            eos_token_id=read.token("eos_token_id"),
            pad_token_id=read.token("pad_token_id"),
        )
        return config.checked(where)

    @staticmethod
    def from_original(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """From OpenAI's original/config.json (openai/gpt-oss `torch/model.py`, ModelConfig)."""
        read = _Reader(raw, where)
        layers = read.count("num_hidden_layers")
        context = read.count("initial_context_length", 4096)
        factor = read.number("rope_scaling_factor", 32.0)
        rope = RopeConfig(
            theta=read.number("rope_theta"),
            kind="yarn" if factor > 1 else "default",
            factor=factor,
            beta_fast=read.number("rope_ntk_beta", 32.0),
            beta_slow=read.number("rope_ntk_alpha", 1.0),
            original_max_position=context,
            truncate=False,  # torch/model.py never rounds the range
        )
        config = ModelConfig(
            hidden_size=read.count("hidden_size"),
            intermediate_size=read.count("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=read.count("num_attention_heads"),
            num_key_value_heads=read.count("num_key_value_heads"),
            head_dim=read.count("head_dim"),
            num_local_experts=read.count("num_local_experts", raw.get("num_experts")),
            num_experts_per_tok=read.count("num_experts_per_tok", raw.get("experts_per_token")),
            vocab_size=read.count("vocab_size"),
            max_position_embeddings=int(context * factor),
            sliding_window=read.count("sliding_window"),
            layer_types=_alternating(layers),
            rms_norm_eps=1e-5,
            swiglu_limit=read.number("swiglu_limit", 7.0),
            swiglu_alpha=1.702,
            hidden_act="silu",
            tie_word_embeddings=False,
            rope=rope,
        )
        return config.checked(where)

    def checked(self, where: str) -> ModelConfig:
        """Self, when the numbers agree with one another."""
        wrong = None
        if self.num_attention_heads % self.num_key_value_heads:
            wrong = f"{self.num_attention_heads} heads do not divide into {self.num_key_value_heads} KV heads"
        elif self.head_dim % 2:
            wrong = f"head_dim {self.head_dim} is odd"
        elif self.num_experts_per_tok > self.num_local_experts:
            wrong = f"top-{self.num_experts_per_tok} of {self.num_local_experts} experts"
        if wrong:
            raise BadCheckpoint(f"{where}: {wrong}", hint="copy config.json from the source model")
        return self


def _alternating(layers: int) -> tuple[str, ...]:
    return tuple(FULL if i % 2 else SLIDING for i in range(layers))


class _Reader:
    """Typed, capped access to a JSON object; every complaint names the file and the key."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw, self.where = raw, where

    def fail(self, key: str, problem: str) -> BadCheckpoint:
        return BadCheckpoint(f"{self.where}: {key} {problem}", hint="copy config.json from the source model")

    def count(self, key: str, default: Any = None) -> int:
        value = self.raw.get(key)
        value = default if value is None else value
        if value is None:
            raise self.fail(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.fail(key, f"is {value!r}, not a positive whole number")
        cap = _CAPS.get(key)
        if cap is not None and value > cap:
            raise self.fail(key, f"is {value:,}, above anything plausible ({cap:,})")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, "is missing" if value is None else f"is {value!r}, not a number")
        if not 0 < value < 1e30:
            raise self.fail(key, f"is {value!r}, out of range")
        return float(value)

    def token(self, key: str) -> int | None:
        value = self.raw.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _CAPS["vocab_size"]:
            return value
        return None

    def layer_types(self, layers: int) -> tuple[str, ...]:
        value = self.raw.get("layer_types")
        if value is None:
            return _alternating(layers)
        if not isinstance(value, list) or any(v not in (SLIDING, FULL) for v in value):
            raise self.fail("layer_types", f"has entries other than {SLIDING} and {FULL}")
        if len(value) != layers:
            raise self.fail("layer_types", f"has {len(value)} entries for {layers} layers")
        return tuple(value)

    def rope(self) -> RopeConfig:
        new, old = self.raw.get("rope_parameters"), self.raw.get("rope_scaling")
        if not isinstance(new or {}, dict) or not isinstance(old or {}, dict):
            raise self.fail("rope_scaling", "is not an object")
        self.check_rope_keys({**(old or {}), **(new or {})})
        merged: dict[str, Any] = {**self.raw, **(old or {}), **(new or {})}
        read = _Reader(merged, self.where)
        kind = merged.get("rope_type", merged.get("type", "default"))
        if kind not in ("yarn", "default"):
            raise self.fail("rope_scaling.rope_type", f"is {kind!r}; gpt-oss uses yarn")
        for source in (self.raw, old or {}, new or {}):
            if source.get("rope_theta", merged.get("rope_theta")) != merged.get("rope_theta"):
                raise self.fail("rope_theta", f"is {source['rope_theta']!r} and {merged['rope_theta']!r}")
        theta = read.number("rope_theta")
        if kind == "default":
            return RopeConfig(theta=theta)
        return RopeConfig(
            theta=theta,
            kind="yarn",
            factor=read.number("factor"),
            beta_fast=read.number("beta_fast", 32.0),
            beta_slow=read.number("beta_slow", 1.0),
            original_max_position=read.count(
                "original_max_position_embeddings", self.raw.get("initial_context_length", 4096)
            ),
            truncate=bool(merged.get("truncate", True)),
        )

    def check_rope_keys(self, rope: Mapping[str, Any]) -> None:
        """Refuse what would change the rotation and that no runtime of ours computes."""
        factor = rope.get("factor")
        ours = 0.1 * math.log(factor) + 1 if isinstance(factor, int | float) and factor > 1 else 1.0
        for key, value in rope.items():
            if key in _ROPE_KEYS or value is None:
                continue
            if key == "attention_factor" and isinstance(value, int | float) and abs(value - ours) < 1e-6:
                continue
            if key == "partial_rotary_factor" and value == 1:
                continue
            raise self.fail(f"rope_scaling.{key}", f"is {str(value)[:40]!r}, which gpt-oss does not have")
