"""An append-only list of JSON lines that says what is done; a damaged end costs only what it said."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.pipeline.files import write_all


class Journal:
    """`records` are the lines that were whole when it was opened. `append` may be called from any thread."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._lock = threading.Lock()
        self.records: list[dict[str, Any]] = []
        with open(path, "rb") as f:
            raw = f.read()
        self._end = 0
        for line in raw.splitlines(keepends=True):
            record = _parsed(line)
            if record is None:
                break  # torn by a crash, or zeros after a power loss: what follows it cannot be trusted
            self.records.append(record)
            self._end += len(line)
        os.ftruncate(self.descriptor, self._end)

    def append(self, record: Mapping[str, Any]) -> None:
        """Commit one line, whole or not at all."""
        line = json.dumps(record).encode() + b"\n"
        with self._lock:
            try:
                write_all(self.descriptor, line)
            except OSError:
                os.ftruncate(self.descriptor, self._end)  # half a line would spoil the next one
                raise
            self._end += len(line)

    def close(self) -> None:
        os.close(self.descriptor)


def _parsed(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:  # not UTF-8 either
        return None
    return record if isinstance(record, dict) else None
