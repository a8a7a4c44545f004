"""Reads every tensor of a checkpoint and looks for numbers that no trained model has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from exporter.checkpoint.findings import Findings, Level
from exporter.checkpoint.source import Checkpoint
from exporter.numerics.e2m1 import SCALE_NAN
from exporter.types import QTensor, TensorSpec, leaves

# Beyond float16's range: runtimes that compute in half precision would turn it into infinity.
ABSURD = 65504.0
_DAMAGED = "the file is damaged or the training run diverged: take the weights again from their source"
_MERGE = "an incomplete merge or conversion often leaves this: repeat it, or take the source's tensor"

# Exponent bits (all set means infinity or NaN) and everything but the sign, by storage type.
_MASKS: dict[str, tuple[Any, int, int]] = {
    "bf16": (np.uint16, 0x7F80, 0x7FFF),
    "f16": (np.uint16, 0x7C00, 0x7FFF),
    "f32": (np.uint32, 0x7F800000, 0x7FFFFFFF),
}


@dataclass
class _Tally:
    """What the leaves of one tensor have shown so far."""

    broken: int = 0  # NaN or infinite numbers
    nan_scales: int = 0
    largest: float = 0.0
    first: bytes | None = None  # the first number as stored, until another one is seen
    constant: bool = True
    zero: bool = True
    zero_experts: list[int] = field(default_factory=list)
    zero_rows: int = 0
    digests: dict[bytes, int] = field(default_factory=dict)
    twins: list[tuple[int, int]] = field(default_factory=list)


def examine(checkpoint: Checkpoint, findings: Findings, on_progress: Callable[[int, int], None] | None = None) -> None:
    """Read all tensors, a leaf at a time, and add what is damaged or suspicious to `findings`.

    `on_progress(done, total)` counts bytes of canonical tensors. Raises ExporterError when a file
    cannot be read.
    """
    total = sum(_stored_bytes(checkpoint, s) for s in checkpoint.specs)
    done = 0
    for spec in checkpoint.specs:
        if spec.role == "head" and checkpoint.head_is_tied:
            done += _stored_bytes(checkpoint, spec)
            continue
        tally = _Tally()
        for start, stop in leaves(spec.shape):
            q = checkpoint.read(spec.name, start, stop)
            look = _look_at_mxfp4 if q.scheme.kind == "e2m1" else _look_at_floats
            look(tally, q)
            if spec.role == "expert":
                _look_at_expert(tally, q, start)
            done += q.data.nbytes + (0 if q.scales is None else q.scales.nbytes)
            if on_progress is not None:
                on_progress(done, total)
        _judge(spec, tally, findings)


def _stored_bytes(checkpoint: Checkpoint, spec: TensorSpec) -> int:
    row = checkpoint.scheme(spec.name).row_bytes(spec.shape[-1])
    return spec.elements // spec.shape[-1] * row


def _look_at_floats(tally: _Tally, q: QTensor) -> None:
    word, exponent, magnitude = _MASKS[q.scheme.name]
    bits = q.data.view(word)
    size = bits & word(magnitude)
    broken = int(np.count_nonzero((bits & word(exponent)) == exponent))
    tally.broken += broken
    # Without its sign, a float's bits order as its value does.
    top = size.max() if not broken else size[(bits & word(exponent)) != exponent].max(initial=0)
    tally.largest = max(tally.largest, _number(np.array([top], word), q.scheme.name))
    tally.zero &= top == 0 and not broken
    _look_for_constant(tally, bits.reshape(-1, 1))


def _number(bits: npt.NDArray[Any], scheme: str) -> float:
    if scheme == "bf16":
        return float((bits.astype(np.uint32) << 16).view(np.float32)[0])
    return float(bits.view(np.float16 if scheme == "f16" else np.float32)[0])


def _look_at_mxfp4(tally: _Tally, q: QTensor) -> None:
    assert q.scales is not None
    scales = q.scales.view(np.uint8)
    tally.nan_scales += int(np.count_nonzero(scales == SCALE_NAN))
    # 0x77 drops both signs; 6 is the largest level, so 6 * 2^(s - 127) bounds a block.
    blocks = (q.data & 0x77).reshape(*scales.shape, 16)  # [..., K/32, 16]
    used = blocks.any(axis=-1)
    top = int(scales[used & (scales != SCALE_NAN)].max(initial=0))
    tally.largest = max(tally.largest, 6.0 * 2.0 ** (top - 127)) if used.any() else tally.largest
    tally.zero &= not used.any()
    _look_for_constant(tally, np.concatenate([q.data.reshape(-1, 16), scales.reshape(-1, 1)], axis=1))


def _look_for_constant(tally: _Tally, rows: npt.NDArray[Any]) -> None:
    """Whether every row so far [n, m] is the same bytes."""
    if not tally.constant:
        return
    first = rows[0].tobytes()
    tally.first = tally.first or first
    tally.constant = first == tally.first and bool((rows == rows[0]).all())


def _look_at_expert(tally: _Tally, q: QTensor, expert: int) -> None:
    """Zero rows and byte-equal experts. One leaf of an expert tensor is one expert, [1, N, bytes]."""
    if q.scheme.kind == "e2m1":
        rows = (q.data[0] & 0x77).any(axis=-1)
    else:
        word, _, magnitude = _MASKS[q.scheme.name]
        rows = (q.data[0].view(word) & word(magnitude)).any(axis=-1)
    if not rows.any():
        tally.zero_experts.append(expert)
        return
    tally.zero_rows += int(np.count_nonzero(~rows))
    twin = tally.digests.setdefault(q.leaf_digest(), expert)
    if twin != expert:
        tally.twins.append((twin, expert))


def _judge(spec: TensorSpec, tally: _Tally, findings: Findings) -> None:
    name = spec.name
    if tally.broken:
        findings.group("error", "NaN or infinity", f"{name} ({tally.broken:,} numbers)", _DAMAGED)
    if tally.nan_scales:
        where = f"{name} ({tally.nan_scales:,} blocks)"
        findings.group("error", "MXFP4 scale 255, which is NaN", where, _DAMAGED)
    if tally.largest > ABSURD:
        where = f"{name} (up to {tally.largest:.3g})"
        findings.group("warning", f"magnitudes above {ABSURD:g}, the end of float16", where, _DAMAGED)
    if tally.zero:
        level, what = _zero_verdict(spec)
        findings.group(level, what, name, _MERGE)
        return
    if tally.constant and spec.elements > 1 and not tally.broken:
        findings.group("warning", "every number is the same: not trained, or reset", name, _MERGE)
    if tally.zero_experts:
        experts = ", ".join(map(str, tally.zero_experts[:4])) + (", ..." if len(tally.zero_experts) > 4 else "")
        findings.group("error", "experts that are all zero", f"{name} (experts {experts})", _MERGE)
    if tally.zero_rows:
        where = f"{name} ({tally.zero_rows:,} rows)"
        findings.group("note", "rows of experts that are all zero", where)
    if tally.twins:
        a, b = tally.twins[0]
        more = f" and {len(tally.twins) - 1} more pairs" if len(tally.twins) > 1 else ""
        what = "experts that are equal byte for byte: a suspicious merge"
        findings.group("warning", what, f"{name} ({a} = {b}{more})", _MERGE)


def _zero_verdict(spec: TensorSpec) -> tuple[Level, str]:
    if spec.role in ("expert", "linear", "embedding", "head"):
        return "error", "weights that are all zero"
    if spec.name.endswith("router.weight"):
        return "error", "the router is all zero: every token would go to the same experts"
    if "norm" in spec.name:
        return "error", "a norm is all zero: its layer would see nothing"
    if spec.name.endswith("sinks"):
        return "warning", "attention sinks are all zero (as before training; released ones are not)"
    return "warning", "biases are all zero (as before training; released ones are not)"
