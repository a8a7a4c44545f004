"""Which steps go into which file: whole layers, so that a reader of one layer opens one file."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from exporter.types.recipe import Step


def groups(steps: Sequence[Step], limit: int, nbytes: Callable[[Step], int]) -> list[list[Step]]:
    """Steps of each file, none above `limit` bytes unless one layer alone is; 0: all in one."""
    found: list[list[Step]] = [[]]
    used = 0
    for unit in _units(steps):
        n = sum(nbytes(step) for step in unit)
        if limit and found[-1] and used + n > limit:
            found.append([])
            used = 0
        found[-1] += unit
        used += n
    return found


def _units(steps: Sequence[Step]) -> list[list[Step]]:
    """Runs of steps of one layer; what belongs to none is on its own."""
    units: list[list[Step]] = []
    for step in steps:
        if units and step.spec.layer is not None and units[-1][0].spec.layer == step.spec.layer:
            units[-1].append(step)
        else:
            units.append([step])
    return units
