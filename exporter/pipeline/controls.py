"""Known-bad controls: an artifact with one mistake in it, which some gate must fail.

Gates that let all pass are worth nothing. The mistakes are those that happen, in converters and on disks. Each is
made in a copy of the artifact, in its own format, and the copy is proved as the artifact was.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from exporter.errors import ExporterError, MissingExtra, Refused
from exporter.formats.base import ExportJob, FileLayout, Located
from exporter.model import ModelConfig
from exporter.numerics import decode
from exporter.numerics.bits import pack_nibbles, unpack_nibbles
from exporter.numerics.floats import F32, f32_to_bf16
from exporter.pipeline import regions
from exporter.pipeline.own import read_back
from exporter.pipeline.plan import ArtifactPlan
from exporter.pipeline.prove import Proof
from exporter.quantize.rtn import round_to
from exporter.types import QTensor, Scheme, leaves
from exporter.types.recipe import Step
from exporter.validate.child import OverLimit, TimedOut
from exporter.validate.runtime import SCRATCH_PREFIX

# (folder of the copy) -> the gates that it fails, and the mean KL on plain text, None where it could not be run.
Judge = Callable[[Path], tuple[list[str], float | None]]

_BYTES = ("digests_equal", "head_equal")  # no copy that was changed keeps them, whatever the mistake is
_GONE = -1e4  # a sink that draws nothing: exp() of it is 0, and every float type holds it
_ROUTER = Scheme.parse("int4-g32")
_SPARE = 1.1  # of the artifact's size, to be free


@dataclass(frozen=True)
class Control:
    """One mistake. `damage` makes it in a copy; "" where it is made, else why this artifact cannot have it."""

    name: str
    what: str
    damage: Callable[[Copy], str]


def run_controls(folder: Path, job: ExportJob, proof: Proof, failing: Collection[str] = ()) -> list[dict[str, Any]]:
    """`controls` of a report on the artifact in `folder`: each mistake with the gates that it failed.

    `job`: as the artifact was laid out; `failing`: gates that it fails by itself, which catch nothing. Raises Refused
    where there is no room for a copy beside the reference.
    """
    scratch, paths = proof.reference.scratch, [folder / layout.filename for layout in proof.layouts]
    need = int(_SPARE * sum(path.stat().st_size for path in paths))
    if shutil.disk_usage(scratch).free < need:
        raise Refused(f"--controls damages a copy: {need / 1e9:.3g} GB in {scratch}", hint="make room there")
    found = []
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=scratch) as twin:
        copy = Copy(Path(twin) / folder.name, proof.artifact, job, proof.layouts)
        shutil.copytree(folder, copy.folder, ignore=shutil.ignore_patterns("report.*"))
        found += [_one(control, copy, proof.judge, failing) for control in CONTROLS]
    return found


def _one(control: Control, copy: Copy, judge: Judge, failing: Collection[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"name": control.name, "what": control.what}
    try:
        why_not = control.damage(copy)
        if why_not:
            return {**found, "applies": False, "why_not": why_not}
        try:
            failed, kl = judge(copy.folder)
        except (MissingExtra, OverLimit, TimedOut):
            raise  # says nothing of the mistake
        except ExporterError as error:
            return {
                **found,
                "applies": True,
                "caught": True,
                "by_behaviour": True,
                "gates_failed": [],
                "refused": error.message,
            }
        failed = [name for name in failed if name not in failing]
        seen = any(name not in _BYTES for name in failed)
        return {
            **found,
            "applies": True,
            "caught": bool(failed),
            "by_behaviour": seen,
            "gates_failed": failed,
            "kl_mean": kl,
        }
    finally:
        copy.restore()


class Copy:
    """A copy of an artifact that can be damaged and made whole again."""

    def __init__(self, folder: Path, artifact: ArtifactPlan, job: ExportJob, layouts: Sequence[FileLayout]) -> None:
        self.folder, self.format, self.job, self._layouts = folder, artifact.format, job, layouts
        self.steps = {step.name: step for step in artifact.steps}
        self._undo: list[Callable[[], None]] = []

    @functools.cached_property
    def _places(self) -> Mapping[str, Located]:
        """Where each tensor is: read once, since no mistake moves one. A head of 20b holds 200,000 tokens."""
        return self.format.locate(self.folder, list(self.steps.values()))

    def restore(self) -> None:
        """Undo what was done since the last time, the last first."""
        while self._undo:
            self._undo.pop()()

    def leaf(self, step: Step, start: int, stop: int) -> QTensor:
        """Some leading indices as they are in the files."""
        place = self._places[step.name]
        with _opened(place.path) as descriptor:
            return self.format.unpack(step, read_back(descriptor, place, step, start, stop))

    def put(self, step: Step, start: int, q: QTensor) -> None:
        """Write them; `restore` puts back what was there."""
        place = self._places[step.name]
        arrays = self.format.pack(step, q)
        stop = start + q.data.shape[0]
        with _opened(place.path) as descriptor:
            before = read_back(descriptor, place, step, start, stop)
            _write(descriptor, place.parts, start, arrays)

        def undo() -> None:
            with _opened(place.path) as again:
                _write(again, place.parts, start, before)

        self._undo.append(undo)

    def change(self, step: Step, new: Callable[[QTensor], QTensor], only: range | None = None) -> None:
        """Every leaf of a tensor, or those that begin in `only`."""
        for start, stop in leaves(step.spec.shape):
            if only is None or start in only:
                self.put(step, start, new(self.leaf(step, start, stop)))

    def relay(self, config: ModelConfig, raw: Mapping[str, Any]) -> str:
        """Lay the files out anew for another configuration; "" or why it makes no difference to them.

        raw: what changes in config.json.
        """
        changed = self.format.layout(replace(self.job, config=config, file=self._file(raw)))
        pairs = list(zip(changed, self._layouts, strict=True))
        heads = [(new, old) for new, old in pairs if (new.head, new.size) != (old.head, old.size)]
        if any(old.parts and (new.parts, new.size) != (old.parts, old.size) for new, old in heads):
            return "the weights would have to move"
        fixed = [
            (self.folder / new.filename, there.offset, data)
            for new, old in pairs
            for there, was in zip(new.fixed, old.fixed, strict=True)
            if (data := there.make().tobytes()) != was.make().tobytes()
        ]
        for new, old in heads:
            self._rewrite(self.folder / new.filename, new.head, keep=bool(old.parts))
        for path, offset, data in fixed:
            self._overwrite(path, offset, data)
        return "" if heads or fixed else "the files have no place for it"

    def _file(self, raw: Mapping[str, Any]) -> Callable[[str], bytes | None]:
        def read(name: str) -> bytes | None:
            found = self.job.file(name)
            if name != "config.json" or found is None:
                return found
            config = json.loads(found)
            for key, value in raw.items():
                places = [p for p in (config.get("rope_scaling"), config.get("rope_parameters")) if isinstance(p, dict)]
                for place in (config, *places):
                    if key in place or (place is config and not places):
                        place[key] = value
            return json.dumps(config).encode()

        return read

    def _rewrite(self, path: Path, head: bytes, keep: bool) -> None:
        """A new head; the rest of the file stays where it holds weights."""
        if keep:
            self._overwrite(path, 0, head)
            return
        before = path.read_bytes()
        path.write_bytes(head)
        self._undo.append(lambda: _put(path, before))

    def _overwrite(self, path: Path, offset: int, data: bytes) -> None:
        with _opened(path) as descriptor:
            before = os.pread(descriptor, len(data), offset)
            os.pwrite(descriptor, data, offset)

        def undo() -> None:
            with _opened(path) as again:
                os.pwrite(again, before, offset)

        self._undo.append(undo)


def _put(path: Path, data: bytes) -> None:
    path.write_bytes(data)


class _opened:
    """A file opened for reading and writing, as a descriptor."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> int:
        self._descriptor = os.open(self._path, os.O_RDWR)
        return self._descriptor

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def _write(descriptor: int, parts: Sequence[Any], start: int, arrays: Sequence[Any]) -> None:
    lock = Lock()
    for part, array in zip(parts, arrays, strict=True):
        regions.write(descriptor, part, start, array, lock)


# The mistakes


def _named(copy: Copy, part: str) -> Iterator[Step]:
    return (step for name, step in copy.steps.items() if part in name)


def _swap_gate_and_up(copy: Copy) -> str:
    for gate in list(_named(copy, ".gate_proj.")):
        up = copy.steps[gate.name.replace(".gate_proj.", ".up_proj.")]
        if gate.scheme.name != up.scheme.name:
            return f"gate is {gate.scheme.name} and up {up.scheme.name}"
        for start, stop in leaves(gate.spec.shape):
            both = copy.leaf(gate, start, stop), copy.leaf(up, start, stop)
            copy.put(gate, start, replace(both[1], name=gate.name))
            copy.put(up, start, replace(both[0], name=up.name))
    return ""


def _drop_sinks(copy: Copy) -> str:
    for step in _named(copy, ".sinks"):
        copy.change(step, lambda q: _floats(q, np.full(q.shape, _GONE, np.float32)))
    return ""


def _window(copy: Copy) -> str:
    window = copy.job.config.sliding_window + 1
    return copy.relay(replace(copy.job.config, sliding_window=window), {"sliding_window": window})


def _truncate_yarn(copy: Copy) -> str:
    rope = copy.job.config.rope
    if rope.kind != "yarn" or rope.truncate:
        return "the release has none, or a rounded one"
    why_not = copy.relay(replace(copy.job.config, rope=replace(rope, truncate=True)), {"truncate": True})
    return f"{why_not}: llama.cpp rounds the range of every file" if why_not and copy.format.name == "gguf" else why_not


def _scale_off_by_one(copy: Copy) -> str:
    step = next((s for s in _named(copy, ".down_proj.weight") if s.scheme.kind != "float"), None)
    if step is None:
        return "its experts have no scales"

    def next_scale(q: QTensor) -> QTensor:
        assert q.scales is not None
        scales = q.scales.copy()
        first = (0,) * scales.ndim
        if scales.dtype == np.uint8:
            scales[first] += 1  # e8m0: twice as large
        else:
            scales[first] *= 2
        return replace(q, scales=scales)

    copy.change(step, next_scale, range(1))
    return ""


def _swap_nibbles(copy: Copy) -> str:
    step = next((s for s in _named(copy, ".down_proj.weight") if s.scheme.bits == 4), None)
    if step is None:
        return "none of its tensors has 4 bits"

    def swap(q: QTensor) -> QTensor:
        pairs = unpack_nibbles(q.data).reshape(*q.data.shape, 2)
        return replace(q, data=pack_nibbles(pairs[..., ::-1].reshape(*q.data.shape[:-1], -1)))

    copy.change(step, swap)
    return ""


def _round_router(copy: Copy) -> str:
    def rounded(q: QTensor) -> QTensor:
        return _floats(q, decode.values(round_to(q, _ROUTER)))

    for step in _named(copy, ".router.weight"):
        if step.scheme.kind != "float" or step.spec.shape[-1] % _ROUTER.group:
            return "its router is no matrix of floats in groups of 32"
        copy.change(step, rounded)
    return ""


def _zero_expert(copy: Copy) -> str:
    layer = next(iter(_named(copy, ".down_proj.weight"))).name.rpartition(".mlp.")[0]
    for part in ("gate", "up", "down"):
        step = copy.steps[f"{layer}.mlp.experts.{part}_proj.weight"]
        copy.change(step, _zeroed, range(1))
    return ""


def _zeroed(q: QTensor) -> QTensor:
    if q.scheme.kind == "float":
        return _floats(q, np.zeros(q.shape, np.float32))
    zero = 0 if q.scheme.kind == "e2m1" else q.scheme.zero
    codes = np.full(q.shape, zero, np.uint8)
    return replace(q, data=pack_nibbles(codes) if q.scheme.bits == 4 else codes)


def _floats(q: QTensor, values: F32) -> QTensor:
    """The same tensor with other numbers, rounded to its type."""
    kind = q.scheme.float_type
    if kind == "bf16":
        data = f32_to_bf16(values).view(np.uint8)
    else:
        data = np.ascontiguousarray(values, np.float32 if kind == "f32" else np.float16).view(np.uint8)
    return replace(q, data=data.reshape(q.data.shape))


CONTROLS = (
    Control("gate and up swapped", "every expert's gate and up projection in each other's place", _swap_gate_and_up),
    Control("sinks dropped", "attention without its sinks", _drop_sinks),
    Control("window off by one", "sliding layers see one key more", _window),
    Control("scale off by one", "one scale of one block of one expert is twice what it should be", _scale_off_by_one),
    Control("nibbles swapped", "one expert tensor with the two codes of every byte exchanged", _swap_nibbles),
    Control("YaRN truncated", "the range of YaRN's correction is rounded outward", _truncate_yarn),
    Control("router in 4 bits", "every router rounded to 4 bits in groups of 32", _round_router),
    Control("expert zeroed", "one expert of the first layer is all zeros", _zero_expert),
)
