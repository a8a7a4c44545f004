"""ONNX folders for ONNX Runtime, onnxruntime-genai and transformers.js: small graphs over one store of weights.

A target is a kind of device: "cpu", "cuda" or "webgpu". `model.onnx` runs in a plain onnxruntime session that
starts with an empty cache; `model_genai.onnx`, named by genai_config.json, is the same graph with sliding layers
that keep their window only. For the web one graph serves all, where transformers.js looks for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.errors import ExporterError, UsageError, did_you_mean
from exporter.formats.base import ExportJob, FileLayout, Footprint, Format, Located, Prover, Target, Verdict
from exporter.formats.groups import groups
from exporter.formats.onnx import arrays
from exporter.formats.onnx.configs import small_files
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
from exporter.formats.onnx.devices import DEVICES, Device
from exporter.formats.onnx.graph import Blueprint, build
from exporter.model import ModelConfig
from exporter.types import QTensor, Scheme, TensorSpec
from exporter.types.qtensor import U8
from exporter.types.recipe import Step

_AGAIN = "exporter quantize ... --overwrite makes it again"

# Sound artifacts of the demo checkpoint stay a hundredth (difference) to a half (divergence) below these, as
# damaged ones do not: tests/oracle/test_onnx_runtime.py. With float16 activations more is lost on the way.
_GATES: dict[str, float | bool] = {
    "arithmetic_kl_mean": 1e-6,
    "cached_difference": 0.01,
    "cached_kl_mean": 0.02,
    "long_kl_mean": 0.02,
    "router_flips": 0.1,
    "genai_kl_mean": 0.02,
    "genai_difference": 1e-4,
    "genai_tokenizer_equal": True,
    "genai_chat_equal": True,
}
_FLOAT16_GATES: dict[str, float | bool] = {
    "arithmetic_kl_mean": 1e-3,
    "cached_difference": 0.25,
    "genai_difference": 1e-3,
}
# Its kernels choose other experts for 4.5 % of the demo's tokens and layers than float32 does, and that is nearly all
# of a mean KL of 4.0e-3 (onnxruntime-gpu 1.31 on an H100, benchmarks/results/onnx_cuda_demo_h100.json).
_CUDA_GATES: dict[str, float | bool] = {"arithmetic_kl_mean": 6e-3}


class Onnx:
    name = "onnx"
    title = "ONNX Runtime, onnxruntime-genai, transformers.js"
    prover: Prover = "onnxruntime"

    def __init__(self, device: str = "cpu") -> None:
        self.device: Device = DEVICES[device]
        self.gates: Mapping[str, float | bool] = _GATES | (_FLOAT16_GATES if self.device.io == "f16" else {})
        if self.device.name == "cuda":
            self.gates |= _CUDA_GATES

    def for_target(self, target: str) -> Format:
        if target and target not in DEVICES:
            raise UsageError(
                f'onnx has no target "{target}".{did_you_mean(target, DEVICES)}', hint=f"targets: {', '.join(DEVICES)}"
            )
        return Onnx(target or "cpu")

    # What it can hold

    def schemes(self) -> Mapping[str, str]:
        fp4 = {"mxfp4": "FP4 QMoE"} if self.device.name == "cuda" else {}
        return {
            **fp4,
            "int4-g32": "4-bit QMoE, MatMulNBits",
            "int8-g32": "8-bit QMoE, MatMulNBits",
            "int4-g64": "4-bit QMoE, MatMulNBits",
            "int8-g64": "8-bit QMoE, MatMulNBits",
            "bf16": "bfloat16",
            "f16": "float16",
            "f32": "float32",
        }

    def refuse_model(self, config: ModelConfig) -> str | None:
        if config.hidden_act != "silu":
            return f"hidden_act is {config.hidden_act!r}; QMoE computes gpt-oss's own SwiGLU"
        if config.head_dim % 16:
            return f"head_dim is {config.head_dim}; GroupQueryAttention rotates multiples of 16"
        return None

    def refuse(self, scheme: Scheme, spec: TensorSpec) -> str | None:
        return scheme.refuse(spec.shape[-1]) or self.device.refuse(scheme, spec)

    def refuse_steps(self, steps: Sequence[Step]) -> str | None:
        first: dict[str, Step] = {}
        for step in steps:
            together = _computed_together(step)
            other = first.setdefault(together, step)
            if other.scheme.name != step.scheme.name:
                reason = "one operator computes with both"
                return f"{other.name} is {other.scheme.name} and {step.name} {step.scheme.name}; {reason}"
        return None

    def refuse_tokenizer(self, tokenizer: Mapping[str, Any], config: ModelConfig) -> str | None:
        """Nothing: the tokenizer's files are copied as they are."""
        return None

    # Numbers

    def target(self, step: Step) -> Target:
        held = arrays.arrays(step, self.device)
        nbytes = sum(step.spec.shape[0] * a.part.index_bytes * bin(a.part.mask).count("1") // 8 for a in held)
        kind = held[0].initializer.dtype if step.scheme.kind == "float" else self._operator(step)
        return Target(arrays.graph_name(step), kind, step.spec.shape, nbytes)

    def footprint(self, steps: Sequence[Step]) -> Footprint:
        """As ONNX Runtime holds them. On a CPU its integer kernels keep a copy of their own, of which they compute:
        codes, and for each group a scale and a sum (measured with onnxruntime 1.32: 24 bytes for 32 codes of four
        bits, 40 for 32 of eight). What differs from the activations in type is converted when it loads. CUDA's kernel
        for FP4 experts keeps a packed copy beside them, which no limit of the runtime's counts: 24.5 GB for 20b, where
        this says 23.3 (onnxruntime-gpu 1.31 on an H100, benchmarks/results/onnx_cuda_20b_h100.json).
        """
        wide = self.device.io == "f32"
        weights = 0
        for step in steps:
            elements, scheme = step.spec.elements, step.scheme
            if step.spec.role == "embedding":
                weights += self.target(step).nbytes
            elif scheme.kind == "float":
                weights += elements * (4 if wide else 2)
            elif wide:
                weights += elements * scheme.bits // 8 + elements // scheme.group * 8
            else:
                weights += self.target(step).nbytes * (2 if scheme.kind == "e2m1" else 1)
        return Footprint(weights, 4 if wide else 2, self.device.windowed)

    def hardware(self, steps: Sequence[Step]) -> tuple[Verdict, ...]:
        """None: it is the same everywhere."""
        return ()

    def pack(self, step: Step, q: QTensor) -> list[U8]:
        return arrays.pack(step, q, self.device)

    def unpack(self, step: Step, packed: Sequence[U8]) -> QTensor:
        return arrays.unpack(step, packed, self.device)

    def _operator(self, step: Step) -> str:
        kind = {"expert": "QMoE", "embedding": "GatherBlockQuantized"}.get(step.spec.role, "MatMulNBits")
        return f"{kind} {'fp4' if step.scheme.kind == 'e2m1' else f'{step.scheme.bits} bits'}"

    # Files

    def layout(self, job: ExportJob) -> list[FileLayout]:
        stem, first = self._names(job)
        found = groups(job.steps, job.split_size, lambda step: self.target(step).nbytes)
        of, tables = (
            self._arrays_of(job.steps),
            rotation_tables(job.config, "float" if self.device.io == "f32" else "float16"),
        )
        files = data_files(found, first, of, tables)
        graphs = [(f"{stem}.onnx", False)]
        if self.device.windowed:
            graphs.append((f"{stem}_genai.onnx", True))
        layouts = [self._graph(job, name, windowed, files) for name, windowed in graphs]
        layouts += [file_layout(f, of, tables) for f in files]
        small = small_files(job, self.device, graphs[-1][0], self._js(stem, len(files)))
        return layouts + [FileLayout(name, raw, len(raw)) for name, raw in small.items()]

    def _names(self, job: ExportJob) -> tuple[str, str]:
        """The graph's file without its ending, and the first data file."""
        if not self.device.web:
            return "model", "model.onnx.data"
        stem = f"onnx/model_{self._dtype(job)}"
        return stem, f"{stem}.onnx_data"

    def _dtype(self, job: ExportJob) -> str:
        """What transformers.js calls this kind of weights."""
        expert = next(s for s in job.steps if s.spec.role == "expert")
        return "q4f16" if expert.scheme.bits == 4 else "int8"

    def _js(self, stem: str, files: int) -> dict[str, Any] | None:
        if not self.device.web:
            return None
        dtype = stem.rpartition("_")[2]
        return {
            "dtype": dtype,
            "kv_cache_dtype": {dtype: "float16"},
            "use_external_data_format": {f"{stem.rpartition('/')[2]}.onnx": files},
        }

    def _arrays_of(self, steps: Sequence[Step]) -> ArraysOf:
        rows = arrays.head_rows(steps)
        return lambda step: arrays.arrays(step, self.device, rows)

    def _graph(self, job: ExportJob, name: str, windowed: bool, files: Sequence[DataFile]) -> FileLayout:
        blueprint = Blueprint(
            config=job.config,
            device=self.device,
            schemes={step.name: step.scheme for step in job.steps},
            places=places(files),
            windowed=windowed,
            metadata={} if windowed else job.provenance.entries(),
            version=job.provenance.exporter_version,
        )
        raw = build(blueprint)
        return FileLayout(name, raw, len(raw))

    def _graphs(self, folder: Path) -> list[Path]:
        """The graphs of a finished folder, the plain one first."""
        if not self.device.web:
            return [folder / "model.onnx", folder / "model_genai.onnx"]
        graphs = list(folder.glob("onnx/model_*.onnx"))
        if len(graphs) != 1:
            raise ExporterError(f"{folder}: {len(graphs)} graphs of ours instead of one", hint=_AGAIN)
        return graphs

    def locate(self, folder: Path, steps: Sequence[Step]) -> dict[str, Located]:
        return locate(self._graphs(folder), folder, steps, self._arrays_of(steps), set(WAVES))


def _computed_together(step: Step) -> str:
    """A name that steps share which one operator takes: q, k and v; the three weights of a layer's experts."""
    if step.spec.role == "expert":
        return f"layer {step.spec.layer} experts"
    return arrays.graph_name(step) if step.spec.role == "linear" else step.name


FORMAT = Onnx()
