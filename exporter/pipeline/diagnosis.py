"""Weights that are not the checkpoint's: what they are instead. Known mistakes, tried one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from exporter.checkpoint import Checkpoint
from exporter.numerics import decode
from exporter.numerics.floats import F32
from exporter.pipeline.foreign import Foreign
from exporter.types import TensorSpec
from exporter.types.qtensor import leaf_rows

_NAMED = 3  # experts named before the rest is counted
_LIKE = 0.05  # a factor nearer to 1 than this is no finding


def short_name(spec: TensorSpec) -> str:
    """ "layers.2 experts.gate_proj" of model.layers.2.mlp.experts.gate_proj.weight."""
    name = spec.name.removeprefix("model.").removesuffix(".weight").replace("mlp.", "").replace("self_attn.", "")
    if spec.layer is None:
        return name
    _, layer, rest = name.split(".", 2)
    return f"layers.{layer} {rest}"


def what_it_holds(
    foreign: Foreign, checkpoint: Checkpoint, spec: TensorSpec, bad: Mapping[int, float], tolerance: float
) -> str:
    """What the leaves of `bad` (first index -> relative error) hold instead of their own values; "" where unknown."""
    with np.errstate(all="ignore"):  # wrong weights may be of any size
        return _what(foreign, checkpoint, spec, bad, tolerance)


def _what(
    foreign: Foreign, checkpoint: Checkpoint, spec: TensorSpec, bad: Mapping[int, float], tolerance: float
) -> str:
    if turned := _turned(foreign, checkpoint, spec, tolerance):
        return turned
    found: dict[str, list[int]] = {}
    starts = sorted(bad, key=lambda start: -bad[start])
    for start in starts[:_NAMED]:
        text = _leaf(foreign, checkpoint, spec, start, tolerance)
        if text:
            found.setdefault(text, []).append(start)
    if not found:
        return ""
    text, first = max(found.items(), key=lambda item: len(item[1]))
    total = -(-spec.shape[0] // leaf_rows(spec.shape))
    if len(bad) == total:
        return text
    if len(spec.shape) < 3:
        return f"{text} (from row {min(first):,} on)"
    which = ", ".join(str(i) for i in sorted(first))
    more = f" and {len(bad) - len(first)} more" if len(bad) > len(first) else ""
    return f"expert{'s' if len(bad) > 1 else ''} {which}{more}: {text}"


def _leaf(foreign: Foreign, checkpoint: Checkpoint, spec: TensorSpec, start: int, tolerance: float) -> str:
    stop = min(start + leaf_rows(spec.shape), spec.shape[0])
    assert foreign.read is not None
    mine = foreign.read(spec.name, start, stop)

    def own(name: str, first: int = start, last: int = stop) -> F32:
        return decode.values(checkpoint.read(name, first, last))

    theirs = own(spec.name)
    if not mine.any():
        return "all zeros"
    for text, other in _others(spec, theirs, own):
        if _off(mine, other) <= tolerance:
            return text
    factor = float(np.vdot(mine, theirs) / np.vdot(theirs, theirs)) if theirs.any() else 0.0
    if abs(factor - 1) > _LIKE and abs(factor) > 1e-6 and _off(mine, np.float32(factor) * theirs) <= tolerance:
        return f"{factor:.3g} times the checkpoint's values"
    if foreign.stored[spec.name].type.startswith("int") and _moved(mine, theirs) <= tolerance:
        return "every group moved by a step: zero points are off by one, as between the two GPTQ formats"
    if len(spec.shape) == 3:
        for e in range(spec.shape[0]):
            if e != start and _off(mine, own(spec.name, e, e + 1)) <= tolerance:
                return f"expert {e}'s values"
    return ""


def _off(mine: F32, theirs: F32) -> float:
    """Relative root mean square error."""
    difference = mine - theirs
    norm = float(np.vdot(theirs, theirs))
    return float(np.sqrt(float(np.vdot(difference, difference)) / norm)) if norm else np.inf


def _moved(mine: F32, theirs: F32) -> float:
    """Relative error that is left when each run of 32 may be moved as a whole."""
    if mine.shape[-1] % 32:
        return np.inf
    difference = (mine - theirs).reshape(-1, 32)
    difference -= difference.mean(axis=1, keepdims=True)
    return _off(difference.reshape(theirs.shape) + theirs, theirs)


def _turned(foreign: Foreign, checkpoint: Checkpoint, spec: TensorSpec, tolerance: float) -> str:
    """Rows of queries or keys in the order that llama.cpp has them for models that turn neighbours, or back from it."""
    if not spec.name.endswith(("q_proj.weight", "k_proj.weight")) or foreign.read is None:
        return ""
    rows, k = spec.shape
    half = checkpoint.config.head_dim // 2
    theirs = decode.values(checkpoint.read(spec.name, 0, rows))
    mine = foreign.read(spec.name, 0, rows)
    for first, second in ((2, half), (half, 2)):
        turned = np.swapaxes(theirs.reshape(-1, first, second, k), 1, 2).reshape(rows, k)
        if _off(mine, turned) <= tolerance:
            return "rows of each head in the order of another rotation"
    return ""


def _others(spec: TensorSpec, theirs: F32, own: Callable[[str], F32]) -> Iterator[tuple[str, F32]]:
    """(what it would be, its values) of mistakes in naming and in packing."""
    k = theirs.shape[-1]
    for part, other in (("gate", "up"), ("up", "gate")):
        if f".experts.{part}_proj." in spec.name:
            there = own(spec.name.replace(f".{part}_proj.", f".{other}_proj."))
            yield f"{part} holds {other}'s values", there
            gate, up = (theirs, there) if part == "gate" else (there, theirs)
            yield from _mixed(part, gate, up)
    if theirs.ndim < 2 or spec.shape[-1] % 32:
        return
    pairs = theirs.reshape(*theirs.shape[:-1], k // 2, 2)[..., ::-1]
    yield "every two neighbours swapped (nibbles)", pairs.reshape(theirs.shape)
    split = theirs.reshape(*theirs.shape[:-1], k // 32, 2, 16)
    yield "both halves of each 32 swapped (nibbles)", split[..., ::-1, :].reshape(theirs.shape)
    # GGUF has j and j + 16 in a byte, the release 2j and 2j + 1.
    yield (
        "numbers of each 32 in the order of the release",
        np.swapaxes(theirs.reshape(*theirs.shape[:-1], k // 32, 16, 2), -1, -2).reshape(theirs.shape),
    )
    yield "numbers of each 32 in the order of GGUF", np.swapaxes(split, -1, -2).reshape(theirs.shape)
    if theirs.ndim == 3 and theirs.shape[-1] == theirs.shape[-2]:
        yield "transposed", np.swapaxes(theirs, -1, -2)


def _mixed(part: str, gate: F32, up: F32) -> Iterator[tuple[str, F32]]:
    """Gate rows and up rows of one matrix, cut into halves where they take turns, or the other way round."""
    axis = 1 if gate.ndim > 1 else 0
    n = gate.shape[axis]
    if n % 2:
        return
    turns = np.stack((gate, up), axis=axis + 1).reshape(*gate.shape[:axis], 2 * n, *gate.shape[axis + 1 :])
    half = np.take(turns, range(n) if part == "gate" else range(n, 2 * n), axis=axis)
    yield "half of the interleaved matrix, gate rows and up rows mixed", half
    apart = np.concatenate((gate, up), axis=axis)
    every = np.take(apart, range(0 if part == "gate" else 1, 2 * n, 2), axis=axis)
    yield "gate rows and up rows taken for interleaved ones", every
