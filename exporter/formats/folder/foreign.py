"""A quantized folder of gpt-oss that anyone may have made: where in it each canonical tensor is.

Experts come one by one, as linear layers: `experts.E.gate_proj`, `up_proj` and `down_proj` (GPTQModel, auto-round,
llm-compressor), or gate and up rows in turns as `gate_up_projs.E` (Unsloth). Where only other layers were quantized
they are floats of three axes or the released blocks. Readers differ on what `gate_proj` and `up_proj` hold:
GPTQModel's files have the halves of the interleaved matrix under those names, see formats/gptq.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from exporter.formats.folder.foreign_arrays import FLOATS, Fetch, floats, lines
from exporter.formats.folder.foreign_layers import (
    GptqLayer,
    Layer,
    Settings,
    Unreadable,
    expect_float,
    find_layer,
)
from exporter.model import ModelConfig, tensor_specs
from exporter.numerics import e2m1
from exporter.numerics.floats import F32
from exporter.types import TensorRef, TensorSpec

Refs = Mapping[str, TensorRef]
HALVES = "halves of the interleaved matrix"
# Beside a layer, and without a part in its numbers: its shape, and what is for activations or the cache.
_BESIDE = re.compile(r".*(\.weight_shape|\.input_scale|\.input_global_scale|_proj\.[kv]_scale|rotary_emb\.inv_freq)")
_QUANTIZED = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".absmax")


@dataclass(frozen=True)
class Turns:
    """Every second row of a layer [2N, K]: even rows gate, odd rows up."""

    layer: Layer
    phase: int

    @property
    def label(self) -> str:
        return self.layer.label

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        return self.layer.refs

    def rows(self, fetch: Fetch, start: int, stop: int) -> F32:
        return self.layer.rows(fetch, 2 * start, 2 * stop)[self.phase :: 2]


@dataclass(frozen=True)
class Halved:
    """Gate or up rows [N, K] of two layers [N, K] that are the halves of one matrix whose rows take turns."""

    first: Layer
    second: Layer
    phase: int

    @property
    def label(self) -> str:
        return self.first.label

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        return self.first.refs + self.second.refs

    def rows(self, fetch: Fetch, start: int, stop: int) -> F32:
        """Row i is row 2i + phase of the matrix; each half has N of its 2N rows, N even."""
        n = self.first.refs[0].shape[-1] if isinstance(self.first, GptqLayer) else self.first.refs[0].shape[0]
        at = n // 2
        parts = []
        if start < at:
            parts.append(self.first.rows(fetch, 2 * start, 2 * min(stop, at))[self.phase :: 2])
        if stop > at:
            parts.append(self.second.rows(fetch, 2 * max(start, at) - n, 2 * stop - n)[self.phase :: 2])
        return np.concatenate(parts)


@dataclass(frozen=True)
class Source:
    """A canonical tensor: one layer, or one for each expert, all of the same kind."""

    layers: tuple[Layer, ...]
    expert: bool = False

    def read(self, fetch: Fetch, shape: tuple[int, ...], start: int, stop: int) -> F32:
        if not self.expert:
            return self.layers[0].rows(fetch, start, stop)
        return np.stack([layer.rows(fetch, 0, shape[1]) for layer in self.layers[start:stop]])

    def label(self, fetch: Fetch) -> str:
        layer = self.layers[0]
        inner = layer.first if isinstance(layer, Halved) else layer.layer if isinstance(layer, Turns) else layer
        ordered = isinstance(inner, GptqLayer) and inner.ordered(fetch)
        labels = sorted({each.label for each in self.layers})
        return " and ".join(labels[:3]) + (" act-order" if ordered else "")


@dataclass(frozen=True)
class Stacked:
    """Experts in one tensor of three axes: floats [E, K, N] or [E, N, K], or blocks [E, N, K/32, 16] and scales."""

    data: TensorRef
    scales: TensorRef | None
    rows_first: bool
    phase: int
    step: int

    def read(self, fetch: Fetch, shape: tuple[int, ...], start: int, stop: int) -> F32:
        out = []
        for i in range(start, stop):
            raw = lines(fetch, self.data, i, i + 1)[0]
            if self.scales is not None:
                scales = lines(fetch, self.scales, i, i + 1)[0][self.phase :: self.step]
                kept = np.ascontiguousarray(raw[self.phase :: self.step]).reshape(len(scales), -1)
                out.append(e2m1.dequantize(kept, np.ascontiguousarray(scales)))
                continue
            matrix = raw if self.rows_first else raw.T
            out.append(floats(np.ascontiguousarray(matrix[self.phase :: self.step]), self.data.dtype))
        return np.stack(out)

    def label(self, fetch: Fetch) -> str:
        return "MXFP4" if self.scales is not None else self.data.dtype


def is_quantized(refs: Refs) -> bool:
    """Whether a folder needs this file: layers that were quantized, or experts one by one under their own names."""
    return any(name.endswith(_QUANTIZED) or ".experts.0.gate_proj." in name for name in refs)


@dataclass
class FolderModel:
    """Where everything is. `problems`: what is not understood; then nothing must be read."""

    config: ModelConfig
    sources: dict[str, Source | Stacked] = field(default_factory=dict)
    nbytes: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._shapes = {s.name: s.shape for s in tensor_specs(self.config)}

    def read(self, fetch: Fetch, name: str, start: int, stop: int) -> F32:
        """float32 leading indices [start, stop) of a canonical tensor, as stored."""
        shape = self._shapes[name]
        if not 0 <= start < stop <= shape[0]:
            raise ValueError(f"[{start}, {stop}) of {name}, whose leading axis is {shape[0]}")
        found = self.sources[name].read(fetch, shape, start, stop)
        return np.ascontiguousarray(found, np.float32).reshape(stop - start, *shape[1:])


def map_folder(refs: Refs, config: ModelConfig, settings: Settings, *, halves: bool) -> FolderModel:
    """Find every canonical tensor. halves: whether gate_proj and up_proj hold halves of the interleaved matrix."""
    model, search = FolderModel(config), _Search(refs, config, settings, halves)
    missing: list[str] = []
    for spec in tensor_specs(config):
        try:
            found = search.find(spec)
        except Unreadable as error:
            model.problems.append(str(error))
            continue
        if found is None:
            missing.append(spec.name)
            if len(missing) > len(refs) + 3:  # a hostile number of layers asks for millions
                break
            continue
        model.sources[spec.name] = found
        stored = found.layers if isinstance(found, Source) else ()
        used = {r.name: r for layer in stored for r in layer.refs}
        if isinstance(found, Stacked):
            used = {r.name: r for r in (found.data, found.scales) if r is not None}
        # Two tensors share what holds both.
        shared = 2 if any(isinstance(s, Halved | Turns) for s in stored) or getattr(found, "step", 1) == 2 else 1
        model.nbytes[spec.name] = sum(r.nbytes for r in used.values()) // shared
        search.used |= used.keys()
    if missing:
        model.problems.insert(0, f"tensors are missing: {_some(missing)}")
    unknown = sorted(n for n in refs if n not in search.used and not _BESIDE.fullmatch(n))
    if unknown and len(missing) <= len(refs):
        model.problems.append(f"tensors that are not understood: {_some(unknown)}")
    return model


def _some(names: list[str]) -> str:
    shown = ["".join(c if c.isprintable() else "?" for c in name[:96]) for name in names[:3]]
    return ", ".join(shown) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


@dataclass
class _Search:
    refs: Refs
    config: ModelConfig
    settings: Settings
    halves: bool
    used: set[str] = field(default_factory=set)

    def find(self, spec: TensorSpec) -> Source | Stacked | None:
        """Where a canonical tensor is, None where it is not. Raises Unreadable."""
        if ".mlp.experts." in spec.name:
            return self.experts(spec)
        for name in self.names(spec):
            layer = self.layer(name, spec.shape)
            if layer is not None:
                return Source((layer,))
        return None

    def names(self, spec: TensorSpec) -> Iterator[str]:
        yield spec.name
        if ".mlp.router." in spec.name:  # Unsloth wraps the router in a module
            yield spec.name.replace(".mlp.router.", ".mlp.router.linear.")
        if spec.role == "head" and self.config.tie_word_embeddings:
            yield "model.embed_tokens.weight"

    def layer(self, name: str, shape: tuple[int, ...]) -> Layer | None:
        """`name`.weight of a matrix, or a vector of that name."""
        if len(shape) == 1:
            ref = self.refs.get(name)
            return None if ref is None else expect_float(ref, shape)
        stem = name.removesuffix(".weight")
        return find_layer(self.refs, stem, shape[0], shape[1], self.settings)

    # Experts

    def experts(self, spec: TensorSpec) -> Source | Stacked | None:
        before, after = spec.name.split(".experts.")
        part, kind = after.split(".")
        found = []
        for e in range(spec.shape[0]):
            layer = self.expert(f"{before}.experts", e, part, kind, spec.shape[1:])
            if layer is None:
                break
            found.append(layer)
        if not found:
            return self.stacked(f"{before}.experts", part, kind, spec)
        if len(found) < spec.shape[0]:
            raise Unreadable(f"{spec.name}: expert {len(found)} of {spec.shape[0]} is missing")
        return Source(tuple(found), expert=True)

    def expert(self, stem: str, e: int, part: str, kind: str, shape: tuple[int, ...]) -> Layer | None:
        """One projection of one expert, under any of its names."""
        down = part == "down_proj"
        if down or not self.halves:
            own = self.layer(f"{stem}.{e}.{part}.{kind}", shape)
            if own is None and down:
                return self.layer(f"{stem}.down_projs.{e}.{kind}", shape)
            if own is not None:
                return own
        phase = int(part == "up_proj")
        if self.halves:
            pair = [self.layer(f"{stem}.{e}.{half}.{kind}", shape) for half in ("gate_proj", "up_proj")]
            if pair[0] is not None and pair[1] is not None:
                if shape[0] % 2:
                    raise Unreadable(f"{stem}.{e}: {shape[0]} rows of gate_proj have no halves")
                return Halved(pair[0], pair[1], phase)
        for name in (f"{stem}.gate_up_projs.{e}.{kind}", f"{stem}.{e}.gate_up_proj.{kind}"):
            both = self.layer(name, (2 * shape[0], *shape[1:]))
            if both is not None:
                return Turns(both, phase)
        return None

    def stacked(self, stem: str, part: str, kind: str, spec: TensorSpec) -> Source | Stacked | None:
        """Experts that were left as they are, in one tensor for all of them."""
        down = part == "down_proj"
        name = f"{stem}.{'down_proj' if down else 'gate_up_proj'}"
        phase, step = (0, 1) if down else (int(part == "up_proj"), 2)
        e, n, *rest = spec.shape
        if kind == "bias":
            bias = self.refs.get(f"{name}_bias")
            if bias is None:
                return None
            expect_float(bias, (e, n * step))
            return Stacked(bias, None, True, phase, step)
        k = rest[0]
        blocks, scales = self.refs.get(f"{name}_blocks"), self.refs.get(f"{name}_scales")
        if blocks is not None and scales is not None:
            for ref, shape in ((blocks, (e, n * step, k // 32, 16)), (scales, (e, n * step, k // 32))):
                if ref.dtype != "U8" or ref.shape != shape:
                    raise Unreadable(f"{ref.name} is {ref.dtype} {list(ref.shape)}, not U8 {list(shape)}")
            return Stacked(blocks, scales, True, phase, step)
        both = self.refs.get(name)
        if both is None:
            return None
        # transformers keeps [E, in, out]; what is square says nothing else, so it is read so too.
        if both.dtype not in FLOATS or both.shape != (e, k, n * step):
            raise Unreadable(f"{both.name} is {both.dtype} {list(both.shape)}, not floats {[e, k, n * step]}")
        return Stacked(both, None, False, phase, step)


# What a configuration says


def settings_of(quantization: Mapping[str, Any]) -> Settings:
    """Of GPTQ's configuration; defaults for any other."""
    group = quantization.get("group_size")
    return Settings(
        added=0 if quantization.get("checkpoint_format") == "gptq_v2" else 1,
        group=group if type(group) is int and group > 0 else 0,
        symmetric=quantization.get("sym") is not False,
    )


def holds_halves(quantization: Mapping[str, Any]) -> bool:
    """Whether gate_proj and up_proj are halves: our files say so, GPTQModel's are; others take names at their word."""
    own, meta = quantization.get("exporter"), quantization.get("meta")
    if isinstance(own, dict):
        return own.get("gate_up") == HALVES
    quantizer = meta.get("quantizer") if isinstance(meta, dict) else None
    said = quantizer if isinstance(quantizer, list) else [quantizer]
    return any(isinstance(each, str) and each.lower().startswith("gptqmodel") for each in said)


def refuse_quantization(quantization: Mapping[str, Any]) -> str | None:
    """Why files of this configuration cannot be read here, or None."""
    method = quantization.get("quant_method")
    shown = "".join(c if c.isprintable() else "?" for c in str(method)[:40])
    if method == "auto-round":
        packing = str(quantization.get("packing_format", "auto_round:auto_gptq"))[:40]
        return None if "gptq" in packing else f"auto-round's packing {packing!a}"
    if method is None and "bits" in quantization:
        return "a quantization without quant_method, as MLX writes it,"
    if method not in (None, "gptq", "compressed-tensors", "mxfp4"):
        return f"quant_method {shown!r}"
    if method == "gptq":
        spelled = quantization.get("checkpoint_format", "gptq")
        if spelled not in ("gptq", "gptq_v2", None):
            return f"checkpoint_format {str(spelled)[:40]!a}"
        if quantization.get("pack_dtype", "int32") != "int32":
            return f"pack_dtype {str(quantization['pack_dtype'])[:40]!a}"
    for key in ("transform_config", "sparsity_config", "rotation", "rotation_config", "adapter"):
        value = quantization.get(key)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):
            return f"{key}, which changes the weights"
    return None


def written_by(quantization: Mapping[str, Any]) -> str:
    """The tool that says it wrote this; "" where none does."""
    own, meta = quantization.get("exporter"), quantization.get("meta")
    if isinstance(own, dict) and isinstance(own.get("version"), str):
        return f"exporter {own['version'][:20]}"
    quantizer = meta.get("quantizer") if isinstance(meta, dict) else None
    first = quantizer[0] if isinstance(quantizer, list) and quantizer else quantizer
    if isinstance(first, str):
        name, _, version = first[:60].partition(":")
        name = "GPTQModel" if name == "gptqmodel" else name
        return "".join(c if c.isprintable() else "?" for c in f"{name} {version}".strip())
    tuned = quantization.get("autoround_version")
    return f"auto-round {tuned[:20]}" if isinstance(tuned, str) and tuned.isprintable() else ""
