"""What a format promises. Dropping a module with a `FORMAT` into this folder adds a format."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from exporter.model import ModelConfig
from exporter.model.memory import Buffers
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

    def entries(self) -> dict[str, str]:
        """The facts as the metadata of a file that holds strings by name; the digests come last, in order."""
        facts = {
            "exporter.version": self.exporter_version,
            "exporter.source_repo": self.source_repo,
            "exporter.source_revision": self.source_revision,
            "exporter.recipe": self.recipe,
            "exporter.recipe_sha256": self.recipe_sha256,
            "exporter.digest": self.digest,
            "exporter.tensor_digests": "\n".join(f"{name} {digest}" for name, digest in self.tensor_digests.items()),
        }
        return {name: value for name, value in facts.items() if value}


@dataclass(frozen=True)
class ExportJob:
    """Everything a format may need beside the numbers. The JSON values are parsed files of the checkpoint.

    `file(name)` gives the bytes of one of its small files, None where it has no such file. `context`: the
    tokens that the artifact is planned for, 0 for as many as the model takes.
    """

    model_name: str
    config: ModelConfig
    steps: Sequence[Step]
    provenance: Provenance
    tokenizer: Mapping[str, Any]
    tokenizer_config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    chat_template: str | None
    split_size: int = 0
    context: int = 0
    file: Callable[[str], bytes | None] = lambda name: None


@dataclass(frozen=True)
class Part:
    """Where a file keeps one array of a packed tensor, whose indices are (i, j..., b), all in bytes.

    The leading index i starts at `offset + i * lead`; each of `axes` is (count, stride), outermost first;
    the last `width` bytes lie together. So a transposed matrix, or the even rows of an interleaved one,
    is a part like any other: it is moved into place, and no format copies it about. Two tensors may share
    their bytes, each with its own bits of `mask` (rows of FP4 that lie in one byte); an array has only those.
    """

    offset: int
    lead: int
    width: int
    axes: tuple[tuple[int, int], ...] = ()
    mask: int = 0xFF

    @property
    def index_bytes(self) -> int:
        """Bytes of one leading index."""
        return math.prod(count for count, _ in self.axes) * self.width


@dataclass(frozen=True)
class Fixed:
    """Bytes of a file that no number decides (a zero point, a shape): made when needed, `nbytes` of them."""

    offset: int
    nbytes: int
    make: Callable[[], U8]


@dataclass(frozen=True)
class FileLayout:
    """One output file, laid out before any number is written.

    `head` is what it begins with, all of it for a small file that is only copied; `parts` where the
    arrays of each canonical tensor go. `filename` may have folders before it ("onnx/model.onnx").
    """

    filename: str
    head: bytes
    size: int
    parts: Mapping[str, tuple[Part, ...]] = field(default_factory=dict)
    fixed: tuple[Fixed, ...] = ()


@dataclass(frozen=True)
class Located:
    """Where a finished artifact keeps a canonical tensor."""

    path: Path
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Footprint:
    """What an artifact takes in its runtime: bytes of weights as the runtime holds them, and of one number of KV.

    `windowed`: whether sliding layers keep their window only. `buffers`: what else the runtime takes, where
    that is not what llama.cpp takes.
    """

    weights: int
    kv_item: int = 2
    windowed: bool = True
    buffers: Buffers | None = None


@dataclass(frozen=True)
class Verdict:
    """What an artifact is on one kind of device: the form of its experts, or a `refusal`: why it does not run."""

    device: str
    examples: str
    form: str
    refusal: str = ""


# What proves an artifact: its runtime, or our own forward on the weights as they are read back from the files.
Prover = Literal["llama.cpp", "onnxruntime", "tensorrt", "reference"]


class Format(Protocol):
    """`pack` and `unpack` move bits and change no number; both work on any run of leading indices."""

    name: str
    title: str
    prover: Prover
    # Limits that hold for this format beside a profile's: what only its prover measures.
    gates: Mapping[str, float | bool]

    def for_target(self, target: str) -> Format:
        """This format as one kind of reader wants it, "" the default. Raises UsageError for an unknown one."""

    def schemes(self) -> Mapping[str, str]:
        """Scheme name -> the type that stores it exactly."""

    def refuse_model(self, config: ModelConfig) -> str | None:
        """Why this model cannot be stored without losing something, or None."""

    def refuse(self, scheme: Scheme, spec: TensorSpec) -> str | None:
        """Why this tensor cannot be stored exactly in `scheme`, or None."""

    def refuse_steps(self, steps: Sequence[Step]) -> str | None:
        """Why tensors that can be stored each alone cannot be stored together, or None."""

    def refuse_tokenizer(self, tokenizer: Mapping[str, Any], config: ModelConfig) -> str | None:
        """Why this tokenizer.json cannot be stored, or None."""

    def target(self, step: Step) -> Target:
        """Name, type, shape and bytes; pure."""

    def footprint(self, steps: Sequence[Step]) -> Footprint:
        """Memory that the weights take where the artifact runs; pure."""

    def hardware(self, steps: Sequence[Step]) -> tuple[Verdict, ...]:
        """A verdict for each kind of device that makes a difference; empty where none does. Pure."""

    def pack(self, step: Step, q: QTensor) -> list[U8]:
        """The stored bytes of some leading indices: for each part one array, [i, j..., b] in its own order."""

    def unpack(self, step: Step, arrays: Sequence[U8]) -> QTensor:
        """The inverse of `pack` for a whole number of leading indices. Raises ValueError where there is none."""

    def layout(self, job: ExportJob) -> list[FileLayout]:
        """All files of the artifact, sized, the one with the most to say of the rest first; pure."""

    def locate(self, folder: Path, steps: Sequence[Step]) -> dict[str, Located]:
        """Read a finished artifact's own tables (bounded) and find every tensor of `steps` in it."""
