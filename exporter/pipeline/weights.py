"""Every number that an artifact holds, against the checkpoint's: what is exact, what is off and how far, what is wrong.

An average hides what this looks for: one wrong scale, one expert of zeros, gate and up swapped. So three figures are
held against what a type can do: the error of a leaf (an expert, a run of rows), of its worst block of 32 numbers, and
how far a block as a whole is too large or too small.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from exporter.checkpoint import Checkpoint
from exporter.errors import Refused
from exporter.numerics import decode
from exporter.numerics.floats import F32
from exporter.pipeline import leaves as parallel
from exporter.pipeline.diagnosis import short_name, what_it_holds
from exporter.pipeline.foreign import Foreign, Stored, compare_config, same_shapes
from exporter.pipeline.progress import Progress
from exporter.types import TensorSpec, leaves

BLOCK = 32
_CHUNK = 1 << 18  # numbers at a time: the intermediate arrays stay in the L2 cache
_WORST = 10  # tensors that a report names
_PROBLEMS = 20  # lines, before the rest is counted
_MANY = 0.1  # of a leaf's blocks: the leaf is wrong, and not some blocks of it
_LOOKED = 12  # tensors that are read again to find out what is wrong
_KEPT = 1e-3  # relative error of what is to be kept as released; float16 rounds to 5e-4


@dataclass(frozen=True)
class Limits:
    """Relative errors that a type may have: of a leaf, of its worst block, of a block's size (0.1: 10 % too large)."""

    leaf: float
    block: float
    size: float


# Measured with ggml's own quantizers (with K-quants, IQ4), plain rounding and GPTQ, on the trained demo checkpoint and
# on normal and Laplace numbers; the largest of leaf / block / size:
#   8 bit 0.007 / 0.013 / 0.006   6 bit 0.021 / 0.038 / 0.011   5 bit 0.052 / 0.103 / 0.043
#   4 bit in groups of 32 and 64: rounding 0.140 / 0.281 / 0.141, GPTQ 0.120 / 0.288 / 0.131, FP4 0.127 / 0.241 / 0.188
#   3 bit 0.195 / 0.332 / 0.194   2 bit 0.384 / 0.739 / 0.254
_BITS = {
    8: Limits(0.012, 0.03, 0.03),
    6: Limits(0.03, 0.12, 0.08),
    5: Limits(0.07, 0.25, 0.15),
    4: Limits(0.16, 0.45, 0.35),
    3: Limits(0.25, 0.70, 0.50),
    2: Limits(0.55, 1.20, 0.80),  # three levels, as in symmetric rounding, are further off: 0.68 / 0.91
    1: Limits(1.00, 2.00, 1.50),
}
_TRUE = np.uint64(0x0101010101010101)  # eight bools
_EXACT = Limits(0.0, 0.0, 0.0)
_NO_BLOCKS = 9.0


def compare_weights(foreign: Foreign, checkpoint: Checkpoint, workers: int, progress: Progress) -> dict[str, Any]:
    """`weights` of a report: every canonical tensor as `foreign` holds it against the checkpoint's own numbers.

    tensors, exact    how many there are, and how many are equal in every number
    compared, equal   numbers that were compared, and the share of them that is equal
    worst             of tensors that are not exact, the furthest off: name, stored, relative_error, equal, problem
    groups            by what tensors are for: how they are stored, exact, tensors, relative_error of the worst
    kept_exact        whether routers, norms, sinks and biases are all equal to the checkpoint's
    problems, sound   what no type explains, one line each; sound is that there are none

    Reads both leaf by leaf: memory is a few leaves for each of `workers`. Raises Refused where the artifact is not read
    here (ONNX) or is another model.
    """
    read = foreign.read
    if read is None:
        raise Refused(f"{foreign.path}: weights of ONNX graphs are not read here", hint="its runtime can still be run")
    if not same_shapes(foreign, checkpoint.config):
        differs = compare_config(foreign, checkpoint.config)[0]
        raise Refused(f"{foreign.path}: another model than the checkpoint: {differs}", hint="--against its checkpoint")
    specs, stored = checkpoint.specs, foreign.stored
    tallies = {s.name: Tally(s, stored[s.name], limits(stored[s.name], s, checkpoint)) for s in specs}
    progress.stage("weights", sum(s.elements for s in specs), "weights")

    def work(task: tuple[TensorSpec, int, int]) -> None:
        spec, start, stop = task
        mine, theirs = read(spec.name, start, stop), decode.values(checkpoint.read(spec.name, start, stop))
        tallies[spec.name].add(mine, theirs, start)
        progress.advance(mine.size, spec.name)

    parallel.each(((s, *at) for s in specs for at in leaves(s.shape)), work, workers)
    progress.done()
    done = list(tallies.values())
    problems: dict[str, str] = {}
    for tally in done:  # where all is wrong, the checkpoint is another one, and looking into each would take hours
        text = problem(tally, foreign, checkpoint, look=len(problems) < _LOOKED)
        if text:
            problems[tally.spec.name] = text
    return report(done, problems)


@dataclass
class Tally:
    """What was found of one tensor. Sums are of squares; places count from the start of the tensor."""

    spec: TensorSpec
    stored: Stored
    limits: Limits
    numbers: int = 0
    equal: int = 0
    error: float = 0.0
    norm: float = 0.0
    blocks: int = 0
    differing: int = 0
    finite: bool = True
    bad_leaves: dict[int, float] = field(default_factory=dict)
    bad_blocks: int = 0
    worst_block: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def exact(self) -> bool:
        return self.equal == self.numbers

    @property
    def relative(self) -> float:
        """Relative root mean square error of the tensor."""
        return _ratio(self.error, self.norm)

    def add(self, mine: F32, theirs: F32, start: int) -> None:
        """One leaf, [rows, ..., K], whose first index is `start`. Thread-safe."""
        k = mine.shape[-1] if mine.ndim > 1 else mine.size
        found = [_Chunk.of(a, b) for a, b in zip(_chunks(mine, k), _chunks(theirs, k), strict=True)]
        error, norm = sum(c.error for c in found), sum(c.norm for c in found)
        # A block that is next to nothing may be off by much of itself: what counts is what it is beside its like.
        floor = norm / mine.size * BLOCK / 16
        faults = [c.faults(self.limits, floor) for c in found]
        bad, blocks = sum(f.count for f in faults), sum(c.blocks for c in found)
        # A few blocks that are wrong make no wrong leaf: what is left without them may be as it should be.
        rest = error if bad >= _MANY * blocks else max(0.0, error - sum(f.error for f in faults))
        with self._lock:
            self.numbers += mine.size
            # What fills up the last block of a row is equal, and is no number.
            self.equal += sum(c.equal for c in found) - (blocks * BLOCK - mine.size)
            self.error += error
            self.norm += norm
            self.blocks += blocks
            self.differing += sum(c.differing for c in found)
            self.finite &= all(c.finite for c in found)
            self.bad_blocks += bad
            self.worst_block = max(self.worst_block, *(f.worst for f in faults))
            if _ratio(rest, norm) > self.limits.leaf:
                self.bad_leaves[start] = _ratio(error, norm)


def _ratio(error: float, norm: float) -> float:
    """sqrt(error / norm), 0 for 0 / 0; 9.99 at most, so that a report stays JSON."""
    if not error > 0:
        return 0.0
    return min(9.99, float(np.sqrt(error / norm))) if norm > 0 else 9.99


def _chunks(values: F32, k: int) -> Iterator[F32]:
    """Rows of K, some at a time, as blocks [n, 32] (the last of a row is filled up with zeros)."""
    rows = values.reshape(-1, k)
    step = max(1, _CHUNK // k)
    for i in range(0, len(rows), step):
        part = rows[i : i + step]
        if k % BLOCK:
            part = np.pad(part, ((0, 0), (0, -k % BLOCK)))
        yield part.reshape(-1, BLOCK)


@dataclass(frozen=True)
class _Faults:
    """Blocks beyond their limits: how many, the sum of their squared errors; and the worst relative error of any."""

    count: int
    error: float
    worst: float


@dataclass(frozen=True)
class _Chunk:
    """Some blocks: sums over all of them, and squares of each: of its error, of the checkpoint's, and the product."""

    equal: int
    error: float
    norm: float
    blocks: int
    differing: int
    finite: bool
    errors: F32
    norms: F32
    products: F32

    @staticmethod
    def of(mine: F32, theirs: F32) -> _Chunk:
        same = mine == theirs
        norms = np.einsum("nk,nk->n", theirs, theirs)
        n = len(theirs)
        if same.all():
            empty = np.empty(0, np.float32)
            return _Chunk(same.size, 0.0, float(norms.sum(dtype=np.float64)), n, 0, True, empty, empty, empty)
        differs = (same.view(np.uint64) != _TRUE).any(axis=1)  # [n, 4]: short rows of bool are slow
        a, b = mine[differs], theirs[differs]
        finite = bool(np.isfinite(a).all())
        a = a if finite else np.nan_to_num(a, nan=0.0, posinf=0.0, neginf=0.0)
        with np.errstate(over="ignore"):  # a damaged scale may be of any size
            errors = np.einsum("nk,nk->n", a - b, a - b)
            products = np.einsum("nk,nk->n", a, b)
        total = float(np.nan_to_num(errors, posinf=3e38).sum(dtype=np.float64))
        count = int(np.count_nonzero(same))
        return _Chunk(
            count, total, float(norms.sum(dtype=np.float64)), n, len(a), finite, errors, norms[differs], products
        )

    def faults(self, limits: Limits, floor: float) -> _Faults:
        """Blocks beyond the limits."""
        if not self.errors.size:
            return _Faults(0, 0.0, 0.0)
        beside = np.maximum(self.norms, np.float32(floor)) + np.float32(1e-38)
        with np.errstate(over="ignore", invalid="ignore"):
            error, size = np.sqrt(self.errors / beside), np.abs(self.products / beside - self.norms / beside)
        beyond = ~(error <= limits.block) | ~(size <= limits.size)
        worst = float(min(9.99, np.nan_to_num(error, nan=9.99).max()))
        wrong = np.nan_to_num(self.errors[beyond], posinf=3e38).sum(dtype=np.float64)
        return _Faults(int(np.count_nonzero(beyond)), float(wrong), worst)


# What a type can do


def limits(stored: Stored, spec: TensorSpec, checkpoint: Checkpoint) -> Limits:
    """What may lie between a tensor as it is stored and as the checkpoint has it."""
    kind, source = stored.type, checkpoint.scheme(spec.name).name
    if kind in ("F32", "F64") or (kind == "BF16" and source in ("bf16", "mxfp4")) or kind.lower() == source:
        return _EXACT
    if kind in ("F16", "BF16"):
        rounding = 2.0 ** (-11 if kind == "F16" else -8)
        return Limits(rounding, 2 * rounding, 2 * rounding)
    bits = type_bits(kind)
    if "FP8" in kind:
        return Limits(0.045, 0.08, 0.08)
    found = _BITS[bits] if not kind.startswith("int2") else _BITS[1]
    group = kind.split()[1] if kind.startswith("int") else ""
    if group in ("channel", "tensor") or (group.startswith("g") and int(group[1:]) > 64):
        # One scale for many blocks: one that is small beside the others may be lost.
        return Limits(min(1.0, 1.5 * found.leaf), _NO_BLOCKS, _NO_BLOCKS)
    return found


def type_bits(kind: str) -> int:
    """Bits of a code of a quantized type: 4 for "Q4_K", "IQ4_XS", "MXFP4" and "int4 g32"; 1 for ternary ones."""
    if kind.startswith("TQ"):
        return 1
    return int(next(c for c in kind.removeprefix("MX").removeprefix("NV") if c.isdigit()))


# What is wrong, and the report


def problem(t: Tally, foreign: Foreign, checkpoint: Checkpoint, *, look: bool = True) -> str | None:
    """What no type explains of a tensor, on one line; None where all is as it should be.

    look: whether to read it again and find out what it holds instead.
    """
    name, kind = short_name(t.spec), t.stored.type
    if not t.finite:
        return f"{name}: holds values that are not finite"
    far = max(t.bad_leaves.values(), default=0.0) > (0.05 if t.limits is _EXACT else 0.0)
    if far:
        tolerance = max(0.02, 1.2 * t.limits.leaf)
        held = what_it_holds(foreign, checkpoint, t.spec, t.bad_leaves, tolerance) if look else ""
        if held or t.limits is not _EXACT:
            return f"{name}: {held or _off(t)}"
    if t.spec.role in ("router", "vector") and t.relative > _KEPT:
        kept = "routers, norms, sinks and biases are to stay as released"
        return f"{name}: stored as {kind}, {t.relative:.2%} off; {kept}"
    if t.limits is _EXACT and t.differing:
        return f"{name}: {_blocks(t.differing, t.blocks)} {_differ(t.differing)}; {kind} should be exact"
    if t.bad_blocks:
        verb = "is" if t.bad_blocks == 1 else "are up to"
        return f"{name}: {_blocks(t.bad_blocks, t.blocks)} {verb} {t.worst_block:.0%} off, more than {kind} can be"
    return None


def _off(t: Tally) -> str:
    worst = max(t.bad_leaves.values())
    return f"{worst:.1%} off, {t.stored.type} should be within {t.limits.leaf:.1%}"


def _blocks(count: int, total: int) -> str:
    return f"{count:,} {'block' if count == 1 else 'blocks'} of {total:,}"


def _differ(count: int) -> str:
    return "differs" if count == 1 else "differ"


_GROUPS = {
    "expert": "experts",
    "linear": "attention",
    "embedding": "embedding",
    "head": "head",
    "router": "router",
    "vector": "norms, sinks, biases",
}


def report(done: Sequence[Tally], problems: dict[str, str]) -> dict[str, Any]:
    """The tallies as `compare_weights` gives them."""
    inexact = sorted((t for t in done if not t.exact), key=lambda t: (t.spec.name not in problems, -t.relative))
    kept = [t for t in done if t.spec.role in ("router", "vector")]
    numbers = sum(t.numbers for t in done)
    return {
        "tensors": len(done),
        "exact": sum(t.exact for t in done),
        "compared": numbers,
        "equal": sum(t.equal for t in done) / numbers,
        "worst": [_line(t, problems.get(t.spec.name)) for t in inexact[:_WORST]],
        "groups": [_group(name, [t for t in done if t.spec.role == role]) for role, name in _GROUPS.items()],
        "kept_exact": all(t.exact for t in kept),
        "problems": _lines(list(problems.values())),
        "sound": not problems,
    }


def _lines(texts: list[str]) -> list[str]:
    more = len(texts) - _PROBLEMS
    return texts[:_PROBLEMS] + ([f"and {more:,} more tensors"] if more > 0 else [])


def _line(t: Tally, text: str | None) -> dict[str, Any]:
    line = {
        "name": t.spec.name,
        "stored": t.stored.type,
        "relative_error": t.relative,
        "worst_block": t.worst_block,
        "equal": t.equal / t.numbers,
    }
    return line | ({"problem": text} if text else {})


def _group(name: str, some: Sequence[Tally]) -> dict[str, Any]:
    stored: dict[str, int] = {}
    for t in some:
        stored[t.stored.type] = stored.get(t.stored.type, 0) + 1
    return {
        "group": name,
        "stored": stored,
        "exact": sum(t.exact for t in some),
        "tensors": len(some),
        "relative_error": max((t.relative for t in some), default=0.0),
    }
