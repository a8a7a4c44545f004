"""The demo checkpoint in float32, as numpy arrays and as a GGUF that gguf-py wrote: an oracle of its own.

Nothing here goes through exporter's checkpoint reader or its GGUF writer.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.model import ModelConfig
from exporter.model.reference import ReferenceLogits
from exporter.numerics import e2m1
from exporter.validate import text
from exporter.validate.llama_worker import Request

gguf = pytest.importorskip("gguf")
safetensors = pytest.importorskip("safetensors.torch")

DEMO = Path(__file__).parents[1] / "data" / "tiny-gpt-oss"
TOKENIZER = DEMO / "tokenizer.json"
CONFIG = ModelConfig.from_hf(json.loads((DEMO / "config.json").read_text()))


def demo_tensors() -> dict[str, Any]:
    """Every tensor of the demo checkpoint in float32, by canonical name."""
    stored: dict[str, Any] = {}
    for shard in sorted(DEMO.glob("*.safetensors")):
        for name, value in safetensors.load_file(shard).items():
            stored[name] = value.numpy() if "blocks" in name or "scales" in name else value.float().numpy()
    out: dict[str, Any] = {}
    for name, value in stored.items():
        if "experts" not in name:
            out[name] = value
        elif name.endswith("_blocks"):
            stem = name.removesuffix("_blocks")
            data = value.reshape(*value.shape[:-2], -1)  # [E, N, K/32, 16] -> [E, N, K/2]
            split(out, stem, ".weight", e2m1.dequantize(data, stored[stem + "_scales"]))
        elif name.endswith("_bias"):
            split(out, name.removesuffix("_bias"), ".bias", value)
    return out


def split(out: dict[str, Any], stem: str, suffix: str, value: Any) -> None:
    if stem.endswith("gate_up_proj"):
        stem = stem.removesuffix("gate_up_proj")
        out[f"{stem}gate_proj{suffix}"], out[f"{stem}up_proj{suffix}"] = value[:, 0::2], value[:, 1::2]
    else:
        out[stem + suffix] = value


@dataclasses.dataclass(frozen=True)
class Twin:
    """The float32 GGUF, the tensors in it, and what the reference says about the same text."""

    path: Path
    tensors: dict[str, Any]
    sample: text.Text
    tokens: Any
    release: ReferenceLogits
    runtime: ReferenceLogits

    def read(self, name: str, start: int, stop: int) -> Any:
        return self.tensors[name][start:stop]

    def request(self, folder: Path, model: Path) -> Request:
        return Request(str(model), {}, str(folder / "results.npz"), [], threads=1)


GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
GGUF_PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.router": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}


def gguf_name(name: str) -> str:
    if name in GGUF_NAMES:
        return GGUF_NAMES[name]
    number, part = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name).groups()  # type: ignore[union-attr]
    if part == "self_attn.sinks":
        return f"blk.{number}.attn_sinks.weight"
    stem, suffix = part.rsplit(".", 1)
    return f"blk.{number}.{GGUF_PARTS[stem]}.{suffix}"


def write_gguf(path: Path, tensors: dict[str, Any]) -> None:
    c = CONFIG
    writer = gguf.GGUFWriter(path, "gpt-oss")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_expert_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_sliding_window(c.sliding_window)
    writer.add_expert_count(c.num_local_experts)
    writer.add_expert_used_count(c.num_experts_per_tok)
    writer.add_rope_freq_base(c.rope.theta)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(c.rope.factor)
    writer.add_rope_scaling_orig_ctx_len(c.rope.original_max_position)
    tokenizer = json.loads(TOKENIZER.read_text())
    tokens = [f"[PAD{i}]" for i in range(c.vocab_size)]
    types = [gguf.TokenType.UNUSED] * c.vocab_size
    for token, i in tokenizer["model"]["vocab"].items():
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
    for token in tokenizer["added_tokens"]:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-4o")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    for name, value in tensors.items():
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
