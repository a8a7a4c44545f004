"""Names, shapes and places of tensors; no bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# What a tensor is for. Recipes match names; formats and the doctor ask for the role.
# "router" and "vector" (norms, sinks, biases) are never quantized below bf16.
Role = Literal["expert", "linear", "embedding", "head", "router", "vector"]


@dataclass(frozen=True)
class TensorRef:
    """Where the bytes of one stored tensor lie.

    `dtype` is the safetensors name ("BF16", "U8", ...), `offset` counts from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the model in canonical form: one projection of one layer.

    Expert weights are [E, N, K] with gate and up apart; linear weights [N, K]; the contracted axis
    is always last.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    layer: int | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)
