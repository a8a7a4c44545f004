"""The part of a proof that onnxruntime-genai gives: the folder as chat programs run it.

Its graph is the plain one but for the cache, and its kernels are the same, so beside the reference it is
compared with the plain graph as shipped: there the rounding of weights and activations cancels out.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import ExporterError
from exporter.validate import child, genai_worker
from exporter.validate import text as texts
from exporter.validate.child import OnProgress
from exporter.validate.limits import Limit
from exporter.validate.metrics import Positions, summary
from exporter.validate.runtime import compare_ids
from exporter.validate.speed import FIGURES

# What onnxruntime-genai says when it was built, or installed, without a provider.
_NO_PROVIDER = ("not supported in this build", "interface not available", "cannot open shared object")


@dataclass(frozen=True)
class Chat:
    """A conversation, and how the checkpoint's template renders it."""

    messages: list[dict[str, str]]
    rendered: str


@dataclass(frozen=True, eq=False)
class Plain:
    """What the plain graph found as shipped: `positions` of the same windows and decoding; its greedy tokens."""

    positions: Positions
    greedy: list[int]


def few(positions: Positions) -> dict[str, Any]:
    """The figures of positions of one window: too few runs of them for an interval."""
    figures = summary(positions)
    del figures["kl_ci95"]
    return figures


def run_genai(
    request: genai_worker.Request, time_limit: float, on_progress: OnProgress | None, limit: Limit | None = None
) -> dict[str, Any]:
    return child.run_worker(
        request,
        "exporter.validate.genai_worker",
        time_limit,
        runtime="onnxruntime-genai",
        subject=Path(request.folder).name,
        on_progress=on_progress,
        limit=limit,
    )


def in_genai(
    asked: genai_worker.Request,
    tokenizer: Any,
    chat: Chat | str,
    plain: Plain,
    not_run: dict[str, str],
    time_limit: float,
    on_progress: OnProgress | None,
    limit: Limit | None = None,
) -> dict[str, Any]:
    """{"genai": ...}; empty, with the reason in `not_run`, where this runtime lacks the device.

    Keys: kl_mean of all positions against the reference, difference of that KL from `plain`'s, prefill and
    cached figures apart; tokenizer_equal, tokenizer, chat_equal, chat; greedy, beside `plain`'s; speed; memory.
    """
    try:
        answer = run_genai(asked, time_limit, on_progress, limit)
    except ExporterError as error:
        if asked.provider != "cpu" and any(reason in error.message for reason in _NO_PROVIDER):
            not_run["genai"] = error.message
            return {}
        raise
    with np.load(asked.results, allow_pickle=False) as results:
        prefill, cached = (Positions.of(results, name) for name in ("prefill", "cached"))
    both = Positions.join([prefill, cached])
    apart = np.abs(both.kl - plain.positions.kl).mean()
    pieces = asked.pieces or []
    ids = compare_ids(pieces, [texts.encode(tokenizer, p) for p in pieces], answer["ids"])
    common = min(len(plain.greedy), len(answer["greedy_ids"]))
    first = next((i for i in range(common) if plain.greedy[i] != answer["greedy_ids"][i]), None)
    report: dict[str, Any] = {
        "version": answer["version"],
        "provider": asked.provider or "as configured",
        "kl_mean": summary(both)["kl_mean"],
        "difference": float(apart) if math.isfinite(apart) else None,
        "prefill": few(prefill),
        "cached": {"prefill": asked.prefill, "steps": asked.steps, **few(cached)},
        "tokenizer_equal": ids["first_difference"] is None,
        "tokenizer": {**ids, "left_out": "texts with a NUL, at which its encode stops"},
        "greedy": {"tokens": common, "first_difference": first, "text": answer["greedy_text"]},
        "speed": {
            "load_seconds": answer["load_seconds"],
            "decode_tokens_per_second": answer["decode_tokens_per_second"],
            "decode_runs": answer["decode_runs"],
            **{key: answer[key] for key in FIGURES if key in answer},
        },
        "memory": answer["memory"],
    }
    if isinstance(chat, str):
        not_run["genai.chat_equal"] = chat
    else:
        said = answer["chat"]
        report["chat"] = said if "error" in said else {"expected": chat.rendered, "found": said["text"]}
        # A template may ask for the day; ours is always the same one.
        report["chat_equal"] = "text" in said and _dateless(said["text"]) == _dateless(chat.rendered)
    return {"genai": report}


def _dateless(rendered: str) -> str:
    return re.sub(r"\b\d{4}-\d{2}-\d{2}\b", "YYYY-MM-DD", rendered)
