"""GPTQ (Frantar et al. 2022, arXiv 2210.17323) on transposed, batched matrices.

The objective of one matrix W [N, K] with inputs X is |(W - Q) X|^2, which the Hessian H = X X^T holds
entirely. Three things differ from the usual code: weights are kept as [K, N], so that a column is contiguous;
a group's scale is chosen when the loop reaches it, from the weights as they are by then, its errors weighed
by what they will cost; and the scale is rounded to its stored type before any code is chosen. Order is that
of the file: no activation order, nothing to store for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exporter.errors import ExporterError
from exporter.model.torch import import_torch
from exporter.quantize.grids import Grid

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 256  # columns whose errors reach the columns beyond them in one product
_DAMP_LIMIT = 1.0


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch with one thread: on a row or a few, threads wait for each other longer than they work."""
    torch = import_torch()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Factor:
    """Upper U [B, K, K] with H^-1 = U^T U for the damped H; `damp` is what was needed."""

    upper: Tensor
    damp: float


@dataclass(frozen=True)
class Solved:
    """levels [B, K, N] and scales [B, K / group, N]; a value is level * scale.

    `lost` [B, N]: |(W - Q) X|^2 of each output, under the damped H.
    """

    levels: Tensor
    scales: Tensor
    lost: Tensor

    def values(self) -> Tensor:
        """[B, K, N]"""
        b, k, n = self.levels.shape
        groups = self.scales.shape[1]
        out: Tensor = (self.levels.view(b, groups, -1, n) * self.scales[:, :, None]).view(b, k, n)
        return out


def damped(hessian: Tensor, damp: float | Tensor) -> Tensor:
    """H + damp * mean(diag H), damp one number or [B, 1].

    The diagonal is 1 where H's is 0: an input that is never seen is merely rounded.
    """
    torch = import_torch()
    h = hessian.clone()
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    dead = diagonal == 0
    diagonal += damp * mean
    diagonal.masked_fill_(dead, 1.0)
    if not bool(torch.isfinite(diagonal).all()):
        raise ExporterError(
            "the inputs of this weight are not finite", hint="exporter doctor CHECKPOINT finds damaged tensors"
        )
    return h


def factor(hessian: Tensor, damp: float) -> Factor:
    """Factor H [B, K, K]; `damp` is raised tenfold, up to 1, where H does not factor. Raises ExporterError."""
    torch = import_torch()
    while True:
        h = damped(hessian, damp)
        # One Cholesky of the flipped matrix gives the factor of the inverse without forming the inverse.
        lower, failed = torch.linalg.cholesky_ex(h.flip(-2, -1))
        if not bool(failed.any()):
            eye = torch.eye(h.shape[-1], device=h.device).expand_as(h)
            inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
            return Factor(inverse.flip(-2, -1).contiguous(), damp)
        if damp >= _DAMP_LIMIT:
            raise ExporterError(
                "the Hessian of this weight does not factor", hint="use more or other calibration text (--calibration)"
            )
        damp = min(damp * 10, _DAMP_LIMIT)


def correction(hessian: Tensor, drift: Tensor, ridge: float | Tensor) -> Tensor:
    """M [B, K, K]: W + M W gives, from drifted inputs, what W [K, N] gives from the released model's.

    With inputs X here and X + D in the released model, the least squares answer is W + H^-1 (X D^T) W.
    `drift` [B, K, K] is X D^T; `ridge` (a share of the mean diagonal of H) keeps it from fitting noise.
    The idea is that of GPTAQ (Li et al. 2025, arXiv 2504.02692), solved in closed form.
    """
    torch = import_torch()
    out: Tensor = torch.cholesky_solve(drift, torch.linalg.cholesky(damped(hessian, ridge)))
    return out


def gptq(weights: Tensor, f: Factor, grid: Grid) -> Solved:
    """Round weights [B, K, N] column by column. K is a multiple of the grid's group."""
    torch = import_torch()
    w = weights.clone()
    b, k, n = w.shape
    levels = torch.empty_like(w)
    scales = w.new_empty((b, k // grid.group, n))
    block = max(grid.group, _BLOCK // grid.group * grid.group)
    errors = w.new_empty((b, block, n))
    lost = w.new_zeros((b, n))
    for start in range(0, k, block):
        stop = min(start + block, k)
        for at in range(start, stop, grid.group):
            end = at + grid.group
            with one_thread():
                scales[:, at // grid.group] = _group(w, levels, errors, f.upper, grid, start, at)
            if end < stop:
                _carry(w[:, end:stop], f.upper[:, at:end, end:stop], errors[:, at - start : end - start])
        made = errors[:, : stop - start]
        lost += made.square().sum(1)  # the objective is the sum of these squares: W - Q = U^T E
        if stop < k:
            _carry(w[:, stop:], f.upper[:, start:stop, stop:], made)
    return Solved(levels, scales, lost)


def _group(w: Tensor, levels: Tensor, errors: Tensor, upper: Tensor, grid: Grid, start: int, at: int) -> Tensor:
    """Round the group of columns from `at`; its scales [B, N]. `errors` begins at column `start`."""
    torch = import_torch()
    size = grid.group
    own = upper[:, at : at + size, at : at + size]
    pivots = own.diagonal(dim1=-2, dim2=-1)  # [B, group]
    columns = w[:, at : at + size]
    scale = grid.choose(columns, pivots.square().reciprocal())
    divisor = grid.divisor(scale)
    made = errors[:, at - start : at - start + size]
    for i in range(size):
        column = columns[:, i]
        if i:
            # Errors of the group's earlier columns, brought in when this column is reached.
            column = torch.baddbmm(columns[:, i : i + 1], own[:, :i, i, None].mT, made[:, :i], alpha=-1)[:, 0]
        level = grid.level(column, divisor)
        levels[:, at + i] = level
        made[:, i] = (column - level * scale) / pivots[:, i, None]
    return scale


def _carry(rest: Tensor, upper: Tensor, errors: Tensor) -> None:
    """rest [B, R, N] -= upper [B, C, R]^T errors [B, C, N]."""
    rest.baddbmm_(upper.mT, errors, alpha=-1)
