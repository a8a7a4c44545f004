"""What a score of some questions can show, and whether two runs differ.

Scores are shares, 0 to 1. A run of n questions against a reference score from as many: the test and its names are
those of TensorRT-LLM's accuracy suite (tests/integration/defs/accuracy/README.md), one-sided, because only a loss
matters. Two runs of the same questions are compared question by question, which shows far smaller differences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import Any

import numpy as np

from exporter.errors import UsageError

ALPHA, BETA = 0.05, 0.2  # of calling a sound artifact bad; of passing one that is worse by `detectable`
SIGMA = 0.5  # the largest standard deviation that a question scored 0 or 1 can have
_RESAMPLES = 2000


def threshold(reference: float, n: int, sigma: float = SIGMA, alpha: float = ALPHA) -> float:
    """The score below which a run of n questions is worse than `reference`: reference - z_alpha * sigma * sqrt(2 / n).

    Both scores are drawn: a run that equals the reference falls below it with probability alpha.
    """
    return reference - NormalDist().inv_cdf(1 - alpha) * sigma * math.sqrt(2 / n)


def detectable(n: int, sigma: float = SIGMA, alpha: float = ALPHA, beta: float = BETA) -> float:
    """The smallest loss that a run of n questions shows with probability 1 - beta: theta of the test."""
    normal = NormalDist()
    return (normal.inv_cdf(1 - alpha) + normal.inv_cdf(1 - beta)) * sigma * math.sqrt(2 / n)


def questions_needed(theta: float, sigma: float = SIGMA, alpha: float = ALPHA, beta: float = BETA) -> int:
    """The questions that a run needs to show a loss of `theta`."""
    return math.ceil((detectable(1, sigma, alpha, beta) / theta) ** 2)


def mcnemar(b: int, c: int) -> float:
    """Two-sided exact p that b and c, of which each difference is one or the other, are equally likely.

    b: questions that only the first gets right, c: only the second (McNemar 1947; the binomial, not chi-squared,
    so that it holds for few differences). 1.0 without any.
    """
    n, few = b + c, min(b, c)
    if n == 0:
        return 1.0
    if n <= 1000:
        tail = sum(math.comb(n, k) for k in range(few + 1))
        return min(1.0, float(2 * tail / 2**n))
    # By logarithms: 2**n has no place in a float beyond 1023. The terms fall at least by few / (n - few + 1).
    log_term = math.lgamma(n + 1) - math.lgamma(few + 1) - math.lgamma(n - few + 1) - n * math.log(2)
    total, term, k = 0.0, 1.0, few
    while k >= 0 and term > 1e-17 * total:
        total += term
        term *= k / (n - k + 1)
        k -= 1
    return min(1.0, 2 * total * math.exp(log_term))


def standard_error(scores: Sequence[float]) -> float | None:
    """Of the mean of independent scores; None for fewer than two."""
    n = len(scores)
    if n < 2:
        return None
    mean = fmean(scores)
    return math.sqrt(sum((s - mean) ** 2 for s in scores) / (n - 1) / n)


def bootstrap(scores: Sequence[float], confidence: float = 0.95, seed: int = 0) -> tuple[float, float] | None:
    """Percentile interval of the mean of independent scores; None for fewer than two."""
    if len(scores) < 2:
        return None
    values = np.asarray(scores, np.float64)
    rng = np.random.default_rng(seed)
    # Row by row: all draws of 14,000 questions at once would take 200 MB.
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def wilson(right: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a share of n independent answers (Wilson 1927); unlike a bootstrap it is no point at 0 and 1."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = right / n
    middle, scale = p + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def interval(scores: Sequence[float]) -> tuple[float, float] | None:
    """95 % of the mean of independent scores: Wilson's for answers right or wrong, else the bootstrap's."""
    if scores and all(s in (0.0, 1.0) for s in scores):
        return wilson(round(sum(scores)), len(scores))
    return bootstrap(scores)


@dataclass(frozen=True)
class Paired:
    """Two runs of the same n questions. difference: mean of second - first, with its 95 % interval.

    lost, won: questions that only the first, or only the second, gets right; p: of McNemar's exact test.
    None where scores are not all 0 or 1.
    """

    n: int
    difference: float
    interval: tuple[float, float] | None
    lost: int | None
    won: int | None
    p: float | None

    def json(self) -> dict[str, Any]:
        return {
            "n": self.n,
            "difference": self.difference,
            "ci95": list(self.interval) if self.interval else None,
            "lost": self.lost,
            "won": self.won,
            "p": self.p,
        }


def paired(first: Mapping[str, float], second: Mapping[str, float]) -> Paired:
    """Compare two runs by question. Raises UsageError when they have not the same questions."""
    if not first or first.keys() != second.keys():
        only = len(first.keys() ^ second.keys())
        raise UsageError(
            f"the two runs have not the same questions ({only:,} are in one only)" if only else "no questions",
            hint="run both with the same --task and --limit",
        )
    differences = [second[key] - first[key] for key in sorted(first)]
    binary = all(s in (0.0, 1.0) for s in (*first.values(), *second.values()))
    lost, won = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
    return Paired(
        len(differences),
        fmean(differences),
        bootstrap(differences),
        lost if binary else None,
        won if binary else None,
        mcnemar(lost, won) if binary else None,
    )
