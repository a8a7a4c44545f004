"""Quantized numbers on their way from a checkpoint to an artifact, and their digest.

A tensor is handled in *leaves*: one expert of an expert weight, a fixed run of rows of any other.
The leaf is the unit of work, of resuming and of the digest, so a digest does not depend on how the
work was cut, leaves can be made in parallel, and a difference can be named to the expert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from exporter.types.scheme import Scheme

U8 = npt.NDArray[np.uint8]

_LEAF_ELEMENTS = 1 << 19


def leaf_rows(shape: Sequence[int]) -> int:
    """How many indices of the leading axis make one leaf of a tensor of this shape.

    One expert for [E, N, K]; about half a million numbers for [N, K]; everything for a vector.
    """
    if len(shape) >= 3:
        return 1
    if len(shape) == 2:
        return max(1, min(shape[0], _LEAF_ELEMENTS // max(1, shape[1])))
    return max(1, shape[0]) if shape else 1


def leaf_count(shape: Sequence[int]) -> int:
    """How many leaves a tensor of this shape has."""
    return -(-shape[0] // leaf_rows(shape))


def leaf_range(shape: Sequence[int], leaf: int) -> tuple[int, int]:
    """The [start, stop) range of the leading axis that a leaf covers."""
    step = leaf_rows(shape)
    return leaf * step, min((leaf + 1) * step, shape[0])


def leaves(shape: Sequence[int]) -> list[tuple[int, int]]:
    """The ranges of all leaves, in order."""
    return [leaf_range(shape, i) for i in range(leaf_count(shape))]


@dataclass(frozen=True)
class QTensor:
    """Some leading indices of a tensor (or all of it), packed.

    data    uint8 [..., K * bits / 8]. 4-bit codes two to a byte, even k in the low nibble (the
            released gpt-oss order); 8-bit codes one to a byte; floats as their little-endian bytes.
            Codes are unsigned.
    scales  uint8 e8m0 [..., K / group] (value 2^(s - 127)), float16 [..., K / group], or None
    zeros   uint8 [..., K / group], or None: then the zero is `scheme.zero`

    `numerics.decode` turns it into codes one to a byte, or into numbers.
    """

    name: str
    scheme: Scheme
    data: U8
    scales: npt.NDArray[np.uint8] | npt.NDArray[np.float16] | None = None
    zeros: U8 | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.data.shape[:-1], self.data.shape[-1] * 8 // self.scheme.bits)

    def leaf_digest(self) -> bytes:
        """BLAKE3 over codes, scales and zeros of this leaf, in that order, C-contiguous, little-endian."""
        h = blake3()
        for part in (self.data, self.scales, self.zeros):
            if part is not None:
                h.update(np.ascontiguousarray(part).view(np.uint8).data)
        return h.digest()


def tensor_digest(scheme: Scheme, shape: Sequence[int], leaf_digests: Sequence[bytes]) -> str:
    """Digest of a whole tensor: BLAKE3 over scheme name, shape and the digests of its leaves."""
    if math.prod(shape) and len(leaf_digests) != leaf_count(shape):
        raise ValueError(f"{len(leaf_digests)} leaf digests for shape {tuple(shape)}")
    h = blake3(f"{scheme.name} {'x'.join(map(str, shape))}\n".encode())
    for d in leaf_digests:
        h.update(d)
    return h.hexdigest()
