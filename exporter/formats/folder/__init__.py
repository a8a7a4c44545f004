"""A Hugging Face folder (`files`) whose experts are linear layers of their own.

Experts are stored one by one, as linear layers: `model.layers.N.mlp.experts.E.gate_proj`. Arrays of one
kind of all experts lie one after another in the file, so that a tensor [E, N, K] is one strided part of
it. What a quantization writes for a layer is said by the formats that build on this.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from exporter.formats.base import Target
from exporter.formats.folder.files import FLOATS, Piece, SafetensorsFolder, is_expert
from exporter.formats.folder.shards import ITEM_BYTES, Stored
from exporter.model import ModelConfig
from exporter.types import QTensor, Scheme, TensorSpec
from exporter.types.qtensor import U8
from exporter.types.recipe import Step


@dataclass(frozen=True)
class Array:
    """One array of a layer as `pack` gives it: its rows, each of `axes`, then `width` bytes.

    `stored` says what it is called after the layer's name, and its type and shape there. Its `rows` lie `row`
    bytes apart; `axes` are (count, stride) within a row.
    """

    stored: Stored
    rows: int
    row: int
    width: int
    axes: tuple[tuple[int, int], ...] = ()


class HfFolder(SafetensorsFolder):
    """What the formats that store experts one by one have in common."""

    # Whether gate_proj and up_proj hold the halves of the interleaved matrix instead of what they are called.
    halves: bool = False

    @abstractmethod
    def refuse_quantized(self, scheme: Scheme, spec: TensorSpec) -> str | None:
        """Why this tensor cannot be stored exactly in a scheme that is no float, or None."""

    @abstractmethod
    def arrays(self, step: Step) -> list[Array]:
        """Of a quantized matrix [N, K]: the array of its codes, and that of its scales."""

    @abstractmethod
    def constants(self, step: Step) -> list[Stored]:
        """What a quantized matrix has beside them, named after the layer, all with `make`."""

    @property
    def gate_up(self) -> str:
        """What gate_proj and up_proj hold."""
        return "halves of the interleaved matrix" if self.halves else "gate rows and up rows apart"

    # What it can hold

    def refuse_model(self, config: ModelConfig) -> str | None:
        if self.halves and config.intermediate_size % 2:
            return f"intermediate_size is {config.intermediate_size}, which has no halves"
        return None

    def refuse(self, scheme: Scheme, spec: TensorSpec) -> str | None:
        return None if scheme.kind == "float" else self.refuse_quantized(scheme, spec)

    def refuse_steps(self, steps: Sequence[Step]) -> str | None:
        if not self.halves:
            return None
        schemes = {step.name: step.scheme for step in steps}
        for name, scheme in schemes.items():
            up = name.replace(".gate_proj.", ".up_proj.")
            if up in schemes and schemes[up].name != scheme.name:
                return f"{name} is {scheme.name} and {up} {schemes[up].name}; its reader wants rows of both in one"
        return None

    # Numbers

    def target(self, step: Step) -> Target:
        kind = FLOATS.get(step.scheme.name) or f"packed {step.scheme.name}"
        nbytes = sum(s.nbytes for s in self.stored(step))
        return Target(step.name.replace(".experts.", ".experts.*."), kind, step.spec.shape, nbytes)

    def pack(self, step: Step, q: QTensor) -> list[U8]:
        packed = super().pack(step, q)
        if not self._halved(step):
            return packed
        halves = [rows.reshape(len(rows), 2, -1) for rows in packed]
        return [half[:, i] for half in halves for i in (0, 1)]

    def unpack(self, step: Step, arrays: Sequence[U8]) -> QTensor:
        if self._halved(step):
            pairs = zip(arrays[0::2], arrays[1::2], strict=True)
            arrays = [np.stack((a.reshape(len(a), -1), b.reshape(len(b), -1)), axis=1) for a, b in pairs]
        return super().unpack(step, arrays)

    # Geometry

    def _halved(self, step: Step) -> bool:
        return self.halves and (".experts.gate_proj." in step.name or ".experts.up_proj." in step.name)

    def _arrays(self, step: Step) -> list[Array]:
        if step.scheme.kind != "float":
            return self.arrays(step)
        shape = step.spec.shape[1:] if is_expert(step) else step.spec.shape
        dtype = FLOATS[step.scheme.name]
        row = ITEM_BYTES[dtype] * (shape[1] if len(shape) > 1 else 1)
        return [Array(Stored(step.name.rpartition(".")[2], dtype, shape), shape[0], row, row)]

    def stored(self, step: Step) -> list[Stored]:
        constants = [] if step.scheme.kind == "float" else self.constants(step)
        kinds = [a.stored for a in self._arrays(step)] + constants
        return [replace(kind, name=name) for kind in kinds for name in stored_names(step, kind.name)]

    def pieces(self, step: Step) -> list[Piece]:
        pieces = []
        for array in self._arrays(step):
            names = stored_names(step, array.stored.name)
            if not is_expert(step):
                pieces.append(Piece(names, 0, array.row, array.width, array.axes))
                continue
            each = array.stored.nbytes
            if not self._halved(step):
                pieces.append(Piece(names, 0, each, array.width, ((array.rows, array.row), *array.axes)))
                continue
            # Row 2i of the interleaved matrix is gate i, row 2i + 1 is up i; its first half is called gate_proj.
            start = array.row if ".up_proj." in step.name else 0
            axes = ((array.rows // 2, 2 * array.row), *array.axes)
            for half in ("gate_proj", "up_proj"):
                there = tuple(n.replace(".gate_proj.", f".{half}.").replace(".up_proj.", f".{half}.") for n in names)
                pieces.append(Piece(there, start, each, array.width, axes))
        return pieces


def stored_names(step: Step, what: str) -> tuple[str, ...]:
    """`what` ("qweight", "bias") of the layer that a canonical tensor is of: one name, or one for each expert."""
    layer, _, kind = step.name.rpartition(".")
    if kind == "sinks":
        return (step.name,)
    if not is_expert(step):
        return (f"{layer}.{what}",)
    before, after = layer.split(".experts.")
    return tuple(f"{before}.experts.{i}.{after}.{what}" for i in range(step.spec.shape[0]))
