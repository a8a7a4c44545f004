"""Which computation an artifact follows: the released one, or the same weights with one known mistake.

A window one key short changes a prediction less than rounding to 8 bits does, so no limit on the divergence from the
reference shows it. But the divergence from the reference *with that mistake* does: token by token, an artifact without
it is nearer to the reference, one with it nearer to its twin. What is counted is the share of tokens at which it is
nearer to the reference: a few large divergences do not sway that. The interval of that share must lie above one half.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from exporter.model.config import ModelConfig, RopeConfig, Variant
from exporter.validate.metrics import F64, bootstrap_mean

FLOOR = "in bfloat16"
RELEASED = "as released"
PREFIX = "twin: "  # of a twin's name among a worker's references


def twins(config: ModelConfig, rope: RopeConfig, length: int = 0) -> dict[str, Variant]:
    """Known mistakes by name, of a model that is computed with `rope`; those that a text of `length` tokens can show.

    Inside the window a twin of another one is the release itself. length 0: a text of any length.
    """
    window = config.sliding_window
    found = {
        f"window of {window - 1}": Variant(rope, window=window - 1),
        f"window of {window + 1}": Variant(rope, window=window + 1),
        "no window": Variant(rope, window=config.max_position_embeddings),
        "no sinks": Variant(rope, sinks=False),
        "gate and up swapped": Variant(rope, swapped=True),
    }
    if config.layer_types.count("sliding_attention") == 0 or window < 2 or 0 < length <= window:
        found = {name: twin for name, twin in found.items() if "window" not in name}
    if rope.kind == "yarn":
        found["no YaRN"] = Variant(replace(rope, kind="default"))
        if not rope.truncate:
            found["YaRN range rounded"] = Variant(replace(rope, truncate=True))
    return found


def judge(released: F64, others: Mapping[str, F64]) -> dict[str, Any]:
    """Whether an artifact follows the release; `released`, `others`: KL of it from each, nats [n], on the same tokens.

    share: of the positions, those where it is nearer to the release than to the twin, with a 95 % interval; where both
    are equally near (a twin of another window, inside that window), half. passed: every interval is above one half.
    nearest: what it is nearest to by that count; nearest_is_released: whether that is the release, for an artifact that
    lost so much that intervals are wide.
    """
    each: list[dict[str, Any]] = []
    for name, kl in others.items():
        nearer = kl - released
        if not np.isfinite(nearer).all():
            each.append({"name": name, **dict.fromkeys(("kl_mean", "nearer_by", "share", "ci95"))})
            continue
        sides = (np.sign(nearer) + 1) / 2
        found = {"kl_mean": float(kl.mean()), "nearer_by": float(nearer.mean()), "share": float(sides.mean())}
        each.append({"name": name, **found, "ci95": list(bootstrap_mean(sides))})
    measured = [e for e in each if e["share"] is not None]
    closest = min(measured, key=lambda e: e["share"], default=None)
    passed = bool(measured) and len(measured) == len(each) and all(e["ci95"][0] > 0.5 for e in measured)
    nearest = closest["name"] if closest is not None and closest["share"] < 0.5 else RELEASED
    closer = bool(measured) and len(measured) == len(each) and nearest == RELEASED
    return {"nearest": nearest, "nearest_is_released": closer, "passed": passed, "each": each}
