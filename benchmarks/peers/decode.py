"""Reading back what a tool wrote, into float32 tensors named and laid out as transformers' gpt-oss has them.

Nothing of exporter's is used here: safetensors are unpacked by the formulas below, GGUF by gguf-py.
Bits and groups come from the shapes found, so a folder may mix them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# One expert, as every tool writes them; some say "experts" twice.
EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(?:experts\.)?(\d+)\.(gate|up|down)_proj\.(weight|bias)")
GGUF_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_sinks": "self_attn.sinks",
    "ffn_gate_inp": "mlp.router",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}


class Unreadable(Exception):
    """A folder lacks tensors, or holds some that are not gpt-oss's."""


@dataclass
class Decoded:
    """`tensors` by transformers' names; `facts` is what was found on the way, for the report."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def decode(folder: Path, reference: dict[str, Tensor]) -> Decoded:
    """The weights of a finished folder; `reference` is the release's float32 state dict. Raises Unreadable."""
    files = sorted(folder.rglob("*.gguf"))
    found = _gguf(files) if files else _safetensors(folder)
    _fuse_experts(found, reference)
    for name in sorted(found.tensors.keys() | reference.keys()):
        here, there = found.tensors.get(name), reference.get(name)
        if here is None or there is None or here.shape != there.shape:
            shapes = [None if t is None else tuple(t.shape) for t in (here, there)]
            raise Unreadable(f"{folder}: {name} is {shapes[0]}, should be {shapes[1]}")
    found.facts["tensors_equal_to_release"] = sum(
        bool(torch.equal(tensor, reference[name])) for name, tensor in found.tensors.items()
    )
    found.facts["largest_change_of_others"] = max(
        float((tensor - reference[name]).abs().max())
        for name, tensor in found.tensors.items()
        if not re.search(r"experts\.\w+_proj$|self_attn\.\w_proj\.weight|lm_head|embed_tokens", name)
    )
    return found


# --- safetensors ------------------------------------------------------------------------------------------


def _safetensors(folder: Path) -> Decoded:
    from safetensors.torch import load_file

    configs = sorted(folder.rglob("config.json"))  # some tools make a folder of their own in it
    if len(configs) != 1:
        raise Unreadable(f"{folder} has {len(configs)} config.json")
    folder = configs[0].parent
    stored: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= load_file(path)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    # GPTQ v1, also where nothing is said, stores zeros less one.
    less_one = settings.get("checkpoint_format", "gptq") == "gptq"
    found, bits_seen, negative, scales_seen, packed_bytes, weights = Decoded(), Counter[str](), 0, 0, 0, 0
    for name in [n for n in stored if n.endswith((".qweight", ".weight_packed"))]:
        prefix = name.rpartition(".")[0]
        parts = {
            key: stored.pop(f"{prefix}.{key}")
            for key in ("qweight", "qzeros", "g_idx", "scales", "weight_packed", "weight_scale", "weight_shape")
            if f"{prefix}.{key}" in stored
        }
        value, bits, group = _gptq(parts, less_one) if "qweight" in parts else _pack_quantized(parts)
        found.tensors[f"{prefix}.weight"] = value
        scale = parts["scales"] if "scales" in parts else parts["weight_scale"]
        bits_seen[f"int{bits}-g{group}"] += 1
        negative, scales_seen = negative + int((scale < 0).sum()), scales_seen + scale.numel()
        packed_bytes += sum(t.numel() * t.element_size() for t in parts.values())
        weights += value.numel()
    found.tensors |= {name: tensor.float() for name, tensor in stored.items()}
    found.facts = {
        "matrices": dict(bits_seen),
        "negative_scales": round(negative / max(1, scales_seen), 4),
        "bits_per_quantized_weight": round(8 * packed_bytes / max(1, weights), 3),
    }
    return found


def _unpack(words: Tensor, bits: int, axis: int) -> Tensor:
    """int32 words -> unsigned integers, lowest bits first, `32 // bits` of them in place of each word of `axis`."""
    shifts = torch.arange(0, 32, bits).view([-1 if i == axis + 1 else 1 for i in range(words.dim() + 1)])
    codes: Tensor = (words.unsqueeze(axis + 1) >> shifts) & (2**bits - 1)
    return codes.flatten(axis, axis + 1)


def _gptq(parts: dict[str, Tensor], less_one: bool) -> tuple[Tensor, int, int]:
    """(float32 [N, K], bits, group) of qweight [K / per word, N], qzeros [K / g, N / per word], scales [K / g, N]."""
    scales = parts["scales"].float()
    bits = 32 * parts["qzeros"].shape[1] // scales.shape[1]
    codes = _unpack(parts["qweight"], bits, 0)
    zeros = _unpack(parts["qzeros"], bits, 1) + less_one
    group = len(codes) // len(scales)
    of_group = parts["g_idx"].long() if "g_idx" in parts else torch.arange(len(codes)) // group
    return ((codes - zeros[of_group]) * scales[of_group]).T.contiguous(), bits, group


def _pack_quantized(parts: dict[str, Tensor]) -> tuple[Tensor, int, int]:
    """(float32 [N, K], bits, group) of compressed-tensors' weight_packed [N, K / per word], symmetric."""
    rows, columns = parts["weight_shape"].tolist()
    words, scale = parts["weight_packed"], parts["weight_scale"].float()
    bits, group = 32 * words.shape[1] // columns, columns // scale.shape[1]
    codes = _unpack(words, bits, 1)[:rows, :columns] - 2 ** (bits - 1)
    value: Tensor = codes * scale.repeat_interleave(group, 1)
    return value, bits, group


# --- GGUF -------------------------------------------------------------------------------------------------


def _gguf(files: Iterable[Path]) -> Decoded:
    import gguf

    found, kinds, packed_bytes, weights = Decoded(), Counter[str](), 0, 0
    for path in files:
        for tensor in gguf.GGUFReader(path).tensors:
            shape = [int(n) for n in reversed(tensor.shape)]
            value = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape).copy()).float()
            found.tensors[_from_gguf(tensor.name)] = value
            if tensor.tensor_type.name not in ("F32", "F16", "BF16"):
                kinds[tensor.tensor_type.name] += 1
                packed_bytes, weights = packed_bytes + int(tensor.n_bytes), weights + value.numel()
    found.facts = {"matrices": dict(kinds), "bits_per_quantized_weight": round(8 * packed_bytes / max(1, weights), 3)}
    return found


def _from_gguf(name: str) -> str:
    if name in GGUF_TOP:
        return GGUF_TOP[name]
    _, layer, what, *suffix = name.split(".")
    if what not in GGUF_LAYER:
        raise Unreadable(f"{name} is not a tensor of gpt-oss")
    stem = f"model.layers.{layer}.{GGUF_LAYER[what]}"
    return stem if what == "attn_sinks" else ".".join([stem, *suffix])


# --- experts ----------------------------------------------------------------------------------------------


def _fuse_experts(found: Decoded, reference: dict[str, Tensor]) -> None:
    """Put gate, up and down of single experts, or of all, into transformers' fused tensors [E, in, out].

    What a tool calls gate_proj may be the even rows of gate_up_proj, which is what gate means in
    gpt-oss, or its first half. The reading that is nearer to the release is taken, and told.
    """
    singles: dict[str, dict[int, Tensor]] = {}
    for name in list(found.tensors):
        if match := EXPERT.fullmatch(name):
            stem, expert, part, kind = match.groups()
            singles.setdefault(f"{stem}{part}_proj.{kind}", {})[int(expert)] = found.tensors.pop(name)
    for name, each in singles.items():
        found.tensors[name] = torch.stack([each[i] for i in range(len(each))])
    layouts, worst = set(), 0.0
    for name in [n for n in found.tensors if ".mlp.experts.gate_proj." in n]:
        suffix = "_bias" if name.endswith(".bias") else ""
        fused = re.sub(r"gate_proj\.\w+$", f"gate_up_proj{suffix}", name)
        gate, up = found.tensors.pop(name), found.tensors.pop(name.replace("gate_proj", "up_proj"))
        readings = {"rows in turn": torch.stack((gate, up), 2).flatten(1, 2), "halves": torch.cat((gate, up), 1)}
        want = reference[fused] if suffix else reference[fused].transpose(1, 2)
        error = {how: float((value - want).norm() / want.norm()) for how, value in readings.items()}
        how = min(error, key=error.__getitem__)
        found.tensors[fused] = readings[how] if suffix else readings[how].transpose(1, 2)
        layouts.add(how)
        worst = worst if suffix else max(worst, error[how])
    for name in [n for n in found.tensors if ".mlp.experts.down_proj." in n]:
        tensor = found.tensors.pop(name)
        bias = name.endswith(".bias")
        found.tensors[re.sub(r"\.\w+$", "_bias" if bias else "", name)] = tensor if bias else tensor.transpose(1, 2)
    found.facts["gate_up"] = " and ".join(sorted(layouts))
    found.facts["gate_up_error"] = round(worst, 4)
