"""The demo checkpoint as other tools would have written it, with none of our code: GGUF by gguf-py, GPTQ by hand.

Each builder gives the float32 values, by canonical name, that the file must be read as.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.variants import DEMO, INDEX, canonical, demo_config

Values = dict[str, np.ndarray]
_GGUF = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.sinks": "attn_sinks.weight",
    "mlp.router": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


@cache
def _demo_values() -> Values:
    return {name: t.contiguous().numpy() for name, t in canonical().items()}


def demo_values() -> Values:
    """float32 of every canonical tensor (a fresh dict; do not change the arrays in place)."""
    return dict(_demo_values())


@cache
def _demo_packed(name: str, kind: str) -> np.ndarray:
    """A tensor of the demo as gguf-py packs it."""
    import gguf

    return gguf.quantize(_demo_values()[name], gguf.GGMLQuantizationType[kind])


def gguf_name(name: str) -> str:
    """llama.cpp's name of a canonical tensor."""
    layer = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
    rest = name.split(".", 3)[3] if layer else name
    found = next(k for k in sorted(_GGUF, key=len, reverse=True) if rest == k or rest.startswith(k + "."))
    return layer + _GGUF[found] + rest.removeprefix(found)


# GGUF


def gguf_demo(
    path: Path,
    kind: Callable[[str], str],
    *,
    values: Values | None = None,
    fused: bool = False,
    keys: dict[str, Any] | None = None,
    architecture: str = "gpt-oss",
    quantize: Callable[[np.ndarray, str], np.ndarray] | None = None,
    edit: Callable[[dict[str, np.ndarray]], Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
) -> Values:
    """A GGUF whose canonical tensor `name` has type `kind(name)`.

    `keys`: what differs, None leaves a key out. `edit` changes the packed tensors, by llama.cpp's names, after the
    values that are given back were read from them.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**_gguf_keys(architecture), **(keys or {})}.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    read: Values = {}
    packed: dict[str, np.ndarray] = {}
    types: dict[str, Any] = {}
    for name, numbers in (values or demo_values()).items():
        qtype = gguf.GGMLQuantizationType[kind(name)]
        if quantize:
            raw = quantize(numbers, qtype.name)
        else:
            raw = gguf.quantize(numbers, qtype) if values else _demo_packed(name, qtype.name)
        packed[gguf_name(name)], types[gguf_name(name)] = raw, qtype
        read[name] = gguf.dequantize(raw, qtype).reshape(numbers.shape)
    if fused:
        for gate in [n for n in packed if "ffn_gate_exps" in n]:
            both = gate.replace("ffn_gate_exps", "ffn_gate_up_exps")
            whole = (packed.pop(gate), packed.pop(gate.replace("gate", "up")))
            packed[both], types[both] = np.concatenate(whole, axis=1), types[gate]
    if edit:
        edit(packed)
    for name, raw in packed.items():
        writer.add_tensor(name, np.ascontiguousarray(raw), raw_dtype=types[name])
    for name, raw in (extra or {}).items():
        writer.add_tensor(name, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


def _gguf_keys(architecture: str) -> dict[str, Any]:
    c = demo_config()
    keys = {
        "block_count": c["num_hidden_layers"],
        "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"],
        "feed_forward_length": c["intermediate_size"],
        "expert_feed_forward_length": c["intermediate_size"],
        "attention.head_count": c["num_attention_heads"],
        "attention.head_count_kv": c["num_key_value_heads"],
        "attention.key_length": c["head_dim"],
        "attention.value_length": c["head_dim"],
        "attention.layer_norm_rms_epsilon": c["rms_norm_eps"],
        "attention.sliding_window": c["sliding_window"],
        "expert_count": c["num_local_experts"],
        "expert_used_count": c["num_experts_per_tok"],
        "rope.freq_base": float(c["rope_theta"]),
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 32.0,
        "rope.scaling.original_context_length": 4096,
    }
    tokens = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(c["vocab_size"])], "tokenizer.ggml.eos_token_id": 2040}
    return {f"{architecture}.{k}": v for k, v in keys.items()} | {"general.quantized_by": "somebody"} | tokens


def released_like(name: str) -> str:
    """Types as llama.cpp's converter chooses them: floats where numbers are few, the released blocks for experts."""
    if ".experts." in name and name.endswith("_proj.weight"):
        return "MXFP4"
    return "F32" if name.endswith((".bias", "norm.weight", ".sinks")) or "router" in name else "BF16"


# GPTQ


def is_layer(name: str) -> bool:
    """Whether GPTQ tools quantize it: attention and experts."""
    return name.endswith("_proj.weight")


def gptq_demo(
    folder: Path,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    act_order: bool = False,
    version: int = 1,
    halves: bool = False,
    g_idx: bool = True,
    config: dict[str, Any] | None = None,
    values: Values | None = None,
    edit: Callable[[dict[str, torch.Tensor]], None] | None = None,
) -> Values:
    """A GPTQ folder with experts one by one; `halves` as GPTQModel cuts gate and up."""
    stored: dict[str, torch.Tensor] = {}
    read: Values = {}
    rng = np.random.default_rng(7)
    source = values or demo_values()
    for name, numbers in source.items():
        if ".experts." not in name:
            if is_layer(name):
                arrays, read[name] = _gptq_layer(numbers, bits, group, symmetric, act_order, version, rng)
                stored |= {f"{name.removesuffix('.weight')}.{k}": v for k, v in arrays.items() if k != "g_idx" or g_idx}
            else:
                stored[name] = torch.from_numpy(numbers.copy()).to(torch.bfloat16)
                read[name] = numbers
            continue
        read[name] = np.empty_like(numbers)
    for name in [n for n in source if ".experts." in n and "up_proj" not in n]:
        _gptq_experts(name, source, stored, read, halves, (bits, group, symmetric, act_order, version, rng), g_idx)
    quantization = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": act_order,
        **({"checkpoint_format": "gptq_v2"} if version == 2 else {}),
        **({"meta": {"quantizer": ["gptqmodel:7.7.0"]}} if halves else {}),
        **(config or {}),
    }
    if edit:
        edit(stored)
    write_folder(folder, stored, quantization)
    return read


def write_folder(folder: Path, stored: dict[str, torch.Tensor], quantization: dict[str, Any] | None) -> None:
    """One safetensors file with the demo's small files beside it."""
    folder.mkdir(parents=True)
    for f in DEMO.iterdir():
        if f.suffix in (".json", ".jinja") and f.name not in ("config.json", INDEX):
            shutil.copy(f, folder / f.name)
    config = demo_config()
    del config["quantization_config"]
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    save_file({n: t.contiguous() for n, t in stored.items()}, folder / "model.safetensors", {"format": "pt"})


def _gptq_experts(name, source, stored, read, halves, how, g_idx) -> None:
    """gate and up together, down alone."""
    before, after = name.split(".experts.")
    part, kind = after.split(".")
    other = name.replace("gate_proj", "up_proj")
    for e in range(len(source[name])):
        if part == "down_proj":
            parts = {"down_proj": source[name][e]}
        else:
            gate, up = source[name][e], source[other][e]
            parts = {"gate_proj": gate, "up_proj": up}
            if halves:
                turns = np.stack((gate, up), axis=1).reshape(2 * len(gate), *gate.shape[1:])
                parts = {"gate_proj": turns[: len(gate)], "up_proj": turns[len(gate) :]}
        back = {}
        for p, numbers in parts.items():
            stem = f"{before}.experts.{e}.{p}"
            if kind == "bias":
                stored[f"{stem}.bias"] = torch.from_numpy(numbers.copy()).to(torch.bfloat16)
                back[p] = numbers
                continue
            arrays, back[p] = _gptq_layer(numbers, *how)
            stored.update({f"{stem}.{k}": v for k, v in arrays.items() if k != "g_idx" or g_idx})
        if part == "down_proj":
            read[name][e] = back["down_proj"]
        elif halves:
            turns = np.concatenate((back["gate_proj"], back["up_proj"]))
            read[name][e], read[other][e] = turns[0::2], turns[1::2]
        else:
            read[name][e], read[other][e] = back["gate_proj"], back["up_proj"]


def _gptq_layer(weight, bits, group, symmetric, act_order, version, rng):
    """Arrays of one layer [N, K] as AutoGPTQ packs them, and what they say."""
    n, k = weight.shape
    order = rng.permutation(k) if act_order else np.arange(k)
    of = np.empty(k, np.int32)
    of[order] = np.arange(k) // group  # input order[i] is the i-th that is quantized
    groups, top = -(-k // group), (1 << bits) - 1
    codes, scales = np.empty((n, k), np.int64), np.empty((n, groups), np.float16)
    zeros = np.full((n, groups), 1 << (bits - 1), np.int64)
    for g in range(groups):
        part = weight[:, of == g]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            scales[:, g] = np.abs(part).max(1) / (top // 2) + 1e-6
        else:
            scales[:, g] = (high - low) / top + 1e-6
            # v1 stores zero - 1, so it has no zero of 0.
            zeros[:, g] = np.clip(np.rint(-low / scales[:, g].astype(np.float32)), 2 - version, top)
        wide = scales[:, g].astype(np.float32)
        codes[:, of == g] = np.clip(np.rint(part / wide[:, None]) + zeros[:, g : g + 1], 0, top)
    back = scales.astype(np.float32)[:, of] * (codes - zeros[:, of]).astype(np.float32)
    arrays = {
        "qweight": _pack(codes.T, bits),  # [K / per, N]
        "qzeros": _pack(zeros - (version == 1), bits).T,  # [N / per, G] -> [G, N / per]
        "scales": torch.from_numpy(scales.T.copy()),
        "g_idx": torch.from_numpy(of),
    }
    return arrays, back.astype(np.float32)


def _pack(codes: np.ndarray, bits: int) -> torch.Tensor:
    """[rows, columns] -> int32 [rows / per, columns], low bits first."""
    per = 32 // bits
    words = np.zeros((len(codes) // per, codes.shape[1]), np.uint32)
    for j in range(per):
        words |= codes[j::per].astype(np.uint32) << np.uint32(bits * j)
    return torch.from_numpy(words.view(np.int32))
