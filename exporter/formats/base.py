"""What a format promises. Dropping a module with a `FORMAT` into this folder adds a format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from exporter.model import ModelConfig
from exporter.types import QTensor, Scheme, TensorSpec
from exporter.types.qtensor import U8
from exporter.types.recipe import Step


@dataclass(frozen=True)
class Target:
    """How one canonical tensor is stored: its name there, type, shape and bytes."""

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Provenance:
    """Where the numbers came from. `digest` is one BLAKE3 over all tensor digests, in order."""

    exporter_version: str
    source_repo: str
    source_revision: str
    recipe: str
    recipe_sha256: str
    digest: str
    tensor_digests: Mapping[str, str]


@dataclass(frozen=True)
class ExportJob:
    """Everything a format may need beside the numbers. The JSON values are parsed files of the checkpoint."""

    model_name: str
    config: ModelConfig
    steps: Sequence[Step]
    provenance: Provenance
    tokenizer: Mapping[str, Any]
    tokenizer_config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    chat_template: str | None
    split_size: int = 0


@dataclass(frozen=True)
class FileLayout:
    """One output file, laid out before any number is written.

    `head` is everything before the tensors; `offsets` where each canonical tensor starts. A leaf of a
    tensor lies at `offset + start_row * bytes of a row`.
    """

    filename: str
    head: bytes
    size: int
    offsets: Mapping[str, int]


@dataclass(frozen=True)
class Located:
    """Where a finished artifact keeps a canonical tensor."""

    path: Path
    offset: int
    nbytes: int
    type: str


class Format(Protocol):
    """`pack` and `unpack` move bits and change no number; both work on any run of leading indices."""

    name: str
    title: str
    extension: str

    def schemes(self) -> Mapping[str, str]:
        """Scheme name -> the type that stores it exactly."""

    def refuse_model(self, config: ModelConfig) -> str | None:
        """Why this model cannot be stored without losing something, or None."""

    def refuse(self, scheme: Scheme, spec: TensorSpec) -> str | None:
        """Why this tensor cannot be stored exactly in `scheme`, or None."""

    def refuse_tokenizer(self, tokenizer: Mapping[str, Any], config: ModelConfig) -> str | None:
        """Why this tokenizer.json cannot be stored, or None."""

    def target(self, step: Step) -> Target:
        """Name, type, shape and bytes; pure."""

    def pack(self, step: Step, q: QTensor) -> U8:
        """The stored bytes of some leading indices, flat uint8."""

    def unpack(self, step: Step, raw: U8) -> QTensor:
        """The inverse of `pack` for a whole number of leading indices."""

    def layout(self, job: ExportJob) -> list[FileLayout]:
        """All files of the artifact, sized; pure."""

    def locate(self, folder: Path, steps: Sequence[Step]) -> dict[str, Located]:
        """Read a finished artifact's own tables (bounded) and find every tensor of `steps` in it."""
