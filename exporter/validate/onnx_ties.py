"""How far two computations of the same tokens are apart, where a tie between two experts is nobody's fault.

In float16 the last bit of a router's logit may choose another expert: logits of that token then differ by much, and
nothing is wrong. Such tokens are not counted, as long as they are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from exporter.model.reference import U16
from exporter.numerics.floats import F32
from exporter.validate.onnx_session import Decoding

EITHER = np.uint16(0xFFFF)


@dataclass(frozen=True)
class Computed:
    """Logits [n, V] of n tokens; routes [layers, n, top_k]: their experts, EITHER where two were equal.

    None where float32 chose them.
    """

    logits: F32
    routes: U16 | None = None

    def __getitem__(self, tokens: slice) -> Computed:
        return Computed(self.logits[tokens], None if self.routes is None else self.routes[:, tokens])

    @staticmethod
    def last(decoding: Decoding, logits: F32, top_k: int) -> Computed:
        """Of the last call of `decoding`, which gave these logits."""
        if not decoding.chooses_in_half:
            return Computed(logits)
        routes = decoding.routes(top_k)
        # Of equal ones a kernel takes whichever it meets, for one token another than for many.
        routes[decoding.undecided(top_k)] = EITHER
        return Computed(logits, routes)

    @staticmethod
    def join(parts: Sequence[Computed]) -> Computed:
        routes = [part.routes for part in parts if part.routes is not None]
        logits = np.concatenate([part.logits for part in parts])
        return Computed(logits, np.concatenate(routes, axis=1) if len(routes) == len(parts) else None)


def largest_difference(one: Computed, other: Computed) -> float:
    """Of a logit, among tokens with the same experts in both; of any where those are less than half. NaN stays."""
    apart = np.abs(one.logits - other.logits).max(axis=-1)  # [n]
    if one.routes is not None and other.routes is not None and not np.isnan(apart).any():
        same = ((one.routes == other.routes) & (one.routes != EITHER)).all(axis=(0, 2))
        apart = apart[same] if 2 * same.sum() >= same.size else apart
    return float(apart.max())


def relative_difference(one: Computed, other: Computed) -> float:
    """The same, as a share of the largest logit of `one`."""
    largest = float(np.abs(one.logits).max())
    return largest_difference(one, other) / (largest or 1.0)
