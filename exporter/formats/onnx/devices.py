"""What the execution providers of ONNX Runtime can hold: their kernels decide, not the file format.

Sources: the kernels of onnxruntime 1.32 (contrib_ops/cpu, /cuda and /webgpu) and their documentation; what
runs on a CPU was tried out, see docs/decisions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from exporter.types import Scheme, TensorSpec


@dataclass(frozen=True)
class Device:
    """One kind of target.

    io: type of activations, logits and the KV cache. windowed: whether sliding layers can keep their
    window only, in a graph of its own for onnxruntime-genai. web: laid out for transformers.js.
    accuracy: `accuracy_level` of the integer kernels, 4 for activations rounded to int8.
    """

    name: str
    io: str
    windowed: bool
    web: bool
    accuracy: int
    provider_options: tuple[Mapping[str, Any], ...] = field(default=())

    def refuse(self, scheme: Scheme, spec: TensorSpec) -> str | None:
        """Why its kernels cannot compute with this tensor as `scheme`, or None."""
        if scheme.kind == "float":
            return self._refuse_float(spec)
        if scheme.kind == "e2m1":
            return self._refuse_fp4(spec)
        if not scheme.symmetric:
            return self._refuse_zero_points(scheme)
        if scheme.group < 16 or scheme.group & (scheme.group - 1):
            return f"groups of {scheme.group}; its kernels take powers of two from 16 on"
        if self.name == "cuda" and spec.role == "expert" and scheme.group not in (32, 64, 128):
            return f"groups of {scheme.group}; CUDA's experts take 32, 64 or 128"
        return None

    def _refuse_float(self, spec: TensorSpec) -> str | None:
        if self.web and spec.role == "expert":
            return "WebGPU has no kernel for experts that are not int4 or int8"
        return None

    def _refuse_fp4(self, spec: TensorSpec) -> str | None:
        if spec.role != "expert":
            return "no kernel multiplies by an FP4 matrix, only by FP4 experts"
        if self.name == "cuda":
            return None
        # On a CPU, QMoE takes the attribute quant_type="fp4" and computes with the codes as if they were int4.
        return f"only CUDA computes with FP4 experts; recipes exact-* hold the same numbers for {self.name}"

    def _refuse_zero_points(self, scheme: Scheme) -> str | None:
        if self.web:
            return f"{scheme.name} has zero points, which WebGPU's kernels do not take"
        if self.name == "cuda" and scheme.group < 64:
            return f"{scheme.name} has zero points, which CUDA's experts take from groups of 64 on"
        return f"{scheme.name} has zero points, which are not written"


DEVICES = {
    "cpu": Device("cpu", "f32", windowed=True, web=False, accuracy=4),
    "cuda": Device(
        "cuda", "f16", windowed=True, web=False, accuracy=0, provider_options=({"cuda": {"enable_cuda_graph": "0"}},)
    ),
    "webgpu": Device(
        "webgpu",
        "f16",
        windowed=False,
        web=True,
        accuracy=4,
        provider_options=({"webgpu": {"enableGraphCapture": "0", "validationMode": "basic"}},),
    ),
}
