"""TensorRT: ONNX graphs that NVIDIA's parser takes and its builder compiles, `decode.onnx` and `prefill.onnx`.

A target is the oldest GPU that engines are for: "sm75", "sm80" or "sm120". Both graphs read one file of weights.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.errors import UsageError, did_you_mean
from exporter.formats.base import ExportJob, FileLayout, Footprint, Format, Located, Prover, Verdict
from exporter.formats.base import Target as Stored
from exporter.formats.folder.config import COPIED, config_json
from exporter.formats.groups import groups
from exporter.formats.onnx.arrays import graph_name, head_rows, kept_wide
from exporter.formats.onnx.data import (
    WAVES,
    ArraysOf,
    DataFile,
    data_files,
    file_layout,
    locate,
    places,
    rotation_tables,
)
from exporter.formats.tensorrt import arrays
from exporter.formats.tensorrt.graph import Blueprint, build
from exporter.formats.tensorrt.readme import profiles_json, readme
from exporter.formats.tensorrt.shapes import GRAPHS, buffers
from exporter.formats.tensorrt.targets import GPUS, TARGETS, Target, fuses
from exporter.model import ModelConfig
from exporter.types import QTensor, Scheme, TensorSpec
from exporter.types.qtensor import U8
from exporter.types.recipe import Step

_DATA = "weights.data"

# Of float32 activations: arithmetic, and differences of logits unless they are called shipped. All else of the graphs
# as shipped, in float16.
_GATES: dict[str, float | bool] = {
    "arithmetic_kl_mean": 1e-6,
    "cached_difference": 0.01,
    "cached_kl_mean": 0.02,
    "long_kl_mean": 0.02,
    "router_flips": 0.1,
    "optimizer_difference": 1e-4,
    "optimizer_shipped_difference": 0.02,
    "parser_rules_kept": True,
    "engines_built": True,
    "engines_expansion": 0.0,
    "engines_fused": True,
    "gpu_kl_mean": 0.02,
}


class TensorRT:
    name = "tensorrt"
    title = "TensorRT-RTX, TensorRT 10.15"
    prover: Prover = "tensorrt"

    def __init__(self, target: str = "sm80") -> None:
        self.device: Target = TARGETS[target]
        self.gates: Mapping[str, float | bool] = _GATES

    def for_target(self, target: str) -> Format:
        if target and target not in TARGETS:
            known = ", ".join(TARGETS)
            raise UsageError(
                f'tensorrt has no target "{target}".{did_you_mean(target, TARGETS)}', hint=f"targets: {known}"
            )
        return TensorRT(target or "sm80")

    # What it can hold

    def schemes(self) -> Mapping[str, str]:
        fp4 = {"mxfp4": "FLOAT4E2M1 and UINT8 (e8m0)"} if self.device.oldest >= 120 else {}
        int4 = {"int4-g32": "INT4", "int4-g64": "INT4"} if self.device.oldest >= 80 else {}
        floats = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
        if self.device.oldest < 80:
            floats["bf16"] = "float32 (norms, routers and biases alone)"
        return {**fp4, **int4, "int8-g32": "INT8", "int8-g64": "INT8", **floats}

    def refuse_model(self, config: ModelConfig) -> str | None:
        if config.hidden_act != "silu":
            return f"hidden_act is {config.hidden_act!r}; the graph computes gpt-oss's own SwiGLU"
        if config.head_dim % 8:
            return f"head_dim is {config.head_dim}; TensorRT's attention takes multiples of 8"
        return None

    def refuse(self, scheme: Scheme, spec: TensorSpec) -> str | None:
        return scheme.refuse(spec.shape[-1]) or self.device.refuse(scheme, spec)

    def refuse_steps(self, steps: Sequence[Step]) -> str | None:
        first: dict[str, Step] = {}
        for step in steps:
            other = first.setdefault(graph_name(step), step)
            if other.scheme.name != step.scheme.name:
                return f"{other.name} is {other.scheme.name} and {step.name} {step.scheme.name}; they are one matrix"
        return None

    def refuse_tokenizer(self, tokenizer: Mapping[str, Any], config: ModelConfig) -> str | None:
        """Nothing: the tokenizer's files are copied as they are."""
        return None

    # Numbers

    def target(self, step: Step) -> Stored:
        held = arrays.arrays(step)
        nbytes = sum(step.spec.shape[0] * a.part.index_bytes for a in held)
        kind = held[0].initializer.dtype.upper() if step.scheme.kind != "float" else held[0].initializer.dtype
        if step.scheme.kind != "float":
            kind += f" in blocks of {step.scheme.group}"
        return Stored(graph_name(step), kind, step.spec.shape, nbytes)

    def footprint(self, steps: Sequence[Step]) -> Footprint:
        """One engine, as TensorRT-RTX 1.7 holds it: floats become float16, but for what computes in float32.

        Matrices that are neither float nor INT4 it dequantizes ahead of all computing, and keeps beside their codes;
        experts while their layer is computed. Scales of MXFP4, a byte in the file, become float16.
        """
        weights = 0
        for step in steps:
            wide = kept_wide(step.spec)
            decoded = step.spec.elements * (4 if wide else 2)
            if step.scheme.kind == "float":
                weights += decoded
            else:
                ahead = step.spec.role in ("linear", "head") and not fuses(step.scheme)
                wider = step.spec.elements // step.scheme.group if step.scheme.kind == "e2m1" else 0
                weights += self.target(step).nbytes + wider + (decoded if ahead else 0)
        whole = any(step.spec.role == "expert" and not fuses(step.scheme) for step in steps)
        return Footprint(weights, 2, windowed=False, buffers=functools.partial(buffers, whole=whole))

    def hardware(self, steps: Sequence[Step]) -> tuple[Verdict, ...]:
        """For each GPU: the form of the experts, or why no engine builds for it."""
        expert = next(step for step in steps if step.spec.role == "expert")
        form = self.target(expert).type
        verdicts = []
        for sm, gpus in GPUS.items():
            reason = f"made for SM{self.device.oldest} and later" if sm < self.device.oldest else ""
            verdicts.append(Verdict(f"SM{sm}", gpus, form, reason))
        return tuple(verdicts)

    def pack(self, step: Step, q: QTensor) -> list[U8]:
        return arrays.pack(step, q)

    def unpack(self, step: Step, packed: Sequence[U8]) -> QTensor:
        return arrays.unpack(step, packed)

    # Files

    def layout(self, job: ExportJob) -> list[FileLayout]:
        found = groups(job.steps, job.split_size, lambda step: self.target(step).nbytes)
        of, tables = self._arrays_of(job.steps), rotation_tables(job.config, "float")
        files = data_files(found, _DATA, of, tables)
        layouts = [self._graph(job, graph, files) for graph in GRAPHS]
        layouts += [file_layout(f, of, tables) for f in files]
        context = job.context or job.config.max_position_embeddings
        small = {"config.json": config_json(job, {}), "profiles.json": profiles_json(job, self.device, context)}
        small["README.md"] = readme(job, self.device, context)
        small |= {name: raw for name in COPIED if (raw := job.file(name)) is not None}
        return layouts + [FileLayout(name, raw, len(raw)) for name, raw in small.items()]

    def _arrays_of(self, steps: Sequence[Step]) -> ArraysOf:
        rows = head_rows(steps)
        return lambda step: arrays.arrays(step, rows)

    def _graph(self, job: ExportJob, graph: str, files: Sequence[DataFile]) -> FileLayout:
        blueprint = Blueprint(
            config=job.config,
            target=self.device,
            schemes={step.name: step.scheme for step in job.steps},
            places=places(files),
            sparse=graph == "decode",
            metadata=job.provenance.entries() if graph == GRAPHS[0] else {},
            version=job.provenance.exporter_version,
        )
        raw = build(blueprint)
        return FileLayout(f"{graph}.onnx", raw, len(raw))

    def locate(self, folder: Path, steps: Sequence[Step]) -> dict[str, Located]:
        graphs = [folder / f"{graph}.onnx" for graph in GRAPHS]
        return locate(graphs, folder, steps, self._arrays_of(steps), set(WAVES))


FORMAT = TensorRT()
