"""GPTQ step by step in float64, a row and a column at a time: what exporter.quantize.gptq must agree with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from exporter.numerics import e2m1
from exporter.quantize.grids import _OTHER_SIGN, _SAME_SIGN
from exporter.types import Scheme

F64 = npt.NDArray[np.float64]


def levels_of(scheme: Scheme) -> F64:
    """Every level of the grid."""
    if scheme.kind == "e2m1":
        return e2m1.LEVELS.astype(np.float64)
    high = 2 ** (scheme.bits - 1) - 1
    return np.arange(-high if scheme.scale_rule == "absmax" else -high - 1, high + 1, dtype=np.float64)


def candidates(group: F64, scheme: Scheme) -> list[float]:
    """The scales that a rule looks at, as they can be stored."""
    largest = group[np.argmax(np.abs(group))]
    if scheme.kind == "e2m1":
        middle = int(np.floor(np.log2(abs(largest)))) - 2
        return [2.0**middle] if scheme.scale_rule == "floor" else [2.0 ** (middle + step) for step in (-1, 0, 1)]
    lowest = levels_of(scheme)[0]
    tried = {
        "absmax": [abs(largest / lowest)],
        "mse": [abs(largest / lowest) * s for s in _OTHER_SIGN],
        "signed-mse": [largest / lowest * s for s in (*_SAME_SIGN, *(-s for s in _OTHER_SIGN))],
    }
    return [float(np.float16(s)) for s in tried[scheme.scale_rule]]


def nearest(value: float, scale: float, levels: F64) -> float:
    return float(levels[np.argmin(np.abs(levels * scale - value))])


def best_scale(group: F64, importance: F64, scheme: Scheme) -> float:
    def cost(scale: float) -> float:
        rounded = np.array([nearest(v, scale, levels_of(scheme)) for v in group]) * scale
        return float((importance * (rounded - group) ** 2).sum())

    return min(candidates(group, scheme), key=cost)


def damped(hessian: F64, damp: float) -> F64:
    h = hessian.astype(np.float64) + damp * np.diag(hessian).mean() * np.eye(len(hessian))
    for i in np.flatnonzero(np.diag(hessian) == 0):
        h[i, i] = 1
    return h


def plain_gptq(weights: F64, hessian: F64, scheme: Scheme, damp: float) -> tuple[F64, F64]:
    """weights [N, K], hessian [K, K] -> levels [N, K] and scales [N, K / group]."""
    upper = np.linalg.cholesky(np.linalg.inv(damped(hessian, damp))).T  # H^-1 = U^T U
    pivots, size = np.diag(upper), scheme.group
    levels, scales = np.empty_like(weights), np.empty((len(weights), weights.shape[1] // size))
    for n, row in enumerate(weights.astype(np.float64)):  # a copy
        for k in range(len(row)):
            if k % size == 0:
                scales[n, k // size] = best_scale(row[k : k + size], pivots[k : k + size] ** -2, scheme)
            scale = scales[n, k // size]
            levels[n, k] = nearest(row[k], scale, levels_of(scheme))
            row[k:] -= (row[k] - levels[n, k] * scale) / pivots[k] * upper[k, k:]
    return levels, scales


def objective(weights: F64, values: F64, hessian: F64) -> float:
    """|(W - Q) X|^2 with H = X X^T."""
    difference = weights.astype(np.float64) - values
    return float(np.einsum("nk,kl,nl->", difference, hessian, difference))
