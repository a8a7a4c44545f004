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
        self.records, self._end = _read(path)
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


def read_records(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal that somebody else may be writing."""
    return _read(path)[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines before the first that is not whole, and their length in bytes."""
    records: list[dict[str, Any]] = []
    end = 0
    for line in path.read_bytes().splitlines(keepends=True):
        record = _parsed(line)
        if record is None:
            break  # torn by a crash, or zeros after a power loss: what follows it cannot be trusted
        records.append(record)
        end += len(line)
    return records, end


def _parsed(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:  # not UTF-8 either
        return None
    return record if isinstance(record, dict) else None
