"""GGUF for llama.cpp: the released MXFP4 bits as they are, integers as Q4_0 / Q8_0 blocks, floats as floats.

What llama.cpp hard-codes for gpt-oss (activation, its limit, which layers slide) is checked and refused
where a model differs: a file that converts and then computes something else is worse than none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from exporter.errors import ExporterError, Refused
from exporter.formats.base import ExportJob, FileLayout, Footprint, Format, Located, Part, Prover, Target, Verdict
from exporter.formats.gguf import blocks, file
from exporter.formats.gguf.blocks import BlockType
from exporter.formats.gguf.keys import metadata, split_keys
from exporter.formats.gguf.tokenizer import refuse_tokenizer
from exporter.model import ModelConfig
from exporter.model.config import FULL, SLIDING
from exporter.types import QTensor, Scheme, TensorSpec
from exporter.types.qtensor import U8
from exporter.types.recipe import Step

_LAYER_NAMES = {
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
}
_MODEL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def tensor_name(canonical: str) -> str:
    """GGUF's name, e.g. model.layers.3.self_attn.q_proj.bias -> blk.3.attn_q.bias."""
    if canonical in _MODEL_NAMES:
        return _MODEL_NAMES[canonical]
    _, _, layer, rest = canonical.split(".", 3)
    if rest in _LAYER_NAMES:
        return f"blk.{layer}.{_LAYER_NAMES[rest]}"
    stem, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{_LAYER_NAMES[stem]}.{kind}"


@dataclass(frozen=True)
class _Found:
    """A tensor as a finished file's own table gives it."""

    path: Path
    offset: int
    nbytes: int
    type: str


class Gguf:
    name = "gguf"
    title = "llama.cpp, Ollama, LM Studio"
    prover: Prover = "llama.cpp"
    gates: Mapping[str, float | bool] = MappingProxyType({})

    def for_target(self, target: str) -> Format:
        """One kind of GGUF serves all its readers: a target only tells two artifacts of a profile apart."""
        return self

    def schemes(self) -> Mapping[str, str]:
        return {
            "mxfp4": "MXFP4",
            "int8-g32": "Q8_0",
            "int4-g32": "Q4_0",
            "int8-g64": "Q8_0 (scales repeated)",
            "int4-g64": "Q4_0 (scales repeated)",
            "bf16": "BF16",
            "f16": "F16",
            "f32": "F32",
        }

    def refuse_model(self, config: ModelConfig) -> str | None:
        # ggml graph of gpt-oss: ggml_swiglu_oai(alpha 1.702, limit 7.0); sliding pattern 2 from layer 0.
        if config.hidden_act != "silu":
            return f"hidden_act is {config.hidden_act!r}; llama.cpp always computes gpt-oss's own SwiGLU"
        if config.swiglu_limit != 7.0 or config.swiglu_alpha != 1.702:
            return (
                f"swiglu_limit is {config.swiglu_limit:g} and swiglu_alpha {config.swiglu_alpha:g}; "
                "llama.cpp always uses 7 and 1.702"
            )
        pattern = tuple(FULL if i % 2 else SLIDING for i in range(config.num_hidden_layers))
        if config.layer_types != pattern:
            return "layer_types do not alternate sliding, full, ...; llama.cpp always alternates"
        if abs(config.rope.factor - 1) < 1e-9 and config.rope.kind == "yarn":
            return "rope_scaling is yarn with factor 1"
        return None

    def _block_type(self, scheme: Scheme, spec: TensorSpec) -> BlockType | str:
        """The type that holds `scheme` exactly, or why none does."""
        if scheme.kind == "float":
            # llama.cpp wants norms, sinks, biases and routers in F32; bf16 and f16 widen exactly.
            if spec.role in ("vector", "router"):
                return blocks.F32
            return {"f32": blocks.F32, "f16": blocks.F16, "bf16": blocks.BF16}[scheme.float_type]
        if scheme.kind == "e2m1":
            return blocks.MXFP4
        if not scheme.symmetric:
            return f"{scheme.name} has zero points; Q4_0 and Q8_0 have none"
        if scheme.scale != "f16":
            return f"{scheme.name} has {scheme.scale} scales; GGUF blocks hold float16"
        if scheme.group % blocks.BLOCK:
            return f"groups of {scheme.group} are not whole blocks of {blocks.BLOCK}"
        return blocks.Q4_0 if scheme.bits == 4 else blocks.Q8_0

    def refuse(self, scheme: Scheme, spec: TensorSpec) -> str | None:
        kind = self._block_type(scheme, spec)
        if isinstance(kind, str):
            return kind
        k = spec.shape[-1]
        if k % kind.block:
            return f"last axis is {k}, which {kind.name}'s block of {kind.block} does not divide"
        return None

    def refuse_steps(self, steps: Sequence[Step]) -> str | None:
        """Nothing: a GGUF holds every tensor by itself."""
        return None

    def refuse_tokenizer(self, tokenizer: Mapping[str, Any], config: ModelConfig) -> str | None:
        return refuse_tokenizer(tokenizer, config.vocab_size)

    def _type_of(self, step: Step) -> BlockType:
        kind = self._block_type(step.scheme, step.spec)
        if isinstance(kind, str):
            raise Refused(f"gguf cannot hold {step.name}: {kind}", hint="choose another recipe; see `exporter formats`")
        return kind

    def target(self, step: Step) -> Target:
        kind, shape = self._type_of(step), step.spec.shape
        nbytes = math.prod(shape[:-1]) * kind.row_bytes(shape[-1])
        return Target(tensor_name(step.name), kind.name, shape, nbytes)

    def footprint(self, steps: Sequence[Step]) -> Footprint:
        return Footprint(sum(self.target(step).nbytes for step in steps))

    def hardware(self, steps: Sequence[Step]) -> tuple[Verdict, ...]:
        """None: it is the same everywhere."""
        return ()

    def pack(self, step: Step, q: QTensor) -> list[U8]:
        return [self._type_of(step).pack(q)]

    def unpack(self, step: Step, arrays: Sequence[U8]) -> QTensor:
        raw = arrays[0].reshape(-1)
        kind, k = self._type_of(step), step.spec.shape[-1]
        q = kind.unpack(raw, step.name, step.scheme)
        rows = raw.size // kind.row_bytes(k)
        lead = (rows // math.prod(step.spec.shape[1:-1]), *step.spec.shape[1:-1]) if len(step.spec.shape) > 1 else ()
        scales = None if q.scales is None else q.scales.reshape(*lead, -1)
        return QTensor(q.name, q.scheme, q.data.reshape(*lead, -1), scales)

    def layout(self, job: ExportJob) -> list[FileLayout]:
        parts = self._parts(job)
        stem = f"{job.model_name}-{job.provenance.recipe}"
        files = []
        for i, part in enumerate(parts):
            keys = metadata(job, [self._type_of(s) for s in job.steps]) if i == 0 else {}
            name = f"{stem}.gguf"
            if len(parts) > 1:
                keys = {**keys, **split_keys(i, len(parts), len(job.steps))}
                name = f"{stem}-{i + 1:05d}-of-{len(parts):05d}.gguf"
            files.append(self._file(name, keys, part))
        return files

    def _parts(self, job: ExportJob) -> list[list[Step]]:
        """Steps of each file: whole tensors, in order, none above `split_size` unless one tensor alone is."""
        parts: list[list[Step]] = [[]]
        used = 0
        for step in job.steps:
            n = file.align(self.target(step).nbytes)
            if job.split_size and parts[-1] and used + n > job.split_size:
                parts.append([])
                used = 0
            parts[-1].append(step)
            used += n
        return parts

    def _file(self, name: str, keys: Mapping[str, file.Value], steps: Sequence[Step]) -> FileLayout:
        infos, starts, at = [], {}, 0
        for step in steps:
            target = self.target(step)
            infos.append(file.TensorInfo(target.name, target.shape, self._type_of(step).id, at))
            starts[step] = at
            at += file.align(target.nbytes)
        head = file.encode_head(keys, infos)
        parts = {step.name: (self._part(step, len(head) + start),) for step, start in starts.items()}
        return FileLayout(name, head, len(head) + at, parts)

    def _part(self, step: Step, offset: int) -> Part:
        """A tensor is one run of bytes."""
        each = self.target(step).nbytes // step.spec.shape[0]
        return Part(offset, each, each)

    def locate(self, folder: Path, steps: Sequence[Step]) -> dict[str, Located]:
        found: dict[str, _Found] = {}
        for path in sorted(folder.glob("*.gguf")):
            gguf = file.read_gguf(path)
            for t in gguf.tensors:
                kind = blocks.BY_ID.get(t.type)
                if kind is None:
                    raise ExporterError(
                        f"{path.name}: tensor {t.name} has unknown type {t.type}",
                        hint="exporter quantize ... --overwrite makes it again",
                    )
                nbytes = math.prod(t.dims[:-1]) * kind.row_bytes(t.dims[-1])
                start = gguf.data_start + t.offset
                if start + nbytes > gguf.size:
                    raise ExporterError(
                        f"{path.name}: ends inside tensor {t.name}",
                        hint="exporter quantize ... --overwrite makes it again",
                    )
                if t.name in found:
                    raise ExporterError(
                        f"{path.name}: tensor {t.name} appears twice",
                        hint="exporter quantize ... --overwrite makes it again",
                    )
                found[t.name] = _Found(path, start, nbytes, kind.name)
        return self._match(folder, steps, found)

    def _match(self, folder: Path, steps: Sequence[Step], found: dict[str, _Found]) -> dict[str, Located]:
        """`found` by canonical name; every step present with its planned type and size, nothing else."""
        located: dict[str, Located] = {}
        for step in steps:
            target = self.target(step)
            place = found.pop(target.name, None)
            if place is None or (place.type, place.nbytes) != (target.type, target.nbytes):
                what = "is missing" if place is None else f"is {place.type} of {place.nbytes:,} bytes"
                wanted = f"expected {target.type} of {target.nbytes:,} bytes"
                raise ExporterError(
                    f"{folder.name}: tensor {target.name} {what}; {wanted}",
                    hint="exporter quantize ... --overwrite makes it again",
                )
            located[step.name] = Located(place.path, (self._part(step, place.offset),))
        if found:
            raise ExporterError(
                f"{folder.name}: unknown tensor {min(found)}", hint="exporter quantize ... --overwrite makes it again"
            )
        return located


FORMAT = Gguf()
