"""What every folder of safetensors files has in common: files, header, index, and finding the tensors again.

A format says which stored tensors a step is in (`stored`) and where in them its arrays lie (`pieces`). Two steps
may share a stored tensor, when they are always in one file: gate and up rows of one matrix are steps of one layer.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from exporter.errors import ExporterError
from exporter.formats.base import ExportJob, FileLayout, Fixed, Footprint, Located, Part, Prover, Target, Verdict
from exporter.formats.folder import shards
from exporter.formats.folder.config import COPIED, config_json
from exporter.formats.folder.shards import Stored
from exporter.formats.groups import groups as grouped
from exporter.model import ModelConfig
from exporter.types import QTensor
from exporter.types.qtensor import U8
from exporter.types.recipe import Step

FLOATS = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
_AGAIN = "exporter quantize ... --overwrite makes it again"


@dataclass(frozen=True)
class Piece:
    """Where an array, or half of one, is: in one stored tensor, or in one for each leading index.

    `start` counts bytes in the stored tensor; `lead`, `width` and `axes` are those of a Part.
    """

    names: tuple[str, ...]
    start: int
    lead: int
    width: int
    axes: tuple[tuple[int, int], ...] = ()


class SafetensorsFolder(ABC):
    """A Hugging Face folder; see `formats.base.Format` for the promises."""

    name: str
    prover: Prover = "reference"
    gates: Mapping[str, float | bool] = MappingProxyType({})

    # Whether config.json is to be spelled as the release spells it, for readers that know no other.
    as_released: bool = False

    @abstractmethod
    def stored(self, step: Step) -> list[Stored]:
        """Every tensor of the file that holds something of a step, in order."""

    @abstractmethod
    def pieces(self, step: Step) -> list[Piece]:
        """Where the arrays of `pack` go, one for each."""

    @abstractmethod
    def target(self, step: Step) -> Target:
        """Name, type, shape and bytes of the step alone; pure."""

    @abstractmethod
    def quantization_config(self, job: ExportJob) -> dict[str, Any]:
        """`quantization_config` of config.json."""

    @property
    @abstractmethod
    def gate_up(self) -> str:
        """How gate and up rows lie, in the words of the metadata."""

    # What it can hold

    def refuse_model(self, config: ModelConfig) -> str | None:
        return None

    def refuse_steps(self, steps: Sequence[Step]) -> str | None:
        return None

    def refuse_tokenizer(self, tokenizer: Mapping[str, Any], config: ModelConfig) -> str | None:
        """Nothing: the tokenizer's files are copied as they are."""
        return None

    def footprint(self, steps: Sequence[Step]) -> Footprint:
        return Footprint(sum(self.target(step).nbytes for step in steps))

    def hardware(self, steps: Sequence[Step]) -> tuple[Verdict, ...]:
        """None: it is the same everywhere."""
        return ()

    # Numbers: rows of codes, then rows of scales

    def pack(self, step: Step, q: QTensor) -> list[U8]:
        return [np.ascontiguousarray(raw).view(np.uint8) for raw in (q.data, q.scales) if raw is not None]

    def unpack(self, step: Step, arrays: Sequence[U8]) -> QTensor:
        scheme, shape = step.scheme, step.spec.shape
        lead = (len(arrays[0]), *shape[1:-1]) if len(shape) > 1 else ()
        data = arrays[0].reshape(*lead, -1)
        if scheme.kind == "float":
            return QTensor(step.name, scheme, data)
        scales = arrays[1].reshape(*lead, -1)
        return QTensor(step.name, scheme, data, scales if scheme.scale == "e8m0" else scales.view(np.float16))

    def _parts(self, step: Step, offsets: Mapping[str, int]) -> tuple[Part, ...]:
        """`offsets`: where each stored tensor starts. Raises ValueError when experts are not equally far apart."""
        parts = []
        for p in self.pieces(step):
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
        small = {"config.json": config_json(job, self.quantization_config(job), released=self.as_released)}
        if count > 1:
            small["model.safetensors.index.json"] = self._index(names, groups)
        small |= {name: raw for name in COPIED if (raw := job.file(name)) is not None}
        return files + [FileLayout(name, raw, len(raw)) for name, raw in small.items()]

    def _file(self, job: ExportJob, name: str, steps: Sequence[Step], first: bool) -> FileLayout:
        stored = list({s.name: s for step in steps for s in self.stored(step)}.values())
        head, offsets, size = shards.encode_header(stored, {"format": "pt", **(self._provenance(job) if first else {})})
        fixed = tuple(Fixed(offsets[s.name], s.nbytes, s.make) for s in stored if s.make)
        return FileLayout(name, head, size, {step.name: self._parts(step, offsets) for step in steps}, fixed)

    def _provenance(self, job: ExportJob) -> dict[str, str]:
        return {**job.provenance.entries(), "exporter.gate_up": self.gate_up}

    def _index(self, names: Sequence[str], groups: Sequence[Sequence[Step]]) -> bytes:
        files = zip(names, groups, strict=True)
        where = {stored.name: name for name, steps in files for step in steps for stored in self.stored(step)}
        total = sum(self.target(step).nbytes for steps in groups for step in steps)
        body = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        return (json.dumps(body, indent=2) + "\n").encode()

    def locate(self, folder: Path, steps: Sequence[Step]) -> dict[str, Located]:
        found = shards.read_headers(sorted(folder.glob("*.safetensors")))
        located, unknown = {}, set(found)
        for step in steps:
            for s in self.stored(step):
                entry = found.get(s.name)
                if entry is None or (entry.dtype, entry.shape) != (s.dtype, s.shape):
                    what = "is missing" if entry is None else f"is {entry.dtype} {list(entry.shape)}"
                    raise ExporterError(
                        f"{folder.name}: tensor {s.name} {what}; expected {s.dtype} {list(s.shape)}", hint=_AGAIN
                    )
                unknown.discard(s.name)
        here: dict[Path, dict[str, int]] = {}
        for name, entry in found.items():
            here.setdefault(entry.path, {})[name] = entry.offset
        for step in steps:
            path = found[self.stored(step)[0].name].path
            try:
                located[step.name] = Located(path, self._parts(step, here[path]))
            except (KeyError, ValueError):
                raise ExporterError(f"{folder.name}: {step.name} does not lie as it was written", hint=_AGAIN) from None
        if unknown:
            raise ExporterError(f"{folder.name}: unknown tensor {min(unknown)}", hint=_AGAIN)
        return located


def is_expert(step: Step) -> bool:
    """Whether it belongs to experts, weight or bias: its leading axis counts them."""
    return ".mlp.experts." in step.name
