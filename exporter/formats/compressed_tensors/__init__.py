"""compressed-tensors folders: integers and MXFP4 as transformers and llm-compressor read them.

Source: compressed-tensors 0.19, `pack-quantized` and `mxfp4-pack-quantized`. A layer [N, K] of integers is
`weight_packed` int32 [N, K * bits / 32], low bits first, code = value + 2^(bits - 1); `weight_scale` float16
[N, K / group]; `weight_shape` int64 [2]. MXFP4 is `weight_packed` uint8 [N, K / 2], even k in the low nibble,
and `weight_scale` uint8 [N, K / 32] (e8m0). gate_proj and up_proj are what they are called.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from exporter.errors import UsageError
from exporter.formats.base import ExportJob, Format
from exporter.formats.folder import Array, HfFolder
from exporter.formats.folder.layers import by_scheme, patterns, refuse_integers
from exporter.formats.folder.shards import Stored
from exporter.types import Scheme, TensorSpec
from exporter.types.qtensor import U8
from exporter.types.recipe import Step

_PACKED = {"int": "pack-quantized", "e2m1": "mxfp4-pack-quantized"}


class CompressedTensors(HfFolder):
    name = "compressed-tensors"
    title = "transformers, llm-compressor"

    def for_target(self, target: str) -> Format:
        if target:
            raise UsageError(f'compressed-tensors has no target "{target}"', hint="leave the target out")
        return self

    def schemes(self) -> Mapping[str, str]:
        return {
            "mxfp4": "mxfp4-pack-quantized",
            "int4-g32": "pack-quantized",
            "int8-g32": "pack-quantized",
            "int4-g64": "pack-quantized",
            "int8-g64": "pack-quantized",
            "bf16": "BF16",
            "f16": "F16",
            "f32": "F32",
        }

    def refuse_quantized(self, scheme: Scheme, spec: TensorSpec) -> str | None:
        if spec.role == "embedding":
            return "readers look embeddings up as floats"
        if scheme.data_bytes(spec.shape[-1]) % 4:
            return f"rows of {spec.shape[-1]} are not whole words"
        return refuse_integers(scheme)

    def refuse_steps(self, steps: Sequence[Step]) -> str | None:
        schemes = sorted({s.scheme.name for s in steps if s.spec.role == "expert"})
        if len(schemes) > 1:
            return f"experts are {' and '.join(schemes)}; transformers takes one scheme for all experts"
        return None

    def arrays(self, step: Step) -> list[Array]:
        scheme, (n, k) = step.scheme, step.spec.shape[-2:]
        row, scales = scheme.data_bytes(k), scheme.scale_bytes(k)
        if scheme.kind == "e2m1":
            return [
                Array(Stored("weight_packed", "U8", (n, row)), n, row, row),
                Array(Stored("weight_scale", "U8", (n, scales)), n, scales, scales),
            ]
        return [
            Array(Stored("weight_packed", "I32", (n, row // 4)), n, row, row),
            Array(Stored("weight_scale", "F16", (n, scales // 2)), n, scales, scales),
        ]

    def constants(self, step: Step) -> list[Stored]:
        if step.scheme.kind == "e2m1":
            return []
        return [Stored("weight_shape", "I64", (2,), functools.partial(_shape, step.spec.shape[-2:]))]

    def quantization_config(self, job: ExportJob) -> dict[str, Any]:
        groups = by_scheme(job.steps)
        if not groups:
            return {}
        weights = [s for s in job.steps if s.spec.role in ("expert", "linear", "head")]
        every = {
            f"group_{i}": {
                "targets": [f"re:{p}" for p in patterns(steps, weights)],
                "weights": _arguments(steps[0].scheme),
                "format": _PACKED[steps[0].scheme.kind],
            }
            for i, steps in enumerate(groups.values())
        }
        formats = {group["format"] for group in every.values()}
        floats = [s for s in weights if s.scheme.kind == "float"]
        return {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": every,
            "ignore": [f"re:{p}" for p in patterns(floats, weights)],
        }


def _arguments(scheme: Scheme) -> dict[str, Any]:
    """A scheme as compressed-tensors' QuantizationArgs."""
    fp4 = {"type": "float", "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
    return {
        "num_bits": scheme.bits,
        **(fp4 if scheme.kind == "e2m1" else {"type": "int"}),
        "symmetric": True,
        "strategy": "group",
        "group_size": scheme.group,
        "dynamic": False,
    }


def _shape(shape: tuple[int, ...]) -> U8:
    return np.array(shape, "<i8").view(np.uint8)


FORMAT = CompressedTensors()
