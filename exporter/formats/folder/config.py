"""config.json for a folder that transformers reads, and the small files that go with it as they are."""

from __future__ import annotations

import json
from typing import Any

from exporter.formats.base import ExportJob
from exporter.model import ModelConfig

COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def config_json(job: ExportJob, quantization: dict[str, Any], *, released: bool = False) -> bytes:
    """The checkpoint's config.json with this quantization in the place of its own.

    The head is always written, so it is never tied. A checkpoint in OpenAI's own layout has no such file:
    then it is made from what the model is. `released`: in the spelling of the release, with floats in bf16.
    """
    raw = job.file("config.json")
    config: dict[str, Any] = json.loads(raw) if raw is not None else {}
    if config.get("model_type") != "gpt_oss":
        config = _from_model(job.config)
    config |= {"tie_word_embeddings": False}
    config.pop("quantization_config", None)
    if released:
        config = _as_released(config)
    if quantization:
        config["quantization_config"] = quantization
    return (json.dumps(config, indent=2) + "\n").encode()


def _as_released(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers 5 calls `rope_parameters` under its older names.

    transformers 4, which serving stacks pin, passes over the new name and rotates by the released defaults.
    """
    rope = config.pop("rope_parameters", None)
    if isinstance(rope, dict):
        merged = {**(config.get("rope_scaling") or {}), **rope}
        theta = merged.pop("rope_theta", config.get("rope_theta"))
        config |= {"rope_scaling": merged, "rope_theta": theta}
    return config | {key: "bfloat16" for key in ("dtype", "torch_dtype") if key in config}


def _from_model(c: ModelConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": c.rope.kind, "rope_theta": c.rope.theta}
    if c.rope.kind == "yarn":
        rope |= {
            "factor": c.rope.factor,
            "beta_fast": c.rope.beta_fast,
            "beta_slow": c.rope.beta_slow,
            "original_max_position_embeddings": c.rope.original_max_position,
            "truncate": c.rope.truncate,
        }
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "num_local_experts": c.num_local_experts,
        "num_experts_per_tok": c.num_experts_per_tok,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.max_position_embeddings,
        "sliding_window": c.sliding_window,
        "layer_types": list(c.layer_types),
        "rms_norm_eps": c.rms_norm_eps,
        "swiglu_limit": c.swiglu_limit,
        "swiglu_alpha": c.swiglu_alpha,
        "hidden_act": c.hidden_act,
        "rope_parameters": rope,
        "rope_theta": c.rope.theta,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": c.eos_token_id,
        "pad_token_id": c.pad_token_id,
    }
