"""What TensorRT refuses of an ONNX graph, said without TensorRT: a linter for the machine that only makes the file.

It knows what the parser and the builder of TensorRT for RTX were seen to refuse, and what the parser's own table
(onnx-tensorrt, docs/operators.md) says of the others. tensorrt_operators.py and
tensorrt_quantized.py have the rules of each operator.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exporter.errors import ExporterError, Refused
from exporter.validate.child import OnProgress, run_worker, serve
from exporter.validate.onnx_file import AGAIN, located, parse, printable
from exporter.validate.tensorrt_graph import FP4, FP8, INT4, INT8, SMS, TRT, UINT8, Known, Site, name_of, typed
from exporter.validate.tensorrt_operators import OPSETS, problems

_TAKEN = {1, 2, 3, 6, 7, 9, 10, 11, 16, FP8, INT4, FP4}
_DOUBLE = 11
_MANY = 10_000
_TIME, _MEMORY = 300.0, 4 << 30  # seconds and bytes for the child: a graph of 64 MiB, and 20 GB of scales to look at
_LAYERS = ("QuantizeLinear", "DequantizeLinear")  # these are found again by name


@dataclass(frozen=True)
class Finding:
    """One thing that TensorRT does not take, or that a person should know.

    where: a node, "name (OpType)", an initializer, an input or an output. sms: the compute capabilities on which
    the graph does not build for it; all where the parser refuses. fatal: False for a warning.
    """

    where: str
    problem: str
    sms: tuple[int, ...]
    rule: str
    fatal: bool = True


@dataclass(frozen=True)
class Request:
    """What the child is asked."""

    graph: str


def lint(graph: Path) -> list[Finding]:
    """All findings for a graph, in the order of its nodes; none for one that builds everywhere.

    In a process of its own: ONNX's inference of types is native code that a damaged graph can kill. Raises
    MissingExtra without the onnx library, ExporterError for a file that is no model, that kills its reader, or whose
    weights are missing or not where they may be.
    """
    parse(graph)
    request = Request(str(graph))
    answer = run_worker(
        request,
        "exporter.validate.tensorrt_rules",
        _TIME,
        runtime="onnx",
        subject=graph.name,
        memory_limit=_MEMORY,
    )
    return [Finding(**{**found, "sms": tuple(found["sms"])}) for found in answer["findings"]]


def findings(graph: Path) -> list[Finding]:
    """The same in this process, for a graph of our own making."""
    model = parse(graph)
    try:
        found = list(dict.fromkeys(itertools.islice(_findings(graph, model), _MANY)))
    except UnicodeDecodeError:
        raise ExporterError(f"{graph}: names that are no text", hint=AGAIN) from None
    if len(found) == _MANY:
        found.append(Finding("graph", f"has more than {_MANY:,} findings; these are the first", SMS, "many"))
    return found


def require_buildable(graph: Path, sm: int) -> None:
    """Raise Refused with the first thing that keeps a graph from building for one compute capability."""
    for finding in lint(graph):
        if finding.fatal and sm in finding.sms:
            hint = "another --target, or the graph as exporter writes it: exporter export --format tensorrt"
            raise Refused(f"{graph.name}: {finding.where}: {finding.problem} (SM{sm})", hint=hint)


def _findings(graph: Path, model: Any) -> Iterator[Finding]:
    everything, invalid = typed(graph, model)
    yield from _versions(model)
    if invalid:
        yield Finding("graph", f"not valid ONNX: {invalid}", SMS, "types")
    if model.functions:
        text = "it has functions of its own, which are not read here; onnx.inliner.inline_local_functions resolves them"
        yield Finding(f"function {printable(model.functions[0].name)}", text, SMS, "functions")
    inside = {id(known.scope.graph): known for known in everything}
    names = Counter(n.name for known in everything for n in known.scope.graph.node if n.op_type in _LAYERS)
    for known in everything:
        yield from _weights(graph, known)
        yield from _values(known)
        for node in known.scope.graph.node:
            site = Site(node, known.scope, known, graph, inside)
            where = str(site).removeprefix("node ")
            refused = False
            for found in problems(site):
                yield Finding(where, found.text, found.sms, found.rule, found.fatal)
                refused |= found.fatal and found.sms == SMS
            if not refused:
                yield from _untyped(site, where)
            if node.op_type in _LAYERS and node.name and names[node.name] > 1:
                yield Finding(where, "has the name of another one, which TensorRT takes for the same", SMS, "names")


def _versions(model: Any) -> Iterator[Finding]:
    for imported in model.opset_import:
        if imported.domain in ("", "ai.onnx") and not OPSETS[0] <= imported.version <= OPSETS[1]:
            text = f"operator set {imported.version}; TensorRT's parser names {OPSETS[0]} to {OPSETS[1]}"
            yield Finding("graph", text, SMS, "opset", fatal=False)


def _weights(graph: Path, known: Known) -> Iterator[Finding]:
    """Types of the constants, whether they are used or not: the parser reads them all."""
    scale_bytes = {n.input[1] for n in known.scope.graph.node if n.domain == TRT and len(n.input) > 1}
    for name, tensor in known.tensors.items():
        where = f"initializer {printable(name, 96)}"
        if tensor.data_type not in _TAKEN:
            yield Finding(where, f"is of {name_of(tensor.data_type)}, which the parser does not read", SMS, "types")
            continue
        located(graph, tensor)
        if tensor.data_type == UINT8 and name not in scale_bytes:
            yield Finding(where, "is of UINT8, which TensorRT expands to 4 bytes a code", SMS, "types", fatal=False)
        if tensor.data_type == _DOUBLE:
            yield Finding(where, "is of DOUBLE, which TensorRT casts to FLOAT", SMS, "types", fatal=False)
    for tensor in known.scope.graph.sparse_initializer:
        yield Finding(f"initializer {printable(tensor.values.name, 96)}", "is sparse", SMS, "types")
    twice = Counter(t.name for t in known.scope.graph.initializer)
    twice += Counter(name for node in known.scope.graph.node for name in node.output if name)
    for name in (n for n, count in twice.items() if count > 1):
        yield Finding(f"value {printable(name, 96)}", "is made twice", SMS, "names")


def _values(known: Known) -> Iterator[Finding]:
    """What goes in and out of a graph, and what its nodes ask for and nobody makes."""
    graph = known.scope.graph
    for value, what in (*((i, "input") for i in graph.input), *((o, "output") for o in graph.output)):
        dtype, where = known.dtype(value.name), f"{what} {printable(value.name, 96)}"
        if dtype is None:
            yield Finding(where, "has no type, so nobody saw whether it suits", SMS, "types", fatal=False)
        elif dtype not in _TAKEN:
            yield Finding(where, f"is of {name_of(dtype)}, which TensorRT does not have", SMS, "types")
        elif dtype in (INT4, FP8, FP4, INT8) and what == "output" and known.tensor(value.name) is not None:
            yield Finding(
                where, f"is a constant of {name_of(dtype)}, which goes to DequantizeLinear only", SMS, "types"
            )
    given = {i.name for i in graph.input} | set(known.tensors)
    made: set[str] = set()
    around = known.scope.outer
    for node in graph.node:
        for name in node.input:
            if not name or name in given or name in made or (around and _is_made(around, name)):
                continue
            later = "before it is made: nodes are out of order, or in a circle"
            text = f"is used {later}" if name in known.scope.made else "is used, and nothing makes it"
            yield Finding(f"value {printable(name, 96)}", text, SMS, "names")
        made.update(node.output)


def _is_made(scope: Any, name: str) -> bool:
    return any(name in s.made or name in s.weights or name in s.shapes for s in scope.around())


def _untyped(site: Site, where: str) -> Iterator[Finding]:
    """A node from which on types are unknown: what comes after it was not looked at either."""
    made = [site.known.dtype(name) for name in site.node.output if name]
    came = [site.known.dtype(name) for name in site.node.input if name]
    if None in made and None not in came:
        yield Finding(
            where, "the type of what it makes is unknown, so what follows is not checked", SMS, "types", fatal=False
        )
    wrong = next((d for d in made if d is not None and d not in _TAKEN), None)
    if wrong is not None and not site.known.outputs.intersection(site.node.output):
        yield Finding(where, f"makes {name_of(wrong)}, which TensorRT does not have", SMS, "types")


def _serve(request: dict[str, Any], report: OnProgress) -> dict[str, Any]:
    return {"findings": [asdict(found) for found in findings(Path(request["graph"]))]}


if __name__ == "__main__":
    sys.exit(serve(_serve))
