"""What calibration learns about the inputs of a weight: their second moments, and how far they have drifted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.model.torch import import_torch

if TYPE_CHECKING:
    from torch import Tensor


class Moments:
    """Sums over tokens of x x^T and x (r - x)^T; x the inputs here, r those of the released model.

    hessian, drift  float32 [K, K]
    tokens          rows added
    """

    def __init__(self, k: int, device: str) -> None:
        torch = import_torch()
        self.hessian = torch.zeros((k, k), device=device)
        self.drift = torch.zeros((k, k), device=device)
        self.tokens = 0

    def add(self, rows: Tensor, released: Tensor) -> None:
        """rows, released [n, K], token by token."""
        self.hessian.addmm_(rows.T, rows)
        self.drift.addmm_(rows.T, released - rows)
        self.tokens += len(rows)


def topped_up(rows: Tensor, total: int, want: int) -> Tensor:
    """`rows` (sorted indices of 0 ... total - 1), with evenly spaced others up to `want` where they are fewer.

    An expert that sees fewer tokens than it has inputs has a Hessian of lower rank: it is calibrated on tokens of
    others too, so that no direction of its inputs is taken for one that never occurs.
    """
    torch = import_torch()
    missing = min(want, total) - len(rows)
    if missing <= 0:
        return rows
    other = torch.ones(total, dtype=torch.bool)
    other[rows] = False
    rest = other.nonzero()[:, 0]
    evenly = rest[torch.arange(missing) * len(rest) // missing]
    out: Tensor = torch.cat((rows, evenly)).sort().values
    return out
