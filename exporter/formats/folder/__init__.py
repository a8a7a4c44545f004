"""A Hugging Face folder: safetensors files, their index, config.json and the files of the tokenizer.

Experts are stored one by one, as linear layers: `model.layers.N.mlp.experts.E.gate_proj`. Arrays of one
kind of all experts lie one after another in the file, so that a tensor [E, N, K] is one strided part of
it. What a quantization writes for a layer is said by the formats that build on this.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from exporter.errors import ExporterError
from exporter.formats.base import ExportJob, FileLayout, Fixed, Footprint, Located, Part, Prover, Target
from exporter.formats.folder import shards
from exporter.formats.folder.config import COPIED, config_json
from exporter.formats.folder.shards import ITEM_BYTES, Stored
from exporter.formats.groups import groups as grouped
from exporter.model import ModelConfig
from exporter.types import QTensor, Scheme, TensorSpec
from exporter.types.qtensor import U8
from exporter.types.recipe import Step

_FLOATS = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
_AGAIN = "exporter quantize ... --overwrite makes it again"


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


@dataclass(frozen=True)
class Piece:
    """Where an array, or half of one, is: in one stored tensor, or in one for each leading index.

    `start` counts bytes in the stored tensor; `lead`, `width` and `axes` are those of a Part.
    """

    names: tuple[str, ...]
    start: int
    lead: int
    width: int
    axes: tuple[tuple[int, int], ...]


class HfFolder(ABC):
    """What the formats of Hugging Face folders have in common; see `formats.base.Format` for the promises."""

    name: str
    prover: Prover = "reference"
    gates: Mapping[str, float | bool] = MappingProxyType({})
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

    @abstractmethod
    def quantization_config(self, job: ExportJob) -> dict[str, Any]:
        """`quantization_config` of config.json."""

    # What it can hold

    def refuse_model(self, config: ModelConfig) -> str | None:
        if self.halves and config.intermediate_size % 2:
            return f"intermediate_size is {config.intermediate_size}, which has no halves"
        return None

    def refuse(self, scheme: Scheme, spec: TensorSpec) -> str | None:
        return None if scheme.kind == "float" else self.refuse_quantized(scheme, spec)

    def refuse_tokenizer(self, tokenizer: Mapping[str, Any], config: ModelConfig) -> str | None:
        """Nothing: the tokenizer's files are copied as they are."""
        return None

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
        kind = _FLOATS.get(step.scheme.name) or f"packed {step.scheme.name}"
        nbytes = sum(s.nbytes for s in self._stored(step))
        return Target(step.name.replace(".experts.", ".experts.*."), kind, step.spec.shape, nbytes)

    def footprint(self, steps: Sequence[Step]) -> Footprint:
        return Footprint(sum(self.target(step).nbytes for step in steps))

    def pack(self, step: Step, q: QTensor) -> list[U8]:
        packed: list[U8] = []
        for raw in (q.data, q.scales):
            if raw is None:
                continue
            rows = np.ascontiguousarray(raw).view(np.uint8)
            if self._halved(step):
                half = rows.reshape(len(rows), 2, -1)
                packed += [half[:, 0], half[:, 1]]
            else:
                packed.append(rows)
        return packed

    def unpack(self, step: Step, arrays: Sequence[U8]) -> QTensor:
        scheme, shape = step.scheme, step.spec.shape
        if self._halved(step):
            pairs = zip(arrays[0::2], arrays[1::2], strict=True)
            arrays = [np.stack((a.reshape(len(a), -1), b.reshape(len(b), -1)), axis=1) for a, b in pairs]
        lead = (len(arrays[0]), *shape[1:-1]) if len(shape) > 1 else ()
        data = arrays[0].reshape(*lead, -1)
        if scheme.kind == "float":
            return QTensor(step.name, scheme, data)
        scales = arrays[1].reshape(*lead, -1)
        return QTensor(step.name, scheme, data, scales if scheme.scale == "e8m0" else scales.view(np.float16))

    # Geometry

    def _halved(self, step: Step) -> bool:
        return self.halves and (".experts.gate_proj." in step.name or ".experts.up_proj." in step.name)

    def _arrays(self, step: Step) -> list[Array]:
        if step.scheme.kind != "float":
            return self.arrays(step)
        shape = step.spec.shape[1:] if _is_expert(step) else step.spec.shape
        dtype = _FLOATS[step.scheme.name]
        row = ITEM_BYTES[dtype] * (shape[1] if len(shape) > 1 else 1)
        return [Array(Stored(step.name.rpartition(".")[2], dtype, shape), shape[0], row, row)]

    def _stored(self, step: Step) -> list[Stored]:
        """Every tensor that a step puts into the file, in order."""
        constants = [] if step.scheme.kind == "float" else self.constants(step)
        kinds = [a.stored for a in self._arrays(step)] + constants
        return [replace(kind, name=name) for kind in kinds for name in stored_names(step, kind.name)]

    def _pieces(self, step: Step) -> list[Piece]:
        pieces = []
        for array in self._arrays(step):
            names = stored_names(step, array.stored.name)
            if not _is_expert(step):
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

    def _parts(self, step: Step, offsets: Mapping[str, int]) -> tuple[Part, ...]:
        """`offsets`: where each stored tensor starts. Raises ValueError when experts are not equally far apart."""
        parts = []
        for p in self._pieces(step):
            first = offsets[p.names[0]]
            if any(offsets[name] != first + i * p.lead for i, name in enumerate(p.names)):
                raise ValueError(f"the experts of {step.name} do not lie one after another")
            parts.append(Part(first + p.start, p.lead, p.width, p.axes))
        return tuple(parts)

    # Files

    def layout(self, job: ExportJob) -> list[FileLayout]:
        groups = grouped(job.steps, job.split_size, lambda step: self.target(step).nbytes)
        count = len(groups)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        if count == 1:
            names = ["model.safetensors"]
        files = [self._file(job, name, steps, name is names[0]) for name, steps in zip(names, groups, strict=True)]
        small = {"config.json": config_json(job, self.quantization_config(job))}
        if count > 1:
            small["model.safetensors.index.json"] = self._index(names, groups)
        small |= {name: raw for name in COPIED if (raw := job.file(name)) is not None}
        return files + [FileLayout(name, raw, len(raw)) for name, raw in small.items()]

    def _file(self, job: ExportJob, name: str, steps: Sequence[Step], first: bool) -> FileLayout:
        stored = [s for step in steps for s in self._stored(step)]
        head, offsets, size = shards.encode_header(stored, {"format": "pt", **(self._provenance(job) if first else {})})
        fixed = tuple(Fixed(offsets[s.name], s.nbytes, s.make) for s in stored if s.make)
        return FileLayout(name, head, size, {step.name: self._parts(step, offsets) for step in steps}, fixed)

    def _provenance(self, job: ExportJob) -> dict[str, str]:
        return {**job.provenance.entries(), "exporter.gate_up": self.gate_up}

    @property
    def gate_up(self) -> str:
        """What gate_proj and up_proj hold, in the words of the metadata."""
        return "halves of the interleaved matrix" if self.halves else "gate rows and up rows apart"

    def _index(self, names: Sequence[str], groups: Sequence[Sequence[Step]]) -> bytes:
        files = zip(names, groups, strict=True)
        where = {stored.name: name for name, steps in files for step in steps for stored in self._stored(step)}
        total = sum(self.target(step).nbytes for steps in groups for step in steps)
        body = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        return (json.dumps(body, indent=2) + "\n").encode()

    def locate(self, folder: Path, steps: Sequence[Step]) -> dict[str, Located]:
        found = shards.read_headers(sorted(folder.glob("*.safetensors")))
        located, unknown = {}, set(found)
        for step in steps:
            for s in self._stored(step):
                entry = found.get(s.name)
                if entry is None or (entry.dtype, entry.shape) != (s.dtype, s.shape):
                    what = "is missing" if entry is None else f"is {entry.dtype} {list(entry.shape)}"
                    raise ExporterError(
                        f"{folder.name}: tensor {s.name} {what}; expected {s.dtype} {list(s.shape)}", hint=_AGAIN
                    )
                unknown.discard(s.name)
        for step in steps:
            path = found[self._stored(step)[0].name].path
            here = {name: entry.offset for name, entry in found.items() if entry.path == path}
            try:
                located[step.name] = Located(path, self._parts(step, here))
            except (KeyError, ValueError):
                raise ExporterError(f"{folder.name}: {step.name} does not lie as it was written", hint=_AGAIN) from None
        if unknown:
            raise ExporterError(f"{folder.name}: unknown tensor {min(unknown)}", hint=_AGAIN)
        return located


def _is_expert(step: Step) -> bool:
    return ".mlp.experts." in step.name


def stored_names(step: Step, what: str) -> tuple[str, ...]:
    """`what` ("qweight", "bias") of the layer that a canonical tensor is of: one name, or one for each expert."""
    layer, _, kind = step.name.rpartition(".")
    if kind == "sinks":
        return (step.name,)
    if not _is_expert(step):
        return (f"{layer}.{what}",)
    before, after = layer.split(".experts.")
    return tuple(f"{before}.experts.{i}.{after}.{what}" for i in range(step.spec.shape[0]))
