"""data.bin of a store: codes, scales and zeros of every leaf, each at an offset that follows from the plan alone.

So several machines can write one file at the same time, each its own leaves, without a word between them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from exporter.errors import ExporterError
from exporter.pipeline.files import reserve, write_at
from exporter.types import QTensor, leaf_range
from exporter.types.recipe import Step

Access = Literal["make", "write", "read"]
_FLAGS = {"make": os.O_RDWR | os.O_CREAT, "write": os.O_RDWR, "read": os.O_RDONLY}


class StoreData:
    """The leaves of `steps` in `folder`/data.bin. `access`: only "make" creates the file and gives it its size."""

    def __init__(self, folder: Path, steps: Sequence[Step], access: Access) -> None:
        self.path = folder / "data.bin"
        self._offsets, size = _offsets(steps)
        self.descriptor = os.open(self.path, _FLAGS[access], 0o644)
        if access == "make":
            reserve(self.descriptor, size)

    def write(self, step: Step, leaf: int, q: QTensor) -> None:
        """Put a leaf in its place; may be called from several threads."""
        parts = [part for part in (q.data, q.scales, q.zeros) if part is not None]
        flat = [np.ascontiguousarray(part).view(np.uint8).reshape(-1) for part in parts]
        write_at(self.descriptor, flat, self.offset(step, leaf))

    def read(self, step: Step, leaf: int) -> QTensor:
        """A leaf that was written. Raises ExporterError where the file ends before it does."""
        scheme, k = step.scheme, step.spec.shape[-1]
        start, stop = leaf_range(step.spec.shape, leaf)
        lead = (stop - start, *step.spec.shape[1:-1]) if len(step.spec.shape) > 1 else ()
        rows = int(np.prod(lead, dtype=np.int64))
        raw = os.pread(self.descriptor, rows * scheme.row_bytes(k), self.offset(step, leaf))
        if len(raw) != rows * scheme.row_bytes(k):
            raise ExporterError(f"{self.path} is cut short", hint=f"delete {self.path.parent} and run again")
        buffer = np.frombuffer(raw, np.uint8)
        n_data, n_scales = rows * scheme.data_bytes(k), rows * scheme.scale_bytes(k)
        data = buffer[:n_data].reshape(*lead, -1)
        if scheme.kind == "float":
            return QTensor(step.name, scheme, data)
        scales = buffer[n_data : n_data + n_scales]
        typed: np.ndarray[Any, Any] = scales if scheme.scale == "e8m0" else scales.view(np.float16)
        zeros = None if scheme.symmetric else buffer[n_data + n_scales :].reshape(*lead, -1)
        return QTensor(step.name, scheme, data, typed.reshape(*lead, -1), zeros)

    def close(self) -> None:
        os.close(self.descriptor)

    def offset(self, step: Step, leaf: int) -> int:
        """Where a leaf begins in the file, bytes."""
        start = leaf_range(step.spec.shape, leaf)[0]
        return self._offsets[step.name] + start * (step.stored_bytes // step.spec.shape[0])


def _offsets(steps: Sequence[Step]) -> tuple[dict[str, int], int]:
    at, offsets = 0, {}
    for step in steps:
        if not step.by_reference:
            offsets[step.name] = at
            at += -(-step.stored_bytes // 64) * 64
    return offsets, at
