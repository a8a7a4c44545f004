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
from exporter.model.reference import U16, ReferenceLogits, following
from exporter.numerics.floats import F32
from exporter.validate.statistics import mcnemar

F64 = npt.NDArray[np.float64]

_CHUNK = 1 << 22  # numbers held in float64 at once: 32 MiB
_BLOCK = 64  # neighbouring positions depend on each other: the bootstrap draws runs of this many, or of fewer
_RUNS = 16  # where there would be fewer runs than this
_RESAMPLES = 2000


@dataclass(frozen=True, eq=False)
class Positions:
    """One value a position, float64 [n]; all but the first two are NaN where no token follows.

    kl               KL(reference || artifact), nats
    same_top         1.0 where both have the same most likely token
    reference        log-probability that the reference gives to the token that follows
    artifact         that the artifact gives
    reference_right  1.0 where the reference's most likely token is the one that follows
    artifact_right   where the artifact's is
    """

    kl: F64
    same_top: F64
    reference: F64
    artifact: F64
    reference_right: F64
    artifact_right: F64

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
    return compare_all({"": reference}, start, logits)[""]


def compare_all(references: Mapping[str, ReferenceLogits], start: int, logits: F32) -> dict[str, Positions]:
    """The same against several references of one text; what is the artifact's alone is computed once."""
    for reference in references.values():
        if int(reference.top_ids.max()) >= logits.shape[1]:
            raise ExporterError(
                f"the artifact predicts {logits.shape[1]} tokens, the reference at least {reference.top_ids.max() + 1}",
                hint="make the reference and the artifact from the same checkpoint",
            )
    step = max(1, _CHUNK // logits.shape[1])
    parts: dict[str, list[Positions]] = {name: [] for name in references}
    for at in range(0, len(logits), step):
        rows = slice(start + at, start + min(at + step, len(logits)))
        predicted = _Predicted(logits[at : at + step])
        for name, reference in references.items():
            parts[name].append(predicted.against(reference, rows))
    return {name: Positions.join(found) for name, found in parts.items()}


class _Predicted:
    """What an artifact predicts at some positions: logits [n, V] in float64, and exp() of them under their largest."""

    def __init__(self, logits: F32) -> None:
        self.logits = logits.astype(np.float64)
        top = self.logits.max(axis=1, keepdims=True)
        self.shift = np.where(np.isfinite(top), top, 0)  # [n, 1]
        self.mass = np.exp(self.logits - self.shift)
        with np.errstate(divide="ignore", invalid="ignore"):
            self.total = np.log(self.mass.sum(axis=1)) + self.shift[:, 0]
        self.likeliest = logits.argmax(axis=1)

    def tail(self, ids: npt.NDArray[np.int64]) -> F64:
        """log of the mass outside `ids` [n, k], as the logits have it; float64 [n].

        One minus the kept mass would cancel where the tail is small: what is left is summed.
        """
        kept = np.take_along_axis(self.mass, ids, axis=1)
        np.put_along_axis(self.mass, ids, 0, axis=1)
        left = self.mass.sum(axis=1)
        np.put_along_axis(self.mass, ids, kept, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            tail: F64 = np.log(left) + self.shift[:, 0]
        empty = (left == 0) & (ids.shape[1] < self.mass.shape[1])
        if empty.any():  # less than float64 has beside the largest
            rest = self.logits[empty]
            np.put_along_axis(rest, ids[empty], -np.inf, axis=1)
            tail[empty] = log_sum_exp(rest)
        return tail

    def against(self, reference: ReferenceLogits, rows: slice) -> Positions:
        ids = reference.top_ids[rows].astype(np.int64)  # [n, k]
        kept = np.take_along_axis(self.logits, ids, axis=1)
        targets = following(reference.tokens)[rows]
        artifact = np.take_along_axis(self.logits, targets.clip(0)[:, None], axis=1)[:, 0]
        with np.errstate(invalid="ignore"):
            artifact = np.where(targets < 0, np.nan, artifact - self.total)
        return Positions(
            kl=divergence(_with_tail(reference, rows), np.concatenate((kept, self.tail(ids)[:, None]), axis=1)),
            same_top=(self.likeliest == ids[:, 0]).astype(np.float64),
            reference=reference.target_logprob[rows].astype(np.float64),
            artifact=artifact,
            reference_right=_right(ids[:, 0], targets),
            artifact_right=_right(self.likeliest, targets),
        )


def _right(likeliest: npt.NDArray[Any], targets: npt.NDArray[np.int64]) -> F64:
    """1.0 where the likeliest token is the one that follows; NaN where none does."""
    return np.where(targets < 0, np.nan, (likeliest == targets).astype(np.float64))


def between(a: ReferenceLogits, b: ReferenceLogits) -> Positions:
    """Reference `b` in the artifact's place, against `a`: what a difference in arithmetic alone costs.

    The outcomes are the tokens that both keep, and "any other". Both must be of the same text.
    """
    if not np.array_equal(a.tokens, b.tokens):
        raise ValueError("references of different texts")
    vocab = int(max(a.top_ids.max(), b.top_ids.max())) + 1
    targets = following(a.tokens)
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
                reference_right=_right(ids_a[:, 0], targets[rows]),
                artifact_right=_right(ids_b[:, 0], targets[rows]),
            )
        )
    return Positions.join(parts)


def _with_tail(reference: ReferenceLogits, rows: slice) -> F64:
    """[n, k + 1]"""
    both = (reference.top_logprobs[rows], reference.tail_logprob[rows, None])
    return np.concatenate(both, axis=1).astype(np.float64)


def summary(positions: Positions, seed: int = 0) -> dict[str, Any]:
    """The figures of a report; None for what is not a finite number.

    kl_ci95 is a bootstrap interval of the mean over runs of 64 positions, or of fewer on a short text.
    delta_p_rms is the root mean square change of the probability of the token that follows; ppl_ratio is the artifact's
    perplexity over the reference's on the same tokens. flips is the share of positions where only one of
    the two is right about that token (Dutta et al. 2024, arXiv 2407.09141), to_wrong and to_right their
    counts, flips_p McNemar's exact probability of counts as uneven.
    """
    kl = positions.kl
    follows = ~np.isnan(positions.reference)
    reference, artifact = positions.reference[follows], positions.artifact[follows]
    if not follows.any():  # a text of single tokens: no mean of nothing
        reference = artifact = np.full(1, np.nan)
    was, now = positions.reference_right[follows] == 1, positions.artifact_right[follows] == 1
    to_wrong, to_right = int((was & ~now).sum()), int((now & ~was).sum())
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
            "flips": (to_wrong + to_right) / follows.sum() if follows.any() else np.nan,
            "flips_p": mcnemar(to_wrong, to_right),
        }
    finite = {name: float(value) if np.isfinite(value) else None for name, value in figures.items()}
    interval = [low, high] if np.isfinite(low + high) else None
    flips = {"flips_to_wrong": to_wrong, "flips_to_right": to_right}
    return {"positions": len(kl), **finite, **flips, "kl_ci95": interval}


def flips(wanted: U16, found: U16, windows: Positions) -> dict[str, Any]:
    """How many choices of experts differ as sets; wanted and found uint16 [layers, N, top_k], each ascending.

    A choice is one token in one layer. `windows` has the KL of each of the N positions: its mean is
    given for those where no layer chose otherwise, and for the rest; None where there are none.
    """
    if wanted.shape == found.shape:
        differs = (wanted != found).any(axis=2)  # [layers, N]
    else:  # another number of experts
        differs = np.ones(wanted.shape[:2], bool)
    somewhere = differs.any(axis=0)  # [N]
    kept, flipped = windows.kl[~somewhere], windows.kl[somewhere]
    return {
        "flips": int(differs.sum()),
        "share": float(differs.mean()),
        "positions": int(somewhere.sum()),
        "kl_mean_without_flips": _mean(kept),
        "kl_mean_with_flips": _mean(flipped),
    }


def _mean(values: F64) -> float | None:
    """None where there is none, or it is not finite."""
    mean = float(values.mean()) if len(values) else np.nan
    return mean if np.isfinite(mean) else None


def bootstrap_mean(values: F64, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean, by drawing runs of neighbouring values with replacement."""
    block = max(1, min(_BLOCK, len(values) // _RUNS))
    sums = np.add.reduceat(values, np.arange(0, len(values), block))
    counts = np.full(len(sums), float(block))
    counts[-1] = len(values) - block * (len(sums) - 1)
    draws = np.random.default_rng(seed).integers(0, len(sums), (_RESAMPLES, len(sums)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
