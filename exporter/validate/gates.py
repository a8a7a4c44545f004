"""Measured values against a profile's limits. What was not measured never passes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from exporter.errors import UsageError, did_you_mean
from exporter.types.gates import GATES, GateKind, Verdict


def evaluate(report: Mapping[str, Any], limits: Mapping[str, float | bool]) -> list[Verdict]:
    """One verdict for each limit, in their order. Raises UsageError for a gate that does not exist."""
    verdicts = []
    for name, limit in limits.items():
        if name not in GATES:
            raise UsageError(f'unknown gate "{name}".{did_you_mean(name, GATES)}', hint=f"gates: {', '.join(GATES)}")
        value = _measured(report, GATES[name])
        passed = value is not None and _passes(GATES[name], value, limit)
        note = _below_noise(report, GATES[name], limit)
        verdicts.append(Verdict(name, value, limit, passed and not note, note))
    return verdicts


def _below_noise(report: Mapping[str, Any], gate: GateKind, limit: float | bool) -> str:
    """Why no artifact can be held to this limit, or ""."""
    floor = report.get("floor")
    if not gate.floor or not isinstance(floor, Mapping) or not isinstance(floor.get("kl_mean"), float):
        return ""
    if limit >= floor["kl_mean"]:
        return ""
    return f"the limit is below the noise floor: {floor['kl_mean']:.2g} nats is what {floor['what']} has"


def _measured(report: Mapping[str, Any], gate: GateKind) -> float | bool | None:
    """The gate's value in the report; None for a missing one, NaN, infinity or another type."""
    value: Any = report
    for key in gate.metric.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or (isinstance(value, int | float) and math.isfinite(value)):
        return value
    return None


def _passes(gate: GateKind, value: float | bool, limit: float | bool) -> bool:
    if gate.sense == "equal":
        return type(value) is type(limit) and value == limit
    if isinstance(value, bool) or isinstance(limit, bool):
        return False  # True <= 1 holds in Python, and means nothing here
    return value <= limit if gate.sense == "max" else value >= limit
