"""The four ways gpt-oss weights are stored, each mapped onto the canonical tensors.

| layout          | experts are stored as                                       | who writes it                |
|-----------------|-------------------------------------------------------------|------------------------------|
| hf-mxfp4        | `*_blocks` U8 [E, 2I, H/32, 16] and `*_scales` U8           | OpenAI's release             |
| openai-original | the same bytes as `block.N.mlp.mlp1_weight.blocks`; q, k, v fused | OpenAI's `original/`   |
| hf-fused        | floats `gate_up_proj` [E, H, 2I], `down_proj` [E, I, H]     | transformers, TRL, Unsloth   |
| per-expert      | floats `gate_up_projs.E.weight` [2I, H], `down_projs.E.weight` | Unsloth, unfused merges   |

In all four gate and up interleave: even index gate, odd index up (transformers `modeling_gpt_oss.py`,
openai/gpt-oss `torch/weights.py`, llama.cpp `conversion/gpt_oss.py`). A name only says where to look:
what a tensor is follows from its dtype and shape. Floats under `*_blocks` names are read as floats;
transformers 5 writes them when it saves a dequantized model. Every layer is recognised by itself:
some may be MXFP4 and others bf16.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from exporter.checkpoint.headers import shown, shown_list
from exporter.checkpoint.views import Every, Listed, Rows, Transposed, View
from exporter.errors import BadCheckpoint
from exporter.model import ModelConfig, tensor_specs
from exporter.types import Scheme, TensorRef, TensorSpec

Layout = Literal["hf-mxfp4", "openai-original", "hf-fused", "per-expert"]

FLOATS = {"BF16": "bf16", "F16": "f16", "F32": "f32"}
# Recomputed from the configuration by every runtime; old savers wrote it.
_HARMLESS = re.compile(r".*rotary_emb\.inv_freq")
_MISSING_CAP = 10_000
_LAYER = re.compile(r"(?:model\.layers|block)\.(\d+)\.")

_ORIGINAL_TOP = {
    "model.embed_tokens.weight": "embedding.weight",
    "lm_head.weight": "unembedding.weight",
    "model.norm.weight": "norm.scale",
}
_ORIGINAL_LAYER = {
    "input_layernorm.weight": "attn.norm.scale",
    "post_attention_layernorm.weight": "mlp.norm.scale",
    "self_attn.o_proj.weight": "attn.out.weight",
    "self_attn.o_proj.bias": "attn.out.bias",
    "self_attn.sinks": "attn.sinks",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.bias": "mlp.gate.bias",
}


@dataclass(frozen=True)
class Source:
    """Where a canonical tensor lies: its scheme, its data, and its scales when it is MXFP4."""

    scheme: Scheme
    data: View
    scales: View | None = None


@dataclass(frozen=True)
class Mapping:
    """The result: layout, one source for each canonical tensor, remarks, tensors that no one reads."""

    layout: Layout
    sources: dict[str, Source]
    notes: list[str]
    unused: list[str]


def map_layout(refs: dict[str, TensorRef], config: ModelConfig, where: str) -> Mapping:
    """Find every canonical tensor among the stored ones. Raises BadCheckpoint naming what is wrong."""
    _check_layers(refs, config, where)
    original = "embedding.weight" in refs or any(n.startswith("block.") for n in refs)
    search = _Search(refs, config, original)
    sources = {}
    for spec in tensor_specs(config):
        source = search.source(spec)
        if source is not None:
            sources[spec.name] = source
    unused = [n for n in refs if n not in search.used]
    unknown = [n for n in unused if not _HARMLESS.fullmatch(n)]
    _complain(search, unknown, where)
    kinds = sorted(search.kinds)
    notes = list(search.notes)
    if len(kinds) > 1:
        notes.append(f"experts are stored in several ways: {', '.join(kinds)}")
    layout: Layout = "openai-original" if original else "hf-mxfp4"
    for floats in ("per-expert", "hf-fused"):
        if floats in kinds:
            layout = floats
            break
    return Mapping(layout, sources, notes, unused)


def _check_layers(refs: dict[str, TensorRef], config: ModelConfig, where: str) -> None:
    """Compare the number of layers first: it explains a thousand missing tensors in one line."""
    found = {int(m[1]) for n in refs if (m := _LAYER.match(n)) and len(m[1]) < 9}
    layers = max(found, default=-1) + 1
    if found and layers != config.num_hidden_layers:
        raise BadCheckpoint(
            f"{where}: config.json says {config.num_hidden_layers} layers, the weights hold {layers}",
            "take config.json and weights from the same model",
        )


def _complain(search: _Search, unknown: list[str], where: str) -> None:
    parts = []
    if search.missing:
        parts.append(f"tensors missing ({len(search.missing):,}): {shown_list(search.missing)}")
    if search.wrong:
        wrong = list(search.wrong)
        more = f", and {len(wrong) - 2:,} more like these" if len(wrong) > 2 else ""
        parts.append("; ".join(wrong[:2]) + more)
    if unknown and not search.overflow:
        parts.append(f"tensors unknown to gpt-oss ({len(unknown):,}): {shown_list(unknown)}")
    if parts:
        raise BadCheckpoint(f"{where}: {'; '.join(parts)}", _cure(unknown, search))


def _cure(unknown: list[str], search: _Search) -> str:
    if any("lora_" in n or ".base_layer." in n for n in unknown):
        return "LoRA weights are not merged: call merge_and_unload (peft), save the result and give that"
    if any(".absmax" in n or ".quant_state." in n for n in unknown):
        return "quantized with bitsandbytes: dequantize it, save it as bf16 and give that"
    if any(n.endswith((".qweight", ".weight_packed", ".weight_scale", "_scale_inv")) for n in unknown):
        return "already quantized by another tool: give the checkpoint it was made from"
    if search.missing and not unknown and not search.wrong:
        return "the weights are incomplete: download them again, or repeat the merge that wrote them"
    return "take config.json and weights from the same gpt-oss model"


@dataclass
class _Search:
    """One pass over the canonical tensors, collecting what is missing or wrong instead of stopping."""

    refs: dict[str, TensorRef]
    config: ModelConfig
    original: bool
    used: set[str] = field(default_factory=set)
    missing: dict[str, None] = field(default_factory=dict)
    wrong: dict[str, None] = field(default_factory=dict)
    kinds: set[str] = field(default_factory=set)
    notes: dict[str, None] = field(default_factory=dict)

    @property
    def overflow(self) -> bool:
        """So much is missing that the rest is not worth naming: a hostile config asks for millions."""
        return len(self.missing) > _MISSING_CAP

    def source(self, spec: TensorSpec) -> Source | None:
        if self.overflow:
            return None
        if ".mlp.experts." in spec.name:
            return self._expert(spec)
        if self.original and ".self_attn." in spec.name and "_proj" in spec.name and ".o_proj" not in spec.name:
            return self._fused_qkv(spec)
        name = self._stored_name(spec.name)
        if spec.role == "head" and name not in self.refs and self.config.tie_word_embeddings:
            name = self._stored_name("model.embed_tokens.weight")
        return self._rows(name, spec.shape)

    def _stored_name(self, name: str) -> str:
        if self.original:
            if name in _ORIGINAL_TOP:
                return _ORIGINAL_TOP[name]
            _, _, layer, rest = name.split(".", 3)
            return f"block.{layer}.{_ORIGINAL_LAYER[rest]}"
        if ".mlp.router." in name and name not in self.refs:  # Unsloth wraps the router in a module
            wrapped = name.replace(".mlp.router.", ".mlp.router.linear.")
            return wrapped if wrapped in self.refs else name
        return name

    def _take(self, name: str) -> TensorRef | None:
        ref = self.refs.get(name)
        if ref is None:
            self.missing[name] = None
        else:
            self.used.add(name)
        return ref

    def _float(self, ref: TensorRef, shape: tuple[int, ...]) -> Scheme | None:
        """Scheme of a float tensor of exactly this shape; else a complaint."""
        if ref.dtype not in FLOATS:
            self._say_wrong(ref, f"dtype {ref.dtype}, not BF16, F16 or F32")
        elif ref.shape != shape:
            self._say_wrong(ref, f"shape {list(ref.shape)}, config.json implies {list(shape)}")
        else:
            return Scheme.parse(FLOATS[ref.dtype])
        return None

    def _say_wrong(self, ref: TensorRef, what: str) -> None:
        self.wrong[f"{shown(ref.name)} has {what}"] = None

    def _rows(self, name: str, shape: tuple[int, ...]) -> Source | None:
        ref = self._take(name)
        scheme = self._float(ref, shape) if ref else None
        return Source(scheme, Rows(ref)) if ref and scheme else None

    def _fused_qkv(self, spec: TensorSpec) -> Source | None:
        """q, k or v: rows of `attn.qkv`, which stacks them in this order."""
        c = self.config
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        part, kind = spec.name.rsplit(".", 2)[1:]
        ref = self._take(f"block.{spec.layer}.attn.qkv.{kind}")
        scheme = self._float(ref, (q + 2 * kv, *spec.shape[1:])) if ref else None
        first = {"q_proj": 0, "k_proj": q, "v_proj": q + kv}[part]
        return Source(scheme, Rows(ref, first)) if ref and scheme else None

    # Experts. `phase` and `step` pick gate (0 of 2), up (1 of 2) or down (0 of 1).

    def _expert(self, spec: TensorSpec) -> Source | None:
        part, kind = spec.name.rsplit(".", 2)[1:]
        down = part == "down_proj"
        phase, step = (0, 1) if down else (int(part == "up_proj"), 2)
        stem = f"model.layers.{spec.layer}.mlp.experts.{'down_proj' if down else 'gate_up_proj'}"
        if not self.original and f"{stem}s.0.{kind}" in self.refs:
            return self._listed(stem + "s", kind, spec, phase, step)
        if self.original:
            stem = f"block.{spec.layer}.mlp.mlp{2 if down else 1}"
        e, n, *k = spec.shape
        if kind == "bias":
            ref = self._take(stem + "_bias")
            scheme = self._float(ref, (e, n * step)) if ref else None
            return Source(scheme, Every(ref, phase, step)) if ref and scheme else None
        blocks, scales = self._weight_names(stem)
        found = self.refs.get(blocks)
        if found is not None and found.dtype in FLOATS:
            return self._dense(found, spec, phase, step)
        return self._mxfp4(blocks, scales, (e, n * step, *k), phase, step)

    def _weight_names(self, stem: str) -> tuple[str, str]:
        if self.original:
            return f"{stem}_weight.blocks", f"{stem}_weight.scales"
        plain = stem in self.refs and f"{stem}_blocks" not in self.refs
        return (stem if plain else f"{stem}_blocks"), f"{stem}_scales"

    def _mxfp4(self, blocks: str, scales: str, shape: tuple[int, ...], phase: int, step: int) -> Source | None:
        e, n, k = shape
        pair = []
        for name, tail in ((blocks, (k // 32, 16)), (scales, (k // 32,))):
            ref = self._take(name)
            if ref is None:
                continue
            if ref.dtype != "U8":
                self._say_wrong(ref, f"dtype {ref.dtype}; MXFP4 is stored as U8")
            elif k % 32 or ref.shape != (e, n, *tail):
                self._say_wrong(ref, f"shape {list(ref.shape)}, config.json implies {[e, n, *tail]}")
            else:
                pair.append(Every(ref, phase, step))
        if len(pair) < 2:
            return None
        self.kinds.add("openai-original" if self.original else "hf-mxfp4")
        return Source(Scheme.parse("mxfp4"), pair[0], pair[1])

    def _dense(self, ref: TensorRef, spec: TensorSpec, phase: int, step: int) -> Source | None:
        """Fused floats: [E, K, N] as transformers keeps them, or [E, N, K] as MXFP4 decodes."""
        self.used.add(ref.name)
        e, n, k = spec.shape
        if ref.shape not in ((e, k, n * step), (e, n * step, k)):
            self._say_wrong(ref, f"shape {list(ref.shape)}, config.json implies {[e, k, n * step]}")
            return None
        self.kinds.add("hf-fused")
        scheme = Scheme.parse(FLOATS[ref.dtype])
        if self._rows_first(ref, e, k, n * step):
            return Source(scheme, Every(ref, phase, step))
        return Source(scheme, Transposed(ref, phase, step))

    def _rows_first(self, ref: TensorRef, e: int, k: int, n: int) -> bool:
        """Whether a fused float tensor is [E, N, K] and not transformers' [E, K, N].

        A square one says nothing (down_proj of the released sizes): it is as its partner in the
        layer is, which then is not square, or as transformers writes it.
        """
        if k != n:
            return ref.shape == (e, n, k)
        c = self.config
        h, ff = c.hidden_size, c.intermediate_size
        head, down = re.subn(r"\.down_proj(?=_blocks$|$)", ".gate_up_proj", ref.name)
        partner = head if down else ref.name.replace(".gate_up_proj", ".down_proj")
        other = self.refs.get(partner)
        rows, cols = (2 * ff, h) if down else (h, ff)
        if other is None or rows == cols or other.shape != (e, rows, cols):
            return False
        self.notes["square expert tensors are read in the orientation of their partner, [E, out, in]"] = None
        return True

    def _listed(self, stem: str, kind: str, spec: TensorSpec, phase: int, step: int) -> Source | None:
        """One stored tensor for each expert: [2I, H], [H, I], or a bias."""
        e, n, *k = spec.shape
        taken = [self._take(f"{stem}.{i}.{kind}") for i in range(e)]
        refs = tuple(r for r in taken if r is not None)
        schemes = [self._float(r, (n * step, *k)) for r in refs]
        if len(refs) < e or None in schemes:
            return None
        if len({r.dtype for r in refs}) > 1:
            self._say_wrong(refs[0], f"dtype {refs[0].dtype}, other experts of its layer another")
            return None
        self.kinds.add("per-expert")
        assert schemes[0] is not None
        return Source(schemes[0], Listed(refs, phase, step))
