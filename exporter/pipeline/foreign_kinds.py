"""What an artifact of anyone's says of itself, and in what that differs from the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from exporter.model import ModelConfig, tensor_specs
from exporter.model.weights import Read
from exporter.pipeline.manners import Manners
from exporter.types import TensorSpec

Kind = Literal["gguf", "onnx", "folder"]


@dataclass(frozen=True)
class Stored:
    """How an artifact holds one tensor.

    type: "MXFP4", "Q4_K", "BF16", "int4 g32 asym act-order". bits: per weight, scales and zeros included.
    exact: whether this type can hold the released values of this tensor exactly.
    """

    type: str
    bits: float
    exact: bool


@dataclass(frozen=True)
class Foreign:
    """One artifact.

    path: what a runtime is given: the first GGUF part, the plain ONNX graph, or the folder. files: all that belong
    to it. config: as the artifact itself says, None for a bare graph. read: float32 leading indices of canonical
    tensors as they are stored, None for ONNX. stored: by canonical name. tool: who wrote it, as it says.
    genai: the graph that genai_config.json names. said: the sizes that it says, by their names in ModelConfig.
    notes: remarks for a person. manners: of a conversation, None where it says nothing.
    """

    kind: Kind
    path: Path
    files: tuple[Path, ...]
    format: str
    config: ModelConfig | None = None
    read: Read | None = None
    stored: Mapping[str, Stored] = field(default_factory=dict)
    tokenizer_file: Path | None = None
    tool: str = ""
    genai: Path | None = None
    said: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    manners: Manners | None = None
    close: Callable[[], None] = lambda: None

    @property
    def bytes(self) -> int:
        """Bytes of all its files."""
        return sum(path.stat().st_size for path in self.files)

    @property
    def bits_per_weight(self) -> float | None:
        """Of all its tensors, scales included; None where they are not known."""
        if self.config is None or not self.stored:
            return None
        sizes = {s.name: s.elements for s in tensor_specs(self.config)}
        return sum(sizes[name] * each.bits for name, each in self.stored.items()) / sum(sizes.values())


def can_be_exact(kind: str, spec: TensorSpec) -> bool:
    """Whether a type can hold what was released: MXFP4 experts, bf16 for the rest.

    Twice an FP4 number is a whole number up to 12, so five bits with a scale of a power of two hold an expert exactly
    as long as their groups are MXFP4's or parts of them.
    """
    if kind in ("F64", "F32", "BF16"):
        return True
    if spec.role != "expert":
        return False
    if kind.startswith("int8 "):
        grain = kind.split()[1]
        return grain.startswith("g") and 32 % int(grain[1:]) == 0
    return kind in ("MXFP4", "NVFP4", "Q8_0", "Q5_0", "Q5_1")


_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "num_local_experts", "vocab_size",
)  # fmt: skip
_SETTINGS = (
    "num_experts_per_tok", "sliding_window", "layer_types", "swiglu_limit", "swiglu_alpha", "hidden_act",
    "max_position_embeddings",
)  # fmt: skip
# What a GGUF has no key for; its runtime computes what these say of gpt-oss.
_UNSAID = {"gguf": ("layer_types", "swiglu_limit", "swiglu_alpha", "hidden_act")}


def compare_config(foreign: Foreign, config: ModelConfig) -> list[str]:
    """What an artifact says otherwise than the checkpoint, of all that the forward needs; empty where nothing."""
    own = foreign.config
    if own is None:
        return [
            f"{name} {_said(value)}, not {_said(getattr(config, name))}"
            for name, value in foreign.said.items()
            if value != getattr(config, name)
        ]
    unsaid = _UNSAID.get(foreign.format, ())
    found = []
    for name in (*_SIZES, *(n for n in _SETTINGS if n not in unsaid)):
        mine, theirs = getattr(own, name), getattr(config, name)
        if mine != theirs:
            found.append(f"{name} {_said(mine)}, not {_said(theirs)}")
    return found + _rotation(foreign, own, config)


def _rotation(foreign: Foreign, own: ModelConfig, config: ModelConfig) -> list[str]:
    """Differences of numbers that a GGUF keeps in float32, and of the rotation."""
    mine, theirs = own.rope, config.rope
    pairs = [("rms_norm_eps", own.rms_norm_eps, config.rms_norm_eps), ("rope theta", mine.theta, theirs.theta)]
    found = []
    if mine.kind != theirs.kind:
        found.append(f"rope {mine.kind}, not {theirs.kind}")
    elif mine.kind == "yarn":
        names = ("factor", "beta_fast", "beta_slow", "original_max_position")
        pairs += [(f"rope {name}", getattr(mine, name), getattr(theirs, name)) for name in names]
        if mine.truncate != theirs.truncate and foreign.format != "gguf":
            found.append(f"rope truncate {str(mine.truncate).lower()}, not {str(theirs.truncate).lower()}")
    return found + [f"{n} {a:g}, not {b:g}" for n, a, b in pairs if abs(a - b) > 1e-6 * abs(b)]


def same_shapes(foreign: Foreign, config: ModelConfig) -> bool:
    """Whether its tensors have the checkpoint's shapes, so that they can be compared at all."""
    return foreign.config is not None and all(getattr(foreign.config, n) == getattr(config, n) for n in _SIZES)


def _said(value: object) -> str:
    if isinstance(value, tuple):
        first = next((i for i, v in enumerate(value) if i % 2 != (v == "full_attention")), None)
        return "alternating" if first is None else f"with layer {first} {value[first]}"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)
