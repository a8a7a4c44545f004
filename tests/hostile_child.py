"""A process that opens one artifact after another, under a limit of memory, and says what came of each.

A line of JSON in: {"path": ..., "whole": whether all its weights are read}. A line out: {"end": "read"}, or the kind of
error with its message and hint. Three paths are for testing the watch itself: hang, eat (memory) and die.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

from exporter.checkpoint import open_checkpoint
from exporter.errors import ExporterError
from exporter.pipeline.foreign import open_foreign
from exporter.pipeline.progress import Progress
from exporter.pipeline.weights import compare_weights
from tests.conftest import DEMO

MORE = 500 << 20  # bytes of address space beside what the libraries take


def limit_memory() -> None:
    """No more than MORE from here on."""
    import gguf.quants  # noqa: F401  loaded now, so that it does not count

    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    size = int(fields["VmSize"].split()[0]) * 1024 + MORE
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def outcome(path: Path, whole: bool) -> dict[str, str]:
    try:
        if str(path) in ("hang", "eat", "die"):
            misbehave(str(path))
        foreign = open_foreign(path)
        try:
            if foreign.read is not None and whole:
                with open_checkpoint(DEMO) as checkpoint:
                    found = compare_weights(foreign, checkpoint, 1, Progress())
                json.dumps(found, allow_nan=False)
                return {"end": "read", "problems": " | ".join(found["problems"])}
        finally:
            foreign.close()
    except ExporterError as error:
        return {"end": type(error).__name__, "message": error.message, "hint": error.hint or ""}
    except BaseException as error:
        return {"end": "raised", "message": f"{type(error).__name__}: {error}", "hint": ""}
    return {"end": "read", "problems": ""}


def misbehave(how: str) -> None:
    if how == "hang":
        time.sleep(3600)
    if how == "die":
        os.abort()
    bytearray(2 * MORE)


def main() -> None:
    limit_memory()
    print(json.dumps({"end": "ready"}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(outcome(Path(asked["path"]), asked["whole"])), flush=True)


if __name__ == "__main__":
    main()
