"""The grids that calibrated rounding works on, in torch: integers with f16 scales, and MXFP4.

A weight matrix is kept transposed, [B, K, N]: one input column of all outputs lies together, which is what
the column loop walks over. Levels are floats (codes less their zero, or FP4 values), so that a value is
always `level * scale`; `pack` makes the stored codes of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

import numpy as np

from exporter.model.torch import import_torch
from exporter.numerics import e2m1
from exporter.numerics.bits import pack_nibbles
from exporter.numerics.intq import F16_MAX
from exporter.types import QTensor, Scheme

if TYPE_CHECKING:
    from torch import Tensor

# Scales that are tried, as shares of the one that brings the largest magnitude to the lowest level (-8 of
# INT4): with its sign, and with the other sign, where that number meets the highest level (7) instead.
_SAME_SIGN = (0.70, 0.76, 0.82, 0.86, 0.90, 0.94, 0.97, 1.0, 1.04, 1.08)
_OTHER_SIGN = (0.80, 0.86, 0.92, 0.97, 1.02, 1.06, 1.10, 1.15)


class Grid(Protocol):
    """`group` rows of [B, K, N] share a scale."""

    group: int

    def choose(self, w: Tensor, importance: Tensor) -> Tensor:
        """Scales [B, N] for groups w [B, group, N]; importance [B, group] weighs the squared errors."""

    def divisor(self, scale: Tensor) -> Tensor:
        """What numbers are divided by: the scale, or infinity for a scale of zero."""

    def level(self, w: Tensor, divisor: Tensor) -> Tensor:
        """The nearest level of w; `divisor` broadcasts with it."""

    def pack(self, name: str, levels: Tensor, scales: Tensor) -> QTensor:
        """levels [K, N] and scales [K / group, N] of one matrix as stored: [N, K]."""


def grid_for(scheme: Scheme) -> Grid:
    """The grid of an integer or MXFP4 scheme."""
    return IntGrid(scheme) if scheme.kind == "int" else E2m1Grid(scheme)


class IntGrid:
    """Symmetric integers; scales are float16 numbers throughout, so codes are chosen against what is stored.

    Rules: "absmax" uses -top ... top; "mse" searches positive scales; "signed-mse" scales of both signs.
    """

    def __init__(self, scheme: Scheme) -> None:
        self.scheme, self.group = scheme, scheme.group
        self.high = (1 << (scheme.bits - 1)) - 1
        self.low = -self.high if scheme.scale_rule == "absmax" else -self.high - 1

    def choose(self, w: Tensor, importance: Tensor) -> Tensor:
        largest = w.abs().max(dim=1, keepdim=True)  # [B, 1, N]
        if self.scheme.scale_rule == "absmax":
            return _f16(largest.values[:, 0] / self.high)
        if self.scheme.signed_scales:
            base = w.gather(1, largest.indices)[:, 0] / self.low
            shares = (*_SAME_SIGN, *(-s for s in _OTHER_SIGN))
        else:
            base = largest.values[:, 0] / -self.low
            shares = _OTHER_SIGN
        return _best(self, w, importance, _f16(base), (_f16(base * share) for share in shares))

    def divisor(self, scale: Tensor) -> Tensor:
        # A scale of zero belongs to a group that float16 cannot tell from zeros.
        return scale.masked_fill(scale == 0, import_torch().inf)

    def level(self, w: Tensor, divisor: Tensor) -> Tensor:
        return (w / divisor).round_().clamp_(self.low, self.high)

    def pack(self, name: str, levels: Tensor, scales: Tensor) -> QTensor:
        codes = (levels.T + self.scheme.zero).to(import_torch().uint8).cpu().contiguous().numpy()
        data = pack_nibbles(codes) if self.scheme.bits == 4 else codes
        stored = scales.T.cpu().contiguous().numpy()
        if not bool((np.abs(stored) <= F16_MAX).all()):
            raise ValueError("a scale is beyond float16")
        return QTensor(name, self.scheme, data, stored.astype(np.float16))


class E2m1Grid:
    """FP4 values with power-of-two scales, one for 32. Rules: "floor" (OCP), "mse" (the best of three exponents)."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme, self.group = scheme, scheme.group
        self._magnitudes: Tensor | None = None  # on the device that was met last

    def choose(self, w: Tensor, importance: Tensor) -> Tensor:
        torch = import_torch()
        exponent = torch.frexp(w.abs().amax(dim=1)).exponent - 3  # floor(log2 amax) - 2
        exponent = torch.where(w.abs().amax(dim=1) > 0, exponent, -127)
        if self.scheme.scale_rule == "floor":
            return _power(exponent)
        return _best(self, w, importance, _power(exponent), (_power(exponent + step) for step in (-1, 0, 1)))

    def divisor(self, scale: Tensor) -> Tensor:
        return scale

    def level(self, w: Tensor, divisor: Tensor) -> Tensor:
        torch = import_torch()
        scaled = w / divisor
        m = scaled.abs()
        # The code of a magnitude, as in numerics.e2m1: each line is right in its own range, too large outside it.
        code = torch.minimum(torch.round(m * 2), torch.round(m) + 2)
        code = torch.minimum(code, torch.round(m / 2) + 4).clamp_(max=7)
        if self._magnitudes is None or self._magnitudes.device != w.device:
            self._magnitudes = torch.from_numpy(e2m1.MAGNITUDES).to(w.device)
        out: Tensor = torch.copysign(self._magnitudes[code.int()], scaled)
        return out

    def pack(self, name: str, levels: Tensor, scales: Tensor) -> QTensor:
        values = levels.T.cpu().contiguous().numpy()
        codes = np.searchsorted(e2m1.MAGNITUDES, np.abs(values)).astype(np.uint8)
        codes |= (values < 0).astype(np.uint8) << 3
        stored = scales.T.cpu().contiguous().numpy()
        if not bool(np.isfinite(stored).all() and np.isfinite(values).all()):
            raise ValueError("NaN or infinity cannot be stored as MXFP4")
        exponents = np.frexp(stored)[1] - 1
        return QTensor(name, self.scheme, pack_nibbles(codes), (exponents + 127).astype(np.uint8))


def _best(grid: Grid, w: Tensor, importance: Tensor, fallback: Tensor, scales: Iterable[Tensor]) -> Tensor:
    """Of `scales` [B, N] the one of least weighed squared error for each group of w [B, group, N], the first on a tie.

    `fallback` where none has a finite error.
    """
    torch = import_torch()
    best, least = fallback, torch.full_like(fallback, torch.inf)
    for scale in scales:
        error = grid.level(w, grid.divisor(scale)[:, None]).mul_(scale[:, None]).sub_(w).square_()
        error = error.mul_(importance[:, :, None]).sum(1)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, scale, best)
    return best


def _f16(scale: Tensor) -> Tensor:
    """Rounded to float16, as float32."""
    return scale.half().float()


def _power(exponent: Tensor) -> Tensor:
    """2^exponent, float32, within what e8m0 holds."""
    torch = import_torch()
    clamped = exponent.clamp(-126, 127)  # 2^-127 is subnormal: a division by it would overflow
    out: Tensor = torch.ldexp(torch.ones_like(clamped, dtype=torch.float32), clamped)
    return out
