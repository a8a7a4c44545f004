"""One calibrated rounding, from moments and released weights to stored numbers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from exporter.errors import ExporterError
from exporter.model.torch import as_tensor, import_torch
from exporter.numerics import e2m1
from exporter.numerics.floats import F32
from exporter.quantize.gptq import Factor, Solved, correction, factor, gptq
from exporter.quantize.grids import Grid, grid_for
from exporter.quantize.hessian import Moments
from exporter.types import QTensor, Scheme
from exporter.types.recipe import GptqSpec, Step

if TYPE_CHECKING:
    from torch import Tensor

# The ridge of `correction` as a share of K / tokens: the fewer tokens an input has, the less its drift is believed.
_RIDGE = 2.0


@dataclass(frozen=True)
class Facts:
    """What is known of one rounding.

    `tokens` it was calibrated on, of them `added` that the router sends elsewhere; `damp` as needed; `error`:
    |(W - Q) X|^2 as a share of what the output would be with independent inputs, sum of H_ii w_i^2.
    """

    tokens: int
    added: int
    damp: float
    error: float

    def json(self) -> dict[str, Any]:
        return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in asdict(self).items()}


class Numbers(Protocol):
    """Where numbers come from and go to."""

    def step(self, name: str) -> Step:
        """What is to become of a tensor."""

    def has(self, name: str, leaf: int) -> bool:
        """Whether a calibrated leaf is there and whole."""

    def put(self, name: str, leaf: int, q: QTensor, facts: Facts) -> None:
        """Commit a calibrated leaf."""

    def final(self, name: str, start: int, stop: int) -> F32:
        """Numbers as they will be stored; every leaf of a calibrated tensor must be there."""

    def released(self, name: str, start: int, stop: int) -> F32:
        """Numbers of the checkpoint."""


class Problem:
    """Inputs of one or more matrices of the same K, one for each expert of a slice, and their factor."""

    def __init__(self, moments: Sequence[Moments], added: Sequence[int], spec: GptqSpec) -> None:
        torch = import_torch()
        self.spec, self.added = spec, added
        self.tokens = [m.tokens for m in moments]
        self.hessian = torch.stack([m.hessian for m in moments])
        self.factor: Factor = factor(self.hessian, spec.damp)
        k = self.hessian.shape[-1]
        ridge = self.hessian.new_tensor([[max(self.factor.damp, _RIDGE * k / max(1, n))] for n in self.tokens])
        self.correction = correction(self.hessian, torch.stack([m.drift for m in moments]), ridge)

    def repeated(self, times: int) -> Problem:
        """The same inputs for each of `times` matrices."""
        out = copy.copy(self)
        out.tokens, out.added = self.tokens * times, list(self.added) * times
        out.hessian, out.correction = (h.expand(times, -1, -1) for h in (self.hessian, self.correction))
        f = self.factor
        out.factor = Factor(f.upper.expand(times, -1, -1), f.damp)
        return out

    def solve(
        self, names: Sequence[str], scheme: Scheme, weights: Sequence[Sequence[F32]], device: str
    ) -> list[list[tuple[QTensor, Facts]]]:
        """Round weights[name][expert] [N, K], all at once: they share their inputs. Results in the same order.

        Raises ExporterError naming the tensor.
        """
        torch = import_torch()
        grid = grid_for(scheme)
        experts = [torch.cat([as_tensor(own[e], device) for own in weights]).T for e in range(len(self.tokens))]
        w = torch.stack(experts).contiguous()  # [B, K, N of all names]
        target = torch.baddbmm(w, self.correction, w)
        energy = (w.square() * self.hessian.diagonal(dim1=-2, dim2=-1)[:, :, None]).sum(1)
        _require_finite(names, weights, torch.isfinite(target).all(1) & torch.isfinite(energy))
        solved = gptq(target, self.factor, grid)
        out, start = [], 0
        for name, own in zip(names, weights, strict=True):
            rows = slice(start, start + len(own[0]))
            start = rows.stop
            rounded = (self._packed(name, grid, solved, energy, rows, e) for e in range(len(own)))
            out.append(
                [self._moved(name, scheme, w, e) or made for e, (w, made) in enumerate(zip(own, rounded, strict=True))]
            )
        return out

    def _moved(self, name: str, scheme: Scheme, weights: F32, expert: int) -> tuple[QTensor, Facts] | None:
        """MXFP4 codes of numbers that all lie on that grid already (a release that was only dequantized)."""
        if scheme.kind != "e2m1":
            return None
        packed, exact = e2m1.repack_exact(weights)
        if not bool(exact.all()):
            return None
        return QTensor(name, scheme, packed.data, packed.scales), Facts(
            self.tokens[expert], self.added[expert], 0.0, 0.0
        )

    def _packed(
        self, name: str, grid: Grid, solved: Solved, energy: Tensor, rows: slice, expert: int
    ) -> tuple[QTensor, Facts]:
        try:
            q = grid.pack(name, solved.levels[expert, :, rows], solved.scales[expert, :, rows])
        except ValueError as e:
            raise ExporterError(f"{name}: {e}", hint="exporter doctor CHECKPOINT finds damaged tensors") from None
        error = solved.lost[expert, rows].sum() / energy[expert, rows].sum()
        return q, Facts(self.tokens[expert], self.added[expert], self.factor.damp, _finite(error))


def _require_finite(names: Sequence[str], weights: Sequence[Sequence[F32]], finite: Tensor) -> None:
    """finite [B, N of all names]. Raises ExporterError naming the first tensor that has another number."""
    start = 0
    for name, own in zip(names, weights, strict=True):
        rows = slice(start, start + len(own[0]))
        start = rows.stop
        if not bool(finite[:, rows].all()):
            raise ExporterError(
                f"{name}: its numbers or those of its inputs are not finite, or too large",
                hint="exporter doctor CHECKPOINT finds damaged tensors",
            )


def _finite(value: Tensor) -> float:
    number = float(value)
    return number if np.isfinite(number) else 0.0  # weights of zero lose nothing


def by_scheme(numbers: Numbers, names: Sequence[str]) -> dict[Scheme, list[str]]:
    """Tensors that can be rounded together, in order."""
    found: dict[Scheme, list[str]] = {}
    for name in names:
        found.setdefault(numbers.step(name).scheme, []).append(name)
    return found


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Errors of this block name the tensor."""
    try:
        yield
    except ExporterError as e:
        raise ExporterError(f"{name}: {e.message}", e.hint) from None
