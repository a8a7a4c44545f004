"""Rotary embedding frequencies of gpt-oss: YaRN (Peng et al. 2023, arXiv 2309.00071), or plain."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from exporter.model.config import RopeConfig
from exporter.numerics.floats import F32

F64 = npt.NDArray[np.float64]


def correction_range(rope: RopeConfig, head_dim: int) -> tuple[float, float]:
    """The pair indices between which YaRN goes from the original to the stretched frequency.

    8.09 and 17.40 for gpt-oss, whose release says `truncate: false`; 8 and 18 where a runtime
    rounds outward (llama.cpp's ggml_rope_yarn_corr_dims always does).
    """

    def dimension(turns: float) -> float:
        return head_dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / log_theta

    log_theta = 2 * math.log(rope.theta)
    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, head_dim - 1)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> F32:
    """Radians per position of each pair, float32 [head_dim / 2].

    Computed in float64 and rounded once: at position 131072 one unit in the last place of a
    frequency is already 0.005 rad, so errors must not pile up.
    """
    pair = np.arange(head_dim // 2, dtype=np.float64)
    plain = rope.theta ** (-2 * pair / head_dim)
    if rope.kind == "default":
        return plain.astype(np.float32)
    low, high = correction_range(rope, head_dim)
    stretched = np.clip((pair - low) / max(high - low, 0.001), 0, 1)  # 0: as trained, 1: interpolated
    return (plain * (1 - stretched) + plain / rope.factor * stretched).astype(np.float32)


def attention_factor(rope: RopeConfig) -> float:
    """What cos and sin are multiplied by: 0.1 ln(factor) + 1 for YaRN (1.3466 for gpt-oss)."""
    return 0.1 * math.log(rope.factor) + 1 if rope.kind == "yarn" and rope.factor > 1 else 1.0


def rotation_table(wave: Callable[[F64], F64], rope: RopeConfig, head_dim: int, length: int) -> F32:
    """`wave` (np.cos, np.sin) of positions 0 ... length - 1, attention factor included, float32 [length, head_dim / 2].

    Angles are rounded to float32 as the released code rounds them (at position 131071 that is up to 0.004 rad),
    their cosines or sines once more, from float64.
    """
    angles = np.arange(length, dtype=np.float32)[:, None] * inverse_frequencies(rope, head_dim)
    return (wave(angles.astype(np.float64)) * attention_factor(rope)).astype(np.float32)
