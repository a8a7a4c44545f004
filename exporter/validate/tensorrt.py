"""Proves on a machine without a GPU that TensorRT for RTX builds a graph, each engine in a child process."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.validate import child, tensorrt_worker
from exporter.validate.child import OnProgress, WorkerDied

# Of each input whose shape the graph leaves open: the smallest, the most usual and the largest.
Shapes = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]


def version() -> str:
    """The release of TensorRT-RTX that is installed. Raises MissingExtra, or Refused for one that we do not know."""
    from importlib import metadata, util

    # Not imported: that maps 180 MB into this process.
    try:
        if util.find_spec("tensorrt_rtx") is None:
            raise tensorrt_worker.missing()
        installed = metadata.version(tensorrt_worker.PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise tensorrt_worker.missing() from error
    tensorrt_worker.require_known(installed)
    return installed


def build(
    graph: Path,
    shapes: Shapes,
    sm: int,
    *,
    time_limit: float,
    memory_limit: int,
    keep: Path | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Parse `graph` and build it for one compute capability (89 for SM89), within seconds and resident bytes.

    What came of it: "sm", "version", "built"; if built, "layers", "parse_seconds", "build_seconds",
    "engine_bytes" and what `tensorrt_facts.compare` gives; if not, "error", one line: what the parser or the builder
    says, a crash, a limit. "cpu_seconds" and "peak_rss_bytes" of the child unless it died. `keep`: a file for
    the engine. Raises as `version` does, and for nothing else that is about this graph.
    """
    installed = version()
    request = tensorrt_worker.Request(
        graph=str(graph.absolute()),
        shapes={name: [list(s) for s in three] for name, three in shapes.items()},
        sm=sm,
        keep=str(keep.absolute()) if keep else "",
    )
    try:
        return child.run_worker(
            request,
            "exporter.validate.tensorrt_worker",
            time_limit,
            runtime=f"TensorRT-RTX {installed}",
            subject=f"{graph.name} for SM{sm}",
            on_progress=on_progress,
            memory_limit=memory_limit,
        )
    except WorkerDied as died:
        return {"sm": sm, "version": installed, "built": False, "error": died.message}
    finally:
        if keep:
            with contextlib.suppress(OSError):  # a folder that cannot be written has none
                tensorrt_worker.partial_file(keep).unlink(missing_ok=True)


def gpu() -> tuple[str, int] | None:
    """Name and compute capability (89 for 8.9) of the first NVIDIA GPU, as nvidia-smi says; None without one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = (tool, "--query-gpu=name,compute_cap", "--format=csv,noheader")
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        name, _, capability = said.splitlines()[0].rpartition(", ")
        return (name, int(capability.replace(".", ""))) if name else None
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None
