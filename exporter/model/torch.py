"""torch, imported when it is needed."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

from exporter.errors import MissingExtra
from exporter.numerics.floats import F32

if TYPE_CHECKING:
    from torch import Tensor


@functools.cache
def import_torch() -> Any:
    """The torch module. Raises MissingExtra."""
    # Threads that wait for work give their processor up. By default they spin, and beside any other busy process
    # a small operation then takes ten times as long. Read once, when torch loads its OpenMP.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        import torch
    except ModuleNotFoundError as missing:
        raise MissingExtra("torch", "validate", "the reference forward") from missing
    return torch


def as_tensor(rows: F32, device: str) -> Tensor:
    """`rows` on the device; copied where the array is read-only, which torch must not share."""
    rows = rows if rows.flags.writeable else rows.copy()
    tensor: Tensor = import_torch().from_numpy(rows).to(device)
    return tensor
