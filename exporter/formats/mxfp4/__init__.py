"""MXFP4 folders: the layout in which OpenAI released gpt-oss, for everything that loads the release.

Source: the safetensors files of openai/gpt-oss-20b, read by transformers (`Mxfp4Config`), vLLM and TensorRT-LLM's
PyTorch backend. A layer's experts are two matrices, stored together for all experts:

    gate_up_proj_blocks U8 [E, 2I, H / 32, 16]    gate_up_proj_scales U8 [E, 2I, H / 32]    gate_up_proj_bias [E, 2I]
    down_proj_blocks    U8 [E, H, I / 32, 16]     down_proj_scales    U8 [E, H, I / 32]     down_proj_bias    [E, H]

Row 2i of gate_up_proj is gate i, row 2i + 1 is up i. A block is 32 e2m1 numbers, even k in the low nibble; its scale
is the exponent of a power of two (e8m0). All the rest is BF16 under its canonical name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from exporter.errors import UsageError
from exporter.formats.base import ExportJob, Format, Target
from exporter.formats.folder.files import FLOATS, Piece, SafetensorsFolder, is_expert
from exporter.formats.folder.shards import ITEM_BYTES, Stored
from exporter.types import Scheme, TensorSpec
from exporter.types.recipe import Step

RELEASED_FLOATS = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")


class Mxfp4(SafetensorsFolder):
    name = "mxfp4"
    title = "the released layout: vLLM, TensorRT-LLM, transformers"
    as_released = True
    gate_up = "gate and up rows take turns, as released"

    def for_target(self, target: str) -> Format:
        if target:
            raise UsageError(f'mxfp4 has no target "{target}"', hint="leave the target out")
        return self

    def schemes(self) -> Mapping[str, str]:
        return {"mxfp4": "blocks and scales, for experts", "bf16": "BF16, for the rest"}

    def refuse(self, scheme: Scheme, spec: TensorSpec) -> str | None:
        if spec.role == "expert":
            return None if scheme.kind == "e2m1" else "readers of this layout take experts in MXFP4 only"
        if scheme.kind == "e2m1":
            return "readers of this layout take MXFP4 for experts only"
        if scheme.name != "bf16":
            return 'readers of this layout take BF16 here, as released (method = "rtn", scheme = "bf16" rounds to it)'
        return None

    def target(self, step: Step) -> Target:
        """Gate and up each have half of what they share."""
        stored = self.stored(step)[0]
        kind = "MXFP4 blocks and scales" if step.scheme.kind == "e2m1" else stored.dtype
        return Target(stored.name, kind, step.spec.shape, step.stored_bytes)

    # Geometry

    def stored(self, step: Step) -> list[Stored]:
        return [tensor for tensor, _ in _tensors(step)]

    def pieces(self, step: Step) -> list[Piece]:
        pieces, turn = [], _turn(step)
        for tensor, row in _tensors(step):
            each = tensor.nbytes // tensor.shape[0]
            if turn is None:
                pieces.append(Piece((tensor.name,), 0, each, each))
            else:  # every second row
                pieces.append(Piece((tensor.name,), turn * row, each, row, ((step.spec.shape[1], 2 * row),)))
        return pieces

    def quantization_config(self, job: ExportJob) -> dict[str, Any]:
        return {"modules_to_not_convert": _left_as_floats(job), "quant_method": "mxfp4"}


def _turn(step: Step) -> int | None:
    """0 for gate, 1 for up: even and odd rows of one matrix; None for what has its tensor to itself."""
    if ".experts.gate_proj." in step.name:
        return 0
    return 1 if ".experts.up_proj." in step.name else None


def _tensors(step: Step) -> list[tuple[Stored, int]]:
    """The tensors that hold a step, each with the bytes of one of its rows."""
    shape = step.spec.shape
    if step.scheme.kind == "float" and not is_expert(step):
        dtype = FLOATS[step.scheme.name]
        return [(Stored(step.name, dtype, shape), ITEM_BYTES[dtype] * math.prod(shape[1:]))]
    layer, _, kind = step.name.rpartition(".")
    e, rows = shape[:2]
    if _turn(step) is not None:
        layer, rows = f"{layer.rpartition('.')[0]}.gate_up_proj", 2 * rows
    if kind == "bias":
        dtype = FLOATS[step.scheme.name]
        return [(Stored(f"{layer}_bias", dtype, (e, rows)), ITEM_BYTES[dtype])]
    groups = shape[2] // 32
    return [
        (Stored(f"{layer}_blocks", "U8", (e, rows, groups, 16)), 16 * groups),
        (Stored(f"{layer}_scales", "U8", (e, rows, groups)), groups),
    ]


def _left_as_floats(job: ExportJob) -> list[str]:
    """`modules_to_not_convert`: the checkpoint's own where it lists modules that are floats here, else the released."""
    raw = job.file("config.json")
    config: Any = json.loads(raw) if raw is not None else {}
    own = config.get("quantization_config")
    listed = own.get("modules_to_not_convert") if isinstance(own, dict) and own.get("quant_method") == "mxfp4" else None
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        return list(RELEASED_FLOATS)
    experts = {step.name.rpartition(".experts.")[0] + ".experts" for step in job.steps if is_expert(step)}
    return list(RELEASED_FLOATS) if any(_covers(name, experts) for name in listed) else listed


def _covers(listed: str, modules: Iterable[str]) -> bool:
    """Whether some reader may take an entry, with * for a layer's number, for one of these modules."""
    return any(fnmatchcase(module, f"*{listed}*") for module in modules)


FORMAT = Mxfp4()
