"""What an engine of TensorRT for RTX shows on a machine that cannot run it: how the weights lie in it.

Weights can lose what quantizing them won in two ways, and TensorRT says neither: folded into wider constants,
which the file then holds, or written out whole in 16 bits on the GPU at every run. An engine holds its plan as
text, a line for each tensor and each step, which tells both. No document describes that text: it was read in 1.7,
and a weight that is not found in it counts as expanded.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SMALL = 1024  # bytes; TensorRT may write smaller constants into a kernel's code
_TENSOR = re.compile(
    rb"tensor=\{ [^\n]*?(?:const_payload_size=(?P<bytes>\d+) )?dims=\{ (?P<dims>[^}\n]*)\}"
    rb'[^\n]*? name="(?P<name>[^"\n]*)"[^\n]*? region="?(?P<region>[^" \n]*)"?[^\n]*? type=(?P<type>\w+) \}'
)
_STEP = re.compile(rb"=\{ name=[^\n]*")
_NAME = re.compile(rb'"([^"\n]*)"')
_ATTENTION = re.compile(rb"function=\{ name=_gem[mv]_mha")  # gemv: where the graph says one token
_BUFFER = re.compile(rb"region = \{ name=devmem[^\n]*? size=(\d+) ")
_BITS = re.compile(r"(?:U?INT|FLOAT)([248])(?:E\w+)?")


@dataclass(frozen=True)
class Weight:
    """A quantized initializer of a graph, or a constant of an engine, that has `bits` for each element."""

    name: str
    bits: int
    shape: tuple[int, ...]
    nbytes: int

    @property
    def look(self) -> tuple[int, tuple[int, ...]]:
        """What stays when TensorRT renames and transposes it."""
        return self.nbytes, tuple(sorted(self.shape))


@dataclass(frozen=True)
class Weights:
    """What a graph brings.

    packed_bytes: of all initializers, as they lie in the files. expanded_bytes: the same if every
    element of `quantized` took 16 bits.
    """

    packed_bytes: int
    expanded_bytes: int
    quantized: tuple[Weight, ...]


@dataclass(frozen=True)
class Plan:
    """What an engine's text says.

    constants: with their bits. types: bytes of constants by the type that TensorRT names.
    whole: (name, shape) of float tensors of a fixed shape in the GPU's memory.
    steps: names of all that a step reads and writes. attention: steps that are a whole attention.
    buffer_bytes: of the GPU's memory beside the constants, at the largest shapes.
    """

    constants: tuple[Weight, ...]
    types: dict[str, int]
    whole: tuple[tuple[str, tuple[int, ...]], ...]
    steps: tuple[frozenset[str], ...]
    attention: int
    buffer_bytes: int


def read_weights(graph: Path) -> Weights:
    """The constants of a graph and of graphs inside it, by their headers; weights in other files are not read."""
    import onnx

    truth = onnx.TensorProto.BOOL  # 8 bits too, but no number
    model = onnx.load(graph, load_external_data=False)
    packed, more, quantized = 0, 0, []
    for inner in _graphs(model.graph):
        # Scales of 8 bits become wider, and zero points (TensorRT takes zeros only) are dropped.
        about = {name for n in inner.node if n.op_type.endswith("DequantizeLinear") for name in n.input[1:]}
        for name, tensor in _constants(inner):
            weight = _weight(name, tensor)
            packed += weight.nbytes
            if weight.bits <= 8 and tensor.data_type != truth and weight.nbytes >= _SMALL and name not in about:
                quantized.append(weight)
                more += 2 * math.prod(weight.shape) - weight.nbytes
    return Weights(packed, packed + more, tuple(quantized))


def _graphs(graph: Any) -> Iterator[Any]:
    """The graph, then those in branches and loops."""
    waiting = [graph]
    while waiting:
        one = waiting.pop()
        yield one
        for node in one.node:
            for attribute in node.attribute:
                waiting += [attribute.g] if attribute.HasField("g") else attribute.graphs


def _constants(graph: Any) -> Iterator[tuple[str, Any]]:
    for tensor in graph.initializer:
        yield tensor.name, tensor
    for node in graph.node:
        if node.op_type == "Constant":
            yield from ((node.output[0], a.t) for a in node.attribute if a.HasField("t"))


def _weight(name: str, tensor: Any) -> Weight:
    from onnx import TensorProto, helper

    few = _BITS.fullmatch(TensorProto.DataType.Name(tensor.data_type))
    bits = int(few[1]) if few else 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    shape = tuple(tensor.dims)
    return Weight(name, bits, shape, -(-math.prod(shape) * bits // 8))


def read_plan(engine: bytes | memoryview) -> Plan:
    """The text in the bytes of an engine, which is not copied."""
    constants, types, whole = [], Counter[str](), []
    for found in _TENSOR.finditer(engine):
        dims = found["dims"].split()
        if not all(d.isdigit() for d in dims):  # a name: known only when it runs
            continue
        name, shape, kind = _text(found["name"]), tuple(map(int, dims)), _text(found["type"])
        if found["bytes"] is not None:
            size = int(found["bytes"])
            types[kind] += size
            constants.append(Weight(name, round(8 * size / max(1, math.prod(shape))), shape, size))
        elif found["region"].startswith(b"devmem") and kind in ("half", "float", "bf16"):
            whole.append((name, shape))
    steps = (frozenset(_text(n) for n in _NAME.findall(found[0])) for found in _STEP.finditer(engine))
    return Plan(
        tuple(constants),
        dict(types),
        tuple(whole),
        tuple(steps),
        sum(1 for _ in _ATTENTION.finditer(engine)),
        sum(int(found[1]) for found in _BUFFER.finditer(engine)),
    )


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def compare(weights: Weights, plan: Plan) -> dict[str, Any]:
    """What became of the quantized weights.

    expansion       share of their bytes that the engine does not hold in as few bits: 0 when it holds all
    expanded        names of those
    growth          how far the engine's constants are from packed_bytes (0) to expanded_bytes (1), whatever they are
    written_out     names of those whose every value is written to the GPU's memory in each run, in 16 bits or more;
                    the engine's own name where it made one of several
    written_bytes   of them in 16 bits
    constants       bytes of the engine's constants by type
    fused_attention attentions computed by one kernel each
    buffer_bytes    of the GPU's memory beside the constants, at the largest shapes
    """
    homes, expanded = _find(weights.quantized, plan.constants)
    total = sum(w.nbytes for w in weights.quantized)
    room = weights.expanded_bytes - weights.packed_bytes
    written = _written_out(homes, plan)
    return {
        "packed_bytes": weights.packed_bytes,
        "expansion": sum(w.nbytes for w in expanded) / total if total else 0.0,
        "expanded": sorted(w.name for w in expanded),
        "growth": max(0.0, (sum(plan.types.values()) - weights.packed_bytes) / room) if room else 0.0,
        "written_out": sorted(w.name for w in written),
        "written_bytes": sum(2 * math.prod(w.shape) for w in written),
        "constants": plan.types,
        "fused_attention": plan.attention,
        "buffer_bytes": plan.buffer_bytes,
    }


def _find(quantized: Iterable[Weight], constants: Sequence[Weight]) -> tuple[dict[str, Weight], list[Weight]]:
    """The engine's constants in few bits, by name, each with what it is of the graph; and what has none.

    A constant keeps its name (with "_constantInt4" behind it) or gets a new one and another order
    of the axes, or several become one.
    """
    named: dict[str, list[Weight]] = {}
    for constant in constants:
        named.setdefault(constant.name.rpartition("_constant")[0], []).append(constant)
    homes: dict[str, Weight] = {}
    expanded, renamed = [], []
    for weight in quantized:
        kept = named.get(weight.name)
        if kept is None:
            renamed.append(weight)
        elif all(c.bits <= weight.bits for c in kept):
            homes |= {c.name: weight for c in kept}
        else:
            expanded.append(weight)
    nameless = [c for c in constants if c.name not in homes and c.bits <= 8]
    merged = []
    for weight in renamed:
        home = next((c for c in nameless if (c.bits, c.look) == (weight.bits, weight.look)), None)
        if home is None:
            merged.append(weight)
        else:
            nameless.remove(home)
            homes[home.name] = weight
    for bits in {w.bits for w in merged}:
        alike = [w for w in merged if w.bits == bits]
        left = [c for c in nameless if c.bits == bits]
        if sum(c.nbytes for c in left) < sum(w.nbytes for w in alike):
            expanded += alike
        else:
            homes |= {c.name: c for c in left}
    return homes, expanded


def _written_out(homes: dict[str, Weight], plan: Plan) -> set[Weight]:
    """Weights that a step reads and writes to a tensor of their own shape, in some order of the axes."""
    shapes = {name: tuple(sorted(shape)) for name, shape in plan.whole}
    found = set()
    for step in plan.steps:
        written = {shapes[name] for name in step if name in shapes}
        found |= {homes[n] for n in step if n in homes and tuple(sorted(homes[n].shape)) in written}
    return found
