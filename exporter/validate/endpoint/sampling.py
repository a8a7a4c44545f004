"""From logits to a token, and to log-probabilities."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from exporter.errors import ExporterError
from exporter.numerics.floats import F32

F64 = npt.NDArray[np.float64]


def log_probabilities(logits: F32) -> F64:
    """log softmax of logits [..., V], float64. Raises ExporterError for logits that are not finite."""
    if not np.isfinite(logits).all():
        raise ExporterError("the artifact's logits are not finite", hint="exporter validate ARTIFACT")
    shifted = logits - logits.max(axis=-1, keepdims=True)
    wide = shifted.astype(np.float64)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True)))


def sample(log_p: F64, uniform: float, temperature: float, top_p: float) -> int:
    """The token of log-probabilities [V] in whose part of the cumulated probabilities `uniform`, in [0, 1), falls.

    temperature 0 takes the likeliest, of equal ones the first. top_p < 1 keeps the likeliest tokens that reach that
    mass together (Holtzman et al. 2020, arXiv 1904.09751).
    """
    if temperature == 0:
        return int(log_p.argmax())
    scaled = (log_p - log_p.max()) / temperature
    p = np.exp(scaled)
    p /= p.sum()
    if top_p < 1:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= top_p]] = 0.0
    reach = np.cumsum(p)
    found = int(np.searchsorted(reach, uniform * reach[-1], side="right"))
    # Rounding may lead past the last token that has any probability.
    return min(found, int(np.flatnonzero(p)[-1]))


def top(log_p: F64, k: int) -> list[tuple[int, float]]:
    """The k likeliest tokens of [V] and their log-probabilities, likeliest first, of equal ones the first token."""
    if k <= 0:
        return []
    k = min(k, len(log_p))
    # Ties at the border: all that reach the k-th value are candidates.
    border = np.partition(log_p, -k)[-k]
    candidates = np.flatnonzero(log_p >= border)
    order = np.argsort(-log_p[candidates], kind="stable")[:k]
    return [(int(t), float(log_p[t])) for t in candidates[order]]
