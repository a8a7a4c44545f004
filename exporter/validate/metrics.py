"""How far an artifact's predictions are from the reference's, in float64.

The reference keeps its k most likely tokens and the mass of the rest (model/reference.py), so the
divergence is taken over k + 1 outcomes: each kept token, and "any other". It is exact where k is the
whole vocabulary; otherwise merging outcomes can only lower it (log-sum inequality), so the reported
KL never exceeds the true one, and both distributions agree on a tail of small mass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from exporter.errors import ExporterError
from exporter.model.reference import ReferenceLogits, following
from exporter.numerics.floats import F32

F64 = npt.NDArray[np.float64]

_CHUNK = 1 << 22  # numbers held in float64 at once: 32 MiB
_BLOCK = 64  # neighbouring positions depend on each other: the bootstrap draws runs of this many
_RESAMPLES = 2000


@dataclass(frozen=True, eq=False)
class Positions:
    """One value a position, float64 [n]; the last two are NaN where no token follows.

    kl            KL(reference || artifact), nats
    same_top      1.0 where both have the same most likely token
    reference     log-probability that the reference gives to the token that follows
    artifact      that the artifact gives
    """

    kl: F64
    same_top: F64
    reference: F64
    artifact: F64

    @staticmethod
    def join(parts: list[Positions]) -> Positions:
        names = Positions.__dataclass_fields__
        return Positions(**{n: np.concatenate([getattr(p, n) for p in parts]) for n in names})

    def arrays(self, name: str) -> dict[str, F64]:
        """NAME.kl, NAME.same_top, ...: as `of` reads them."""
        return {f"{name}.{field}": getattr(self, field) for field in Positions.__dataclass_fields__}

    @staticmethod
    def of(arrays: Mapping[str, F64], name: str) -> Positions:
        """What `arrays` laid into a mapping or an .npz under this name."""
        return Positions(**{field: arrays[f"{name}.{field}"] for field in Positions.__dataclass_fields__})

    def take(self, where: npt.NDArray[np.bool_] | slice) -> Positions:
        """Some of the positions."""
        return Positions(**{n: getattr(self, n)[where] for n in Positions.__dataclass_fields__})


def log_sum_exp(x: F64) -> F64:
    """log(sum(exp(x))) over the last axis; -inf for an empty or all -inf row, NaN where x has one."""
    if not x.shape[-1]:
        return np.full(x.shape[:-1], -np.inf)
    top = x.max(axis=-1, keepdims=True)
    shift = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        out: F64 = np.log(np.exp(x - shift).sum(axis=-1)) + shift[..., 0]
    return out


def divergence(p: F64, q: F64) -> F64:
    """KL(p || q) of log-probabilities [n, outcomes], each normalised here first; float64 [n].

    Rounded inputs whose sums differ from one would otherwise add an error of the first order.
    """
    with np.errstate(invalid="ignore"):  # infinite logits become NaN, and so "not measured"
        p = p - log_sum_exp(p)[:, None]
        q = q - log_sum_exp(q)[:, None]
        terms = np.exp(p) * np.where(np.isneginf(p), 0, p - q)
    out: F64 = terms.sum(axis=-1)
    return out


def compare(reference: ReferenceLogits, start: int, logits: F32) -> Positions:
    """The artifact's logits [n, V] against positions start ... start + n - 1 of the reference."""
    if int(reference.top_ids.max()) >= logits.shape[1]:
        raise ExporterError(
            f"the artifact predicts {logits.shape[1]} tokens, the reference at least {reference.top_ids.max() + 1}",
            hint="make the reference and the artifact from the same checkpoint",
        )
    step = max(1, _CHUNK // logits.shape[1])
    parts = [
        _compare_rows(reference, slice(start + at, start + min(at + step, len(logits))), logits[at : at + step])
        for at in range(0, len(logits), step)
    ]
    return Positions.join(parts)


def _compare_rows(reference: ReferenceLogits, rows: slice, logits: F32) -> Positions:
    ids = reference.top_ids[rows].astype(np.int64)  # [n, k]
    whole = logits.astype(np.float64)
    total = log_sum_exp(whole)
    kept = np.take_along_axis(whole, ids, axis=1)
    targets = following(reference.tokens)[rows]
    artifact = np.where(targets < 0, np.nan, np.take_along_axis(whole, targets.clip(0)[:, None], axis=1)[:, 0])
    # One minus the kept mass would cancel where the tail is small: sum what is left.
    np.put_along_axis(whole, ids, -np.inf, axis=1)
    tail = log_sum_exp(whole)
    with np.errstate(invalid="ignore"):
        artifact = artifact - total
    return Positions(
        kl=divergence(_with_tail(reference, rows), np.concatenate((kept, tail[:, None]), axis=1)),
        same_top=(logits.argmax(axis=1) == ids[:, 0]).astype(np.float64),
        reference=reference.target_logprob[rows].astype(np.float64),
        artifact=artifact,
    )


def between(a: ReferenceLogits, b: ReferenceLogits) -> Positions:
    """Reference `b` in the artifact's place, against `a`: what a difference in arithmetic alone costs.

    The outcomes are the tokens that both keep, and "any other". Both must be of the same text.
    """
    if not np.array_equal(a.tokens, b.tokens):
        raise ValueError("references of different texts")
    vocab = int(max(a.top_ids.max(), b.top_ids.max())) + 1
    step = max(1, _CHUNK // vocab)
    parts = []
    for at in range(0, a.tokens.size, step):
        rows = slice(at, at + step)
        ids_a, ids_b = a.top_ids[rows].astype(np.int64), b.top_ids[rows].astype(np.int64)
        known = np.full((len(ids_a), vocab), -np.inf)
        np.put_along_axis(known, ids_b, b.top_logprobs[rows].astype(np.float64), axis=1)
        q = np.take_along_axis(known, ids_a, axis=1)
        p = _with_tail(a, rows)
        common = np.isfinite(q)
        lonely = np.concatenate((np.where(common, -np.inf, p[:, :-1]), p[:, -1:]), axis=1)
        p = np.concatenate((np.where(common, p[:, :-1], -np.inf), log_sum_exp(lonely)[:, None]), axis=1)
        np.put_along_axis(known, ids_a, -np.inf, axis=1)  # what is left is b's alone
        rest = log_sum_exp(np.concatenate((known, b.tail_logprob[rows, None].astype(np.float64)), axis=1))
        parts.append(
            Positions(
                kl=divergence(p, np.concatenate((q, rest[:, None]), axis=1)),
                same_top=(ids_a[:, 0] == ids_b[:, 0]).astype(np.float64),
                reference=a.target_logprob[rows].astype(np.float64),
                artifact=b.target_logprob[rows].astype(np.float64),
            )
        )
    return Positions.join(parts)


def _with_tail(reference: ReferenceLogits, rows: slice) -> F64:
    """[n, k + 1]"""
    both = (reference.top_logprobs[rows], reference.tail_logprob[rows, None])
    return np.concatenate(both, axis=1).astype(np.float64)


def summary(positions: Positions, seed: int = 0) -> dict[str, Any]:
    """The figures of a report; None for what is not a finite number.

    kl_ci95 is a bootstrap interval of the mean over runs of 64 positions. delta_p_rms is the root
    mean square change of the probability of the token that follows; ppl_ratio is the artifact's
    perplexity over the reference's on the same tokens.
    """
    kl = positions.kl
    follows = ~np.isnan(positions.reference)
    reference, artifact = positions.reference[follows], positions.artifact[follows]
    if not follows.any():  # a text of single tokens: no mean of nothing
        reference = artifact = np.full(1, np.nan)
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = bootstrap_mean(kl, seed)
        figures = {
            "kl_mean": kl.mean(),
            "kl_median": np.median(kl),
            "kl_p99": np.quantile(kl, 0.99),
            "kl_p999": np.quantile(kl, 0.999),
            "kl_max": kl.max(),
            "top1": positions.same_top.mean(),
            "ppl": np.exp(-artifact.mean()),
            "ppl_reference": np.exp(-reference.mean()),
            "ppl_ratio": np.exp(reference.mean() - artifact.mean()),
            "delta_p_rms": np.sqrt(np.square(np.exp(artifact) - np.exp(reference)).mean()),
        }
    finite = {name: float(value) if np.isfinite(value) else None for name, value in figures.items()}
    interval = [low, high] if np.isfinite(low + high) else None
    return {"positions": len(kl), **finite, "kl_ci95": interval}


def bootstrap_mean(values: F64, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean, by drawing runs of neighbouring values with replacement."""
    sums = np.add.reduceat(values, np.arange(0, len(values), _BLOCK))
    counts = np.full(len(sums), float(_BLOCK))
    counts[-1] = len(values) - _BLOCK * (len(sums) - 1)
    draws = np.random.default_rng(seed).integers(0, len(sums), (_RESAMPLES, len(sums)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
