"""Builds one engine of TensorRT for RTX, in a process of its own: `python -m exporter.validate.tensorrt_worker`.

`child.py` says how it is asked and how it answers; the request is a `Request`. No GPU is needed: TensorRT-RTX
compiles for a compute capability that it is told (NVIDIA's documentation: "CPU-only AOT").
"""

from __future__ import annotations

import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import MissingExtra, Refused
from exporter.validate import child, tensorrt_facts
from exporter.validate.child import OnProgress

PACKAGE = "tensorrt_rtx_cu13"
OLDEST, BEYOND = (1, 7), (1, 8)  # releases whose engines tensorrt_facts reads, as in pyproject.toml
_SAID = 20  # errors kept of a build
_LONGEST = 300  # characters of a reason
_STAGES = 3


@dataclass(frozen=True)
class Request:
    """A graph, absolute; shapes of its inputs (smallest, most usual, largest); 89 for SM89; where to write, or ""."""

    graph: str
    shapes: dict[str, list[list[int]]]
    sm: int
    keep: str = ""


class _Failed(Exception):
    """Why this engine cannot be built, in one line."""


def missing() -> MissingExtra:
    return MissingExtra(PACKAGE, "tensorrt", "building engines")


def require_known(version: str) -> None:
    """Raises Refused for a release that is not 1.7."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if not OLDEST <= numbers < BEYOND:
        oldest, beyond = (".".join(map(str, v)) for v in (OLDEST, BEYOND))
        raise Refused(
            f"TensorRT-RTX {version} is installed; exporter reads the engines of {oldest}",
            hint=f"pip install '{PACKAGE}>={oldest},<{beyond}'",
        )


def run(request: Request, report: OnProgress) -> dict[str, Any]:
    """Parse, build, look into the engine. A graph that it does not build is an answer too."""
    answer: dict[str, Any] = {"sm": request.sm, "built": False}
    try:
        import tensorrt_rtx as trt
    except ImportError as error:
        raise missing() from error
    require_known(trt.__version__)
    try:
        answer |= {"version": trt.__version__, **_build(trt, request, report), "built": True}
    except _Failed as failure:
        answer["error"] = str(failure)
    return {**answer, "cpu_seconds": time.process_time(), "peak_rss_bytes": child.memory()["peak_rss_bytes"]}


def _build(trt: Any, request: Request, report: OnProgress) -> dict[str, Any]:
    report("parse", 0, _STAGES)
    log = _log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    started = time.perf_counter()
    _parse(trt, network, log, Path(request.graph))
    parse_seconds = time.perf_counter() - started
    weights = tensorrt_facts.read_weights(Path(request.graph))  # now: later the builder needs the memory
    report("build", 1, _STAGES)
    config = _configuration(trt, builder, network, log, request)
    started = time.perf_counter()
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise _Failed(_first(log.said, "the builder gives no reason"))
    build_seconds = time.perf_counter() - started
    report("look into it", 2, _STAGES)
    held = memoryview(engine)
    facts = tensorrt_facts.compare(weights, tensorrt_facts.read_plan(held))
    if request.keep:
        _write(held, Path(request.keep))
    return {
        "layers": network.num_layers,
        "parse_seconds": parse_seconds,
        "build_seconds": build_seconds,
        "engine_bytes": held.nbytes,
        **facts,
    }


def _log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps the first errors; TensorRT's own would print them."""

        def __init__(self) -> None:
            super().__init__()
            self.said: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR) and len(self.said) < _SAID:
                self.said.append(message)

    return Log()


def _parse(trt: Any, network: Any, log: Any, graph: Path) -> None:
    """From the file, not from bytes: weights beside it are found by its folder."""
    if not graph.is_file():
        raise _Failed(f"{graph} is missing")
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(str(graph)):
        return
    if not parser.num_errors:
        raise _Failed(_first(log.said, "the parser gives no reason"))
    # The last is where it stopped; before it may come what was only noticed.
    error = parser.get_error(parser.num_errors - 1)
    kind, said = error.node_operator(), error.desc()
    where = f"node {error.node_name()[:96] or error.node()} ({kind[:48]}): " if kind else ""
    if said in ("", "false"):
        said = error.code().name.lower().replace("_", " ")
    raise _Failed(where + _first([said], ""))


def _configuration(trt: Any, builder: Any, network: Any, log: Any, request: Request) -> Any:
    known = sorted(int(name[2:]) for name in trt.ComputeCapability.__members__ if re.fullmatch(r"SM\d+", name))
    if request.sm not in known:
        raise _Failed(f"TensorRT-RTX builds for SM{', SM'.join(map(str, known))}, not for SM{request.sm}")
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{request.sm}"), 0)
    inputs = {network.get_input(i).name for i in range(network.num_inputs)}
    if request.shapes:
        profile = builder.create_optimization_profile()
        for name, three in request.shapes.items():
            if name not in inputs:
                raise _Failed(f"shapes of {name[:96]}, which is no input of the graph")
            try:
                profile.set_shape(name, *three)
            except (ValueError, TypeError) as error:
                raise _Failed(f"shapes of {name[:96]}: {str(three)[:96]} is not three lists of numbers") from error
        if config.add_optimization_profile(profile) < 0:
            raise _Failed(_first(log.said, "it does not take these shapes"))
    return config


def _write(engine: memoryview, path: Path) -> None:
    """Whole or not at all."""
    partial = partial_file(path)
    with open(partial, "wb") as file:
        file.write(engine)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def partial_file(path: Path) -> Path:
    """Where an engine lies until it is complete."""
    return path.with_name(path.name + ".partial")


def _first(said: list[str], otherwise: str) -> str:
    """The first message in one line, without conditions and places in TensorRT's own source.

    "IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error (REASON. In function at /_src/file.cpp:271)",
    "Assertion failed: (condition): REASON".
    """
    line = " ".join((said or [otherwise])[0].split())
    line = re.sub(r" \(See https?://.*$", "", line)
    line = re.sub(r"\.? In \S+ at /_src/\S*$", "", line)
    line = re.sub(r"^\w+::\w+: Error Code \d+: [\w ]+ \(", "", line)
    line = re.sub(r"^\[\S+ \w+\] (?:\w+Exception: \S+ CHECK\(.*?\) failed\. )?", "", line)
    return re.sub(r"^.*Assertion failed: .*?: ", "", line)[:_LONGEST]


def main() -> int:
    if hasattr(os, "nice"):
        os.nice(10)
    return child.serve(lambda asked, report: run(Request(**asked), report))


if __name__ == "__main__":
    sys.exit(main())
