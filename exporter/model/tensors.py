"""The tensors of a gpt-oss model in canonical form: one projection of one layer each.

Order: embeddings, then layer by layer, then the final norm and the head. `gate_up_proj` of the
release (rows interleaved: even gate, odd up) is two tensors here.
"""

from __future__ import annotations

import math

from exporter.model.config import ModelConfig
from exporter.types import TensorSpec


def tensor_specs(c: ModelConfig) -> list[TensorSpec]:
    """Every tensor, in the order that all stages use. A tied head is still listed."""
    specs = [TensorSpec("model.embed_tokens.weight", (c.vocab_size, c.hidden_size), "embedding")]
    for i in range(c.num_hidden_layers):
        specs += _layer(c, i)
    specs.append(TensorSpec("model.norm.weight", (c.hidden_size,), "vector"))
    specs.append(TensorSpec("lm_head.weight", (c.vocab_size, c.hidden_size), "head"))
    return specs


def _layer(c: ModelConfig, i: int) -> list[TensorSpec]:
    p = f"model.layers.{i}."
    h, ff, e = c.hidden_size, c.intermediate_size, c.num_local_experts
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    specs = [TensorSpec(p + "input_layernorm.weight", (h,), "vector", i)]
    for name, (n, k) in {"q": (q, h), "k": (kv, h), "v": (kv, h), "o": (h, q)}.items():
        specs.append(TensorSpec(f"{p}self_attn.{name}_proj.weight", (n, k), "linear", i))
        specs.append(TensorSpec(f"{p}self_attn.{name}_proj.bias", (n,), "vector", i))
    specs.append(TensorSpec(p + "self_attn.sinks", (c.num_attention_heads,), "vector", i))
    specs.append(TensorSpec(p + "post_attention_layernorm.weight", (h,), "vector", i))
    specs.append(TensorSpec(p + "mlp.router.weight", (e, h), "router", i))
    specs.append(TensorSpec(p + "mlp.router.bias", (e,), "router", i))
    for name, (n, k) in {"gate": (ff, h), "up": (ff, h), "down": (h, ff)}.items():
        specs.append(TensorSpec(f"{p}mlp.experts.{name}_proj.weight", (e, n, k), "expert", i))
        specs.append(TensorSpec(f"{p}mlp.experts.{name}_proj.bias", (e, n), "vector", i))
    return specs


def parameter_count(c: ModelConfig) -> int:
    """All parameters; 20,914,757,184 for 20b and 116,829,156,672 for 120b."""
    return sum(s.elements for s in tensor_specs(c))


def released_bytes(c: ModelConfig) -> int:
    """Tensor bytes of the release: MXFP4 experts (17 bytes per 32 weights), bf16 everything else.

    Equals `metadata.total_size` of the released index: 13,761,264,768 and 65,248,815,744.
    """
    total = 0
    for s in tensor_specs(c):
        if s.role == "expert":
            total += math.prod(s.shape[:-1]) * -(-s.shape[-1] // 32) * 17
        else:
            total += s.elements * 2
    return total
