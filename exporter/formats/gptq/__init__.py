"""GPTQ folders: integers of 4 or 8 bits for GPTQModel and what reads the same files.

Source: AutoGPTQ's file format, as GPTQModel 7.7 reads it. A layer [N, K] is `qweight` int32 [K / per, N],
`per` = 32 / bits inputs to a word, low bits first; `qzeros` int32 [K / group, N / per]; `scales` float16
[K / group, N]; `g_idx` int32 [K]. value = scale * (code - zero).

"v1" files store zero - 1, "v2" files zero. Where gate_proj and up_proj are concerned, readers differ:
GPTQModel and auto-round's loader cut the interleaved matrix into halves and give those the two names; others
take the names at their word. A file of one kind read the other way computes nonsense without any complaint, so
the reader is the target, and the files say which it is.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporter.errors import UsageError, did_you_mean
from exporter.formats.base import ExportJob, Format
from exporter.formats.folder import Array, HfFolder
from exporter.formats.folder.layers import by_scheme, patterns, refuse_integers
from exporter.formats.folder.shards import Stored
from exporter.types import Scheme, TensorSpec
from exporter.types.qtensor import U8
from exporter.types.recipe import Step


@dataclass(frozen=True)
class Reader:
    """`halves`: see `HfFolder`; `stored_zero`: what is added to a zero point before it is stored."""

    halves: bool
    checkpoint_format: str
    stored_zero: int


READERS = {
    "gptqmodel": Reader(True, "gptq", -1),
    "gptqmodel-v2": Reader(True, "gptq_v2", 0),
    "by-name": Reader(False, "gptq", -1),
    "by-name-v2": Reader(False, "gptq_v2", 0),
}


class Gptq(HfFolder):
    name = "gptq"
    title = "GPTQModel, auto-round"

    def __init__(self, target: str = "gptqmodel") -> None:
        self.reader = READERS[target]
        self.halves = self.reader.halves

    def for_target(self, target: str) -> Format:
        if target and target not in READERS:
            raise UsageError(
                f'gptq has no target "{target}".{did_you_mean(target, READERS)}', hint=f"targets: {', '.join(READERS)}"
            )
        return Gptq(target or "gptqmodel")

    def schemes(self) -> Mapping[str, str]:
        return {
            "int4-g32": "4-bit words",
            "int8-g32": "8-bit words",
            "int4-g64": "4-bit words",
            "int8-g64": "8-bit words",
            "bf16": "BF16",
            "f16": "F16",
            "f32": "F32",
        }

    def refuse_quantized(self, scheme: Scheme, spec: TensorSpec) -> str | None:
        if scheme.kind != "int":
            return "GPTQ files hold integers; compressed-tensors holds MXFP4"
        if spec.role == "embedding":
            return "readers of GPTQ files look embeddings up as floats"
        if spec.shape[-2] % (32 // scheme.bits):
            return f"{spec.shape[-2]} rows are not whole words of zero points"
        return refuse_integers(scheme)

    def arrays(self, step: Step) -> list[Array]:
        scheme, (n, k) = step.scheme, step.spec.shape[-2:]
        words, groups = k * scheme.bits // 32, k // scheme.group
        return [
            Array(Stored("qweight", "I32", (words, n)), n, 4, 4, ((words, 4 * n),)),
            Array(Stored("scales", "F16", (groups, n)), n, 2, 2, ((groups, 2 * n),)),
        ]

    def constants(self, step: Step) -> list[Stored]:
        scheme, (n, k) = step.scheme, step.spec.shape[-2:]
        zeros = (k // scheme.group, n * scheme.bits // 32)
        word = _word(scheme.zero + self.reader.stored_zero, scheme.bits)
        return [
            Stored("qzeros", "I32", zeros, functools.partial(_words, word, zeros[0] * zeros[1])),
            Stored("g_idx", "I32", (k,), functools.partial(_group_of_each, k, scheme.group)),
        ]

    def quantization_config(self, job: ExportJob) -> dict[str, Any]:
        groups = by_scheme(job.steps)
        if not groups:
            return {}
        main, *others = (steps[0].scheme for steps in groups.values())
        layers = [s for s in job.steps if s.name.endswith("_proj.weight")]
        dynamic: dict[str, dict[str, int]] = {}
        for scheme in others:
            some = [s for s in groups[scheme.name] if s in layers]
            dynamic |= {f"+:{p}": {"bits": scheme.bits, "group_size": scheme.group} for p in patterns(some, layers)}
        floats = [s for s in layers if s.scheme.kind == "float"]
        dynamic |= {f"-:{p}": {} for p in patterns(floats, layers)}
        head = next(s for s in job.steps if s.spec.role == "head")
        if head.scheme.kind != "float" and head.scheme.name != main.name:
            dynamic["+:^lm_head$"] = {"bits": head.scheme.bits, "group_size": head.scheme.group}
        return {
            "quant_method": "gptq",
            "checkpoint_format": self.reader.checkpoint_format,
            "bits": main.bits,
            "group_size": main.group,
            "sym": True,
            "desc_act": False,
            "pack_dtype": "int32",
            "lm_head": head.scheme.kind != "float",
            **({"dynamic": dynamic} if dynamic else {}),
            # Not GPTQModel's own "meta": auto-round refuses a configuration that has one.
            "exporter": {
                "version": job.provenance.exporter_version,
                "recipe": job.provenance.recipe,
                "gate_up": self.gate_up,
            },
        }


def _word(value: int, bits: int) -> int:
    """`value` in every field of a word of 32 bits."""
    return sum(value << at for at in range(0, 32, bits))


def _words(word: int, count: int) -> U8:
    return np.full(count, word, "<u4").view(np.uint8)


def _group_of_each(k: int, group: int) -> U8:
    return (np.arange(k, dtype="<i4") // np.int32(group)).view(np.uint8)


FORMAT = Gptq()
