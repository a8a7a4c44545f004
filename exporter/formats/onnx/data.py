"""The files of weights beside graphs: which bytes of which file an initializer is, laid out and found again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from exporter.errors import ExporterError
from exporter.formats.base import FileLayout, Fixed, Located, Part
from exporter.formats.onnx.arrays import Array, Initializer
from exporter.formats.onnx.builder import Place
from exporter.formats.onnx.external import read_initializers
from exporter.model import ModelConfig
from exporter.model.rope import rotation_table
from exporter.types.qtensor import U8
from exporter.types.recipe import Step

_AGAIN = "exporter quantize ... --overwrite makes it again"
WAVES = {"cos_cache": np.cos, "sin_cache": np.sin}
_PAGE = 4096  # ONNX Runtime maps a tensor only where it starts on a page

# The arrays that `pack` gives for a step, and where they lie in initializers.
ArraysOf = Callable[[Step], list[Array]]
# Initializers that no number of the model decides, and what makes their bytes.
Tables = Mapping[Initializer, Callable[[], U8]]


@dataclass(frozen=True)
class DataFile:
    """A file of weights: which steps are in it, where its initializers start, and its size."""

    name: str
    steps: tuple[Step, ...]
    offsets: dict[Initializer, int]
    size: int


def data_files(groups: Sequence[Sequence[Step]], first: str, of: ArraysOf, tables: Tables) -> list[DataFile]:
    """A file for each group of steps, named after the `first`; `tables` come first of all."""
    files = []
    for i, steps in enumerate(groups):
        offsets: dict[Initializer, int] = {}
        at = 0
        held = [a.initializer for step in steps for a in of(step)]
        for initializer in (*(tables if i == 0 else ()), *held):
            if initializer not in offsets:
                offsets[initializer] = at
                at += -(-initializer.nbytes // _PAGE) * _PAGE
        files.append(DataFile(first if i == 0 else f"{first}_{i}", tuple(steps), offsets, at))
    return files


def rotation_tables(config: ModelConfig, dtype: str) -> Tables:
    """Cosines and sines of every position, "float" or "float16"."""
    shape = (config.max_position_embeddings, config.head_dim // 2)
    return {Initializer(name, dtype, shape): functools.partial(_table, config, name, dtype) for name in WAVES}


def _table(config: ModelConfig, name: str, dtype: str) -> U8:
    table = rotation_table(WAVES[name], config.rope, config.head_dim, config.max_position_embeddings)
    return table.astype(np.float32 if dtype == "float" else np.float16).reshape(-1).view(np.uint8)


def places(files: Sequence[DataFile]) -> dict[Initializer, Place]:
    """Where a graph in the same folder finds its initializers."""
    return {i: Place(f.name.rpartition("/")[2], at) for f in files for i, at in f.offsets.items()}


def file_layout(file: DataFile, of: ArraysOf, tables: Tables) -> FileLayout:
    """Where the parts of every step go, and what lies between them."""
    starts = file.offsets
    parts = {
        step.name: tuple(replace(a.part, offset=starts[a.initializer] + a.part.offset) for a in of(step))
        for step in file.steps
    }
    fixed, ends = [], [*list(starts.values())[1:], file.size]
    for (initializer, at), end in zip(starts.items(), ends, strict=True):
        gap = at + initializer.nbytes
        if initializer in tables:
            fixed.append(Fixed(at, initializer.nbytes, tables[initializer]))
        if gap < end:
            fixed.append(Fixed(gap, end - gap, functools.partial(_zeros, end - gap)))
    return FileLayout(file.name, b"", file.size, parts, tuple(fixed))


def locate(
    graphs: Sequence[Path], folder: Path, steps: Sequence[Step], of: ArraysOf, tables: set[str]
) -> dict[str, Located]:
    """Every tensor of `steps` in a finished folder, where all `graphs` must find it. `tables`: names of those."""
    graph, *others = graphs
    found = read_initializers(graph, folder)
    located, unknown = {}, set(found) - tables
    for step in steps:
        parts: list[Part] = []
        for array in of(step):
            wanted, entry = array.initializer, found.get(array.initializer.name)
            if entry is None:
                raise ExporterError(f"{graph.name}: {wanted.name} is missing", hint=_AGAIN)
            if (entry.dtype, entry.shape) != (wanted.dtype, wanted.shape):
                raise ExporterError(
                    f"{graph.name}: {wanted.name} is {entry.dtype} {list(entry.shape)}; "
                    f"expected {wanted.dtype} {list(wanted.shape)}",
                    hint=_AGAIN,
                )
            parts.append(replace(array.part, offset=entry.offset + array.part.offset))
            unknown.discard(wanted.name)
            path = entry.path
        located[step.name] = Located(path, tuple(parts))
    if unknown:
        raise ExporterError(f"{graph.name}: unknown tensor {min(unknown)}", hint=_AGAIN)
    for other in others:
        if read_initializers(other, folder) != found:
            raise ExporterError(f"{other.name}: its weights are not those of {graph.name}", hint=_AGAIN)
    return located


def _zeros(nbytes: int) -> U8:
    return np.zeros(nbytes, np.uint8)
