"""What a proof says of accuracy, in the same words for every format: by text, by part of a conversation, by depth.

A runtime is asked for more than the windows of plain text (`Further`); what it found is laid out here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from exporter.model.reference import I64, U16, ReferenceLogits
from exporter.validate import twins
from exporter.validate.metrics import Positions, between, summary

PLAIN, CONVERSATIONS, LONG = "plain", "conversations", "long"
_QUANTILES = (0.0, 0.01, 0.05, *(i / 10 for i in range(1, 10)), 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 1.0)
_BINS = 64


@dataclass(frozen=True, eq=False)
class Column:
    """One text. parts: of each token, harmony.labels; None where it is no conversation.

    runtime: what the reference says where it computes as the runtime does; None where that is no difference.
    """

    name: str
    source: str
    reference: ReferenceLogits
    parts: Sequence[str] | None = None
    runtime: ReferenceLogits | None = None

    def references(self) -> dict[str, ReferenceLogits]:
        """By name, as the report has them."""
        return {"release": self.reference} | ({} if self.runtime is None else {"export": self.runtime})


@dataclass(frozen=True, eq=False)
class Further:
    """What is asked of a runtime beside the windows of plain text.

    window: keys that a sliding layer sees; trained: length that the rope was made for. columns: other texts. twins:
    known mistakes by name, of the first windows; base: the reference itself there; floor: it in bfloat16 there.
    routes: experts of the windows' tokens, None where nobody asks. prompts, answers: what the reference goes on with,
    `answer` tokens at most, up to one of `ends`. not_run: what there is none of, and why.
    """

    window: int
    trained: int
    source: str
    columns: Sequence[Column]
    twins: Mapping[str, ReferenceLogits]
    base: ReferenceLogits
    floor: ReferenceLogits | None
    routes: U16 | None
    prompts: list[list[int]]
    answers: list[list[int]]
    answer: int
    ends: frozenset[int]
    not_run: Mapping[str, str]

    def question(self, folder: Path) -> dict[str, Any]:
        """The part of a worker's request, with references laid into `folder`: columns, twins, prompts, answer, ends."""
        columns: dict[str, dict[str, str]] = {}
        for column in self.columns:
            columns[column.name] = {}
            for name, logits in column.references().items():
                path = folder / f"column-{column.name}-{name}.npz"
                logits.save(path)
                columns[column.name][name] = str(path)
        beside: dict[str, str] = {}
        for number, (name, logits) in enumerate(self.twins.items()):
            path = folder / f"twin-{number}.npz"
            logits.save(path)
            beside[twins.PREFIX + name] = str(path)
        asked = {"prompts": self.prompts, "answer": self.answer, "ends": sorted(self.ends)}
        return {"columns": columns, "twins": beside, **asked}


def further_report(
    further: Further,
    plain: tuple[ReferenceLogits, Positions],
    found: Mapping[str, Mapping[str, Positions]],
    base: Positions | None,
    beside: Mapping[str, Positions],
    answers: Sequence[Sequence[int]] | None,
) -> dict[str, Any]:
    """accuracy, twins, floor and generation of a report.

    plain: the windows and how they compare with the release. found: by column and name of its reference. base, beside:
    the first windows with the reference that the twins are of, and with each twin. answers: of the prompts, None where
    nobody was asked.
    """
    reference, positions = plain
    report: dict[str, Any] = {"accuracy": {}}
    for column in further.columns:
        if column.name in found:
            report["accuracy"][column.name] = _column(further, column, found[column.name])
    report["accuracy"][PLAIN] = _column(further, Column(PLAIN, further.source, reference), {"release": positions})
    if further.twins and base is not None:
        n = len(next(iter(beside.values())).kl)
        report["twins"] = twins.judge(base.take(slice(0, n)).kl, {name: p.kl for name, p in beside.items()})
    if further.floor is not None:
        noise = between(further.base, further.floor)
        what = "the reference in bfloat16 against itself in float32"
        report["floor"] = {"kl_mean": float(noise.kl.mean()), "top1": float(noise.same_top.mean()), "what": what}
    if answers is not None and further.prompts:
        report["generation"] = generation(further.answers, answers, further.answer, further.ends)
        if "length_difference" not in report["generation"]:
            why = f"none of the reference's answers ended within {further.answer} tokens"
            report["not_run"] = {"generation.length_difference": why}
    return report


def _column(further: Further, column: Column, found: Mapping[str, Positions]) -> dict[str, Any]:
    tokens, positions = column.reference.tokens, found["release"]
    at = np.tile(np.arange(tokens.shape[1]), len(tokens))
    written = np.ones(tokens.size, bool) if column.parts is None else _predicted(column.parts, tokens) != ""
    own, where = positions.take(written), at[written]
    digest = hashlib.sha256(np.ascontiguousarray(tokens, "<i8").tobytes()).hexdigest()
    block: dict[str, Any] = {"source": column.source, "sha256": digest, "tokens": int(tokens.size)}
    if not len(own.kl):  # a conversation in which the assistant says nothing
        return block
    block["all"] = summary(own)
    block["as_runtime"] = summary(found["export"].take(written)) if "export" in found else block["all"]
    if column.parts is not None:
        labels = _predicted(column.parts, tokens)
        names = [name for name in dict.fromkeys(labels.tolist()) if name]
        block["channels"] = {name: summary(positions.take(labels == name)) for name in names}
    depths = {
        "within the window": where < further.window,
        "past the window": (where >= further.window) & (where < further.trained),
        f"past {further.trained:,}": where >= further.trained,
    }
    block["depths"] = {name: summary(own.take(mask)) for name, mask in depths.items() if mask.any()}
    finite = own.kl[np.isfinite(own.kl)]
    if len(finite):
        block["curve"] = [[q, float(np.quantile(finite, q))] for q in _QUANTILES]
        block["by_position"] = _by_position(own.kl, where, tokens.shape[1])
    return block


def _predicted(parts: Sequence[str], tokens: I64) -> npt.NDArray[np.str_]:
    """The part of the token that each position predicts; "" at the end of a window. [W * T]"""
    labels = np.array(parts, dtype=np.str_).reshape(tokens.shape)
    out = np.full(tokens.shape, "", dtype=labels.dtype)
    out[:, :-1] = labels[:, 1:]
    return out.reshape(-1)


def _by_position(kl: npt.NDArray[np.float64], where: npt.NDArray[np.int64], length: int) -> list[list[float]]:
    """[first position, mean KL] of `_BINS` runs of positions at most."""
    step = -(-length // _BINS)
    bins = where // step
    return [[int(b * step), float(kl[bins == b].mean())] for b in np.unique(bins) if np.isfinite(kl[bins == b]).all()]


def generation(
    wanted: Sequence[Sequence[int]], found: Sequence[Sequence[int]], tokens: int, ends: frozenset[int]
) -> dict[str, Any]:
    """How an artifact's likeliest text compares with the reference's, prompt by prompt; lengths in tokens.

    agreement is the mean share of the longer answer's tokens before the first that differs. length_ratio and
    length_difference only where one of the reference's answers ended by itself: else all are as long as they may be.
    """
    pairs = list(zip(wanted, found, strict=True))
    shares = [_common(a, b) / max(len(a), len(b)) for a, b in pairs]
    lengths = [float(np.mean([len(each) for each in some])) for some in (found, wanted)]
    ended = [float(np.mean([bool(each) and each[-1] in ends for each in some])) for some in (found, wanted)]
    figures: dict[str, Any] = {
        "prompts": len(pairs),
        "tokens": tokens,
        "agreement": float(np.mean(shares)),
        "same": float(np.mean([list(a) == list(b) for a, b in pairs])),
        "length": lengths[0],
        "length_reference": lengths[1],
        "ended": ended[0],
        "ended_reference": ended[1],
    }
    if ended[1] > 0:
        figures |= {"length_ratio": lengths[0] / lengths[1], "length_difference": abs(lengths[0] / lengths[1] - 1)}
    return figures


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
