"""The demo checkpoint in every layout found in the field, and damaged in every way we refuse.

Written with safetensors and torch, none of our code: what a test decodes through `exporter` is
compared with the tensors that made the file.

    folder = fused_bf16(tmp_path / "fused")       each builder returns the folder it wrote
    damage(single_file(tmp_path / "bad"), "truncated shard")
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.damages import DAMAGES, INDEX, damage, edit_json

DEMO = Path(__file__).parent / "data" / "tiny-gpt-oss"
# The damages belong to the same workbench: `from tests.variants import damage` is how tests ask for them.
__all__ = ["DAMAGES", "DEMO", "INDEX", "VARIANTS", "damage", "edit_json"]
LEVELS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
Tensors = dict[str, torch.Tensor]


# The demo, its configuration, its experts as numbers


@cache
def _demo() -> Tensors:
    out: Tensors = {}
    for shard in sorted(DEMO.glob("*.safetensors")):
        out.update(load_file(shard))
    return out


def demo_tensors() -> Tensors:
    """Stored tensors of the demo by stored name (a fresh dict; do not change the tensors in place)."""
    return dict(_demo())


def demo_config() -> dict[str, Any]:
    return json.loads((DEMO / "config.json").read_text())


def decode(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """MXFP4 [E, N, G, 16] and [E, N, G] -> float32 [E, N, 32 G], in plain steps."""
    low, high = LEVELS[(blocks & 15).long()], LEVELS[(blocks >> 4).long()]
    pairs = torch.stack([low, high], dim=-1).flatten(-2)  # [E, N, G, 32]
    return (pairs * torch.exp2(scales.float() - 127)[..., None]).flatten(-2)


def expert_floats(tensors: Tensors) -> Tensors:
    """`gate_up_proj` and `down_proj` of every layer, float32 [E, out, in], gate and up interleaved."""
    out = {}
    for name in tensors:
        if name.endswith("_blocks"):
            stem = name.removesuffix("_blocks")
            out[stem] = decode(tensors[name], tensors[stem + "_scales"])
    return out


def canonical(tensors: Tensors | None = None) -> Tensors:
    """float32 tensors by canonical name: what every variant of the demo must decode to."""
    stored = demo_tensors() if tensors is None else tensors
    out = {}
    both = {n: t.float() for n, t in stored.items() if not n.endswith(("_blocks", "_scales"))}
    both.update(expert_floats(stored))
    for name, t in both.items():
        if ".mlp.experts." not in name:
            out[name] = t
            continue
        stem, part = name.rsplit(".", 1)
        kind = "bias" if part.endswith("_bias") else "weight"
        if part.startswith("gate_up"):
            out[f"{stem}.gate_proj.{kind}"], out[f"{stem}.up_proj.{kind}"] = t[:, 0::2], t[:, 1::2]
        else:
            out[f"{stem}.down_proj.{kind}"] = t
    return out


# Writing


def _write(
    out: Path, tensors: Tensors, config: dict[str, Any], shards: int = 1, names: list[str] | None = None
) -> Path:
    """A folder with the demo's small files, `config`, and `tensors` in `shards` files with an index."""
    out.mkdir(parents=True)
    for f in DEMO.iterdir():
        if f.suffix in (".json", ".jinja") and f.name not in ("config.json", INDEX):
            shutil.copy(f, out / f.name)
    (out / "config.json").write_text(json.dumps(config, indent=1))
    if shards == 1:
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        return out
    names = names or [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {}
    ordered = sorted(tensors)
    for i, file in enumerate(names):
        part = ordered[i * len(ordered) // shards : (i + 1) * len(ordered) // shards]
        save_file({n: tensors[n] for n in part}, out / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / INDEX).write_text(json.dumps(index, indent=1))
    return out


def copy(out: Path) -> Path:
    """The demo as it is: two shards and an index."""
    shutil.copytree(DEMO, out)
    return out


def single_file(out: Path) -> Path:
    return _write(out, demo_tensors(), demo_config())


def no_index(out: Path) -> Path:
    """Three shards, no index, as some merges leave them."""
    _write(out, demo_tensors(), demo_config(), 3)
    (out / INDEX).unlink()
    return out


def off_by_one_shards(out: Path) -> Path:
    """Three files called 00000 to 00002 "of 00002", as OpenAI released them."""
    names = [f"model-{i:05d}-of-00002.safetensors" for i in range(3)]
    return _write(out, demo_tensors(), demo_config(), 3, names)


def original_layout(out: Path, shards: int = 1) -> Path:
    """OpenAI's own names and configuration in `out/original/`, tokenizer files in `out`. Returns `out`."""
    t, c = demo_tensors(), demo_config()
    new = {
        "embedding.weight": t["model.embed_tokens.weight"],
        "unembedding.weight": t["lm_head.weight"],
        "norm.scale": t["model.norm.weight"],
    }
    for i in range(c["num_hidden_layers"]):
        old, b = f"model.layers.{i}.", f"block.{i}."
        for kind in ("weight", "bias"):
            qkv = [t[f"{old}self_attn.{x}_proj.{kind}"] for x in "qkv"]
            new[f"{b}attn.qkv.{kind}"] = torch.cat(qkv)
            new[f"{b}attn.out.{kind}"] = t[f"{old}self_attn.o_proj.{kind}"]
            new[f"{b}mlp.gate.{kind}"] = t[f"{old}mlp.router.{kind}"]
        new[f"{b}attn.sinks"] = t[old + "self_attn.sinks"]
        new[f"{b}attn.norm.scale"] = t[old + "input_layernorm.weight"]
        new[f"{b}mlp.norm.scale"] = t[old + "post_attention_layernorm.weight"]
        for n, part in ((1, "gate_up_proj"), (2, "down_proj")):
            new[f"{b}mlp.mlp{n}_weight.blocks"] = t[f"{old}mlp.experts.{part}_blocks"]
            new[f"{b}mlp.mlp{n}_weight.scales"] = t[f"{old}mlp.experts.{part}_scales"]
            new[f"{b}mlp.mlp{n}_bias"] = t[f"{old}mlp.experts.{part}_bias"]
    same = ("num_hidden_layers", "experts_per_token", "vocab_size", "hidden_size", "intermediate_size")
    same += ("swiglu_limit", "head_dim", "num_attention_heads", "num_key_value_heads", "sliding_window")
    config = {k: c[k] for k in (*same, "initial_context_length", "rope_theta")}
    config |= {"num_experts": c["num_local_experts"], "rope_scaling_factor": 32.0}
    config |= {"rope_ntk_alpha": 1.0, "rope_ntk_beta": 32.0}
    names = [f"model--{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    inner = _write(out / "original", new, config, shards, names)
    for f in list(inner.iterdir()):
        if f.suffix in (".json", ".jinja") and f.name not in ("config.json", INDEX):
            f.rename(out / f.name)
    return out


def _unquantized(rope: str) -> dict[str, Any]:
    c = demo_config()
    del c["quantization_config"]
    if rope == "parameters":  # as transformers 5 saves it
        c["rope_parameters"] = {**c.pop("rope_scaling"), "rope_theta": c.pop("rope_theta")}
        c["swiglu_alpha"] = 1.702
    c["dtype"] = "bfloat16"
    return c


def _without_blocks(tensors: Tensors) -> Tensors:
    return {n: t for n, t in tensors.items() if not n.endswith(("_blocks", "_scales"))}


def fused_bf16(
    out: Path,
    dtype: torch.dtype = torch.bfloat16,
    suffix: str = "",
    orientation: str = "in_out",
    rope: str = "parameters",
    noise: float = 0.0,
) -> Path:
    """Experts as floats in one tensor a projection: [E, in, out] as transformers writes them.

    `dtype` applies to every tensor. `suffix` "_blocks" gives the misleading names; `orientation`
    "out_in" keeps the rows of the MXFP4 form; `noise` moves weights off the MXFP4 grid (relative).
    """
    tensors = {n: t.to(dtype) for n, t in _without_blocks(demo_tensors()).items()}
    generator = torch.Generator().manual_seed(1)
    for name, t in expert_floats(demo_tensors()).items():
        if noise:
            t = t * (1 + noise * torch.randn(t.shape, generator=generator))
        tensors[name + suffix] = (t if orientation == "out_in" else t.transpose(1, 2)).contiguous().to(dtype)
    return _write(out, tensors, _unquantized(rope), 2)


def fused_f16(out: Path) -> Path:
    return fused_bf16(out, dtype=torch.float16, rope="scaling")


def fused_f32(out: Path) -> Path:
    return fused_bf16(out, dtype=torch.float32)


def fused_as_blocks(out: Path) -> Path:
    """Floats [E, in, out] saved under the names of MXFP4 blocks."""
    return fused_bf16(out, suffix="_blocks", rope="scaling")


def fused_rows_first(out: Path) -> Path:
    """Floats [E, out, in] saved under the names of MXFP4 blocks."""
    return fused_bf16(out, suffix="_blocks", orientation="out_in")


def off_grid_bf16(out: Path) -> Path:
    """bf16 weights that no longer lie on the MXFP4 grid, as after a fine-tune."""
    return fused_bf16(out, noise=0.02)


def per_expert(out: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """One linear module for each expert, as Unsloth writes them."""
    tensors = {}
    for name, t in _without_blocks(demo_tensors()).items():
        if name.endswith(("gate_up_proj_bias", "down_proj_bias")):
            for e, row in enumerate(t):
                tensors[f"{name.removesuffix('_bias')}s.{e}.bias"] = row.clone().to(dtype)
        else:
            tensors[name.replace(".mlp.router.", ".mlp.router.linear.")] = t.to(dtype)
    for name, t in expert_floats(demo_tensors()).items():
        for e, matrix in enumerate(t):
            tensors[f"{name}s.{e}.weight"] = matrix.to(dtype).contiguous()
    return _write(out, tensors, _unquantized("scaling"), 2)


def mixed_layers(out: Path) -> Path:
    """MXFP4 experts, but those of layer 1 are bf16, as after an edit of one layer."""
    tensors = demo_tensors()
    for name, t in expert_floats(demo_tensors()).items():
        if ".layers.1." in name:
            del tensors[name + "_blocks"], tensors[name + "_scales"]
            tensors[name] = t.transpose(1, 2).contiguous().to(torch.bfloat16)
    return _write(out, tensors, demo_config(), 2)


def tied_head(out: Path) -> Path:
    """No lm_head: `tie_word_embeddings`."""
    tensors = demo_tensors()
    del tensors["lm_head.weight"]
    return _write(out, tensors, {**demo_config(), "tie_word_embeddings": True})


def edited(out: Path, edit: Callable[[Tensors], None], **config: Any) -> Path:
    """The demo in one file after `edit(tensors)`; keyword arguments change config.json."""
    tensors = demo_tensors()
    edit(tensors)
    return _write(out, tensors, {**demo_config(), **config})


# Name -> (builder, the layout it must be recognised as). Every one decodes to `canonical()`, exactly
# unless it is off_grid.
VARIANTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "demo": (copy, "hf-mxfp4"),
    "single_file": (single_file, "hf-mxfp4"),
    "no_index": (no_index, "hf-mxfp4"),
    "off_by_one_shards": (off_by_one_shards, "hf-mxfp4"),
    "original_layout": (original_layout, "openai-original"),
    "original_sharded": (lambda out: original_layout(out, 7), "openai-original"),
    "fused_bf16": (fused_bf16, "hf-fused"),
    "fused_f16": (fused_f16, "hf-fused"),
    "fused_f32": (fused_f32, "hf-fused"),
    "fused_as_blocks": (fused_as_blocks, "hf-fused"),
    "fused_rows_first": (fused_rows_first, "hf-fused"),
    "per_expert": (per_expert, "per-expert"),
    "per_expert_f16": (lambda out: per_expert(out, torch.float16), "per-expert"),
    "mixed_layers": (mixed_layers, "hf-fused"),
    "tied_head": (tied_head, "hf-mxfp4"),
}
