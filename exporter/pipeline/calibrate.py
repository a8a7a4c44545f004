"""Fill the store with what needs calibration, before anything else is made of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from exporter.errors import Refused
from exporter.model import ModelConfig, parameter_count
from exporter.numerics import decode
from exporter.numerics.floats import F32
from exporter.pipeline import leaves as parallel
from exporter.pipeline.calibration import Windows
from exporter.pipeline.plan import BASE_MEMORY
from exporter.pipeline.progress import Progress
from exporter.pipeline.quantize import obtain, tasks
from exporter.pipeline.store import Source, Store
from exporter.quantize.sequential import Calibration
from exporter.quantize.solve import Facts
from exporter.types import QTensor, leaf_range, leaf_rows
from exporter.types.recipe import CalibrationSpec, GptqSpec, Step
from exporter.types.sizes import format_size

_TORCH_MEMORY = 400_000_000  # the library, once it is loaded
# Copies of one expert's matrix and of its second moments that are alive at once while it is rounded.
_MATRICES = 24


@dataclass(frozen=True)
class Calibrated:
    """What the calibrated steps of a recipe see, and how they are rounded."""

    windows: Windows
    spec: GptqSpec

    def key(self) -> str:
        """Names everything about the calibration that the numbers depend on."""
        tokens = np.ascontiguousarray(self.windows.tokens)
        h = hashlib.sha256(f"{self.spec} {tokens.shape}\n".encode())
        h.update(tokens.tobytes())
        return h.hexdigest()

    def json(self) -> dict[str, object]:
        """For the manifest."""
        windows, length = self.windows.tokens.shape
        return {
            "text": self.windows.source,
            "sha256": self.windows.sha256,
            "windows": windows,
            "length": length,
            "damp": self.spec.damp,
            "hessian": self.spec.hessian,
        }


def calibrated_steps(steps: Sequence[Step]) -> list[Step]:
    return [s for s in steps if s.method == "gptq"]


def calibration_memory(config: ModelConfig, tokens: int) -> int:
    """Bytes that rounding one expert at a time takes: matrices, and inner activations if it is sent every token.

    Hidden states are not counted. They are mapped files, whose pages the system takes back when it needs them.
    """
    k = max(config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim)
    return BASE_MEMORY + _TORCH_MEMORY + _MATRICES * k * k * 4 + tokens * config.intermediate_size * 4


def require_memory(config: ModelConfig, setting: CalibrationSpec, max_memory: int) -> None:
    """Raises Refused where calibration takes more than `max_memory` bytes."""
    need = calibration_memory(config, setting.windows * setting.length)
    if need > max_memory:
        raise Refused(
            f"--max-memory {format_size(max_memory)} is too small: calibration needs {format_size(need)}",
            hint=f"--max-memory {-(-need // 10**6)}M, or fewer windows in the recipe's [calibration]",
        )


def calibration_disk(config: ModelConfig, tokens: int) -> int:
    """Bytes of hidden states on disk at the worst moment: input, output and sums, of two streams each."""
    return 6 * tokens * config.hidden_size * 4


def starved(store: Store, steps: Sequence[Step]) -> list[str]:
    """Experts that the router sent too few tokens, with how many: "layer 3 expert 9 (12 tokens)"."""
    found: dict[tuple[int, int], int] = {}
    for step in calibrated_steps(steps):
        if step.spec.role != "expert" or step.spec.layer is None:
            continue
        for expert, facts in enumerate(store.facts(step)):
            if facts.get("added"):
                found[step.spec.layer, expert] = facts["tokens"] - facts["added"]
    return [f"layer {layer} expert {expert} ({n} tokens)" for (layer, expert), n in sorted(found.items())]


class StoreNumbers:
    """The store as calibration sees it; see quantize.sequential.Numbers."""

    def __init__(self, store: Store, source: Source) -> None:
        self._store, self._source = store, source
        self._whole: set[tuple[str, int]] = set()

    def step(self, name: str) -> Step:
        return self._store.steps[name]

    def has(self, name: str, leaf: int) -> bool:
        if (name, leaf) not in self._whole and self._store.intact(self.step(name), leaf) is not None:
            self._whole.add((name, leaf))
        return (name, leaf) in self._whole

    def put(self, name: str, leaf: int, q: QTensor, facts: Facts) -> None:
        self._store.append(self.step(name), leaf, q, facts.json())
        self._whole.add((name, leaf))

    def final(self, name: str, start: int, stop: int) -> F32:
        step = self.step(name)
        rows = leaf_rows(step.spec.shape)
        first = start // rows
        parts = [decode.values(obtain(self._store, step, i, self._source)) for i in range(first, -(-stop // rows))]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        offset = leaf_range(step.spec.shape, first)[0]
        return whole[start - offset : stop - offset]

    def released(self, name: str, start: int, stop: int) -> F32:
        return decode.values(self._source(name, start, stop))


def calibrate(
    store: Store,
    steps: Sequence[Step],
    source: Source,
    config: ModelConfig,
    calibrated: Calibrated,
    device: str,
    workers: int,
    progress: Progress,
) -> None:
    """Bring every calibrated leaf into the store; what is there and whole is kept. Resumes in a layer's middle."""
    numbers = StoreNumbers(store, source)
    missing: list[tuple[str, int]] = []

    def look(task: tuple[Step, int]) -> None:
        step, leaf = task
        if not numbers.has(step.name, leaf):
            missing.append((step.name, leaf))

    parallel.each(tasks(calibrated_steps(steps)), look, workers)
    folder = store.folder / "calibration"
    job = Calibration(
        config,
        numbers,
        calibrated.windows.tokens,
        calibrated.spec,
        device,
        folder,
        experts_at_once=_experts_at_once(config, device),
        progress=progress.advance,
    )
    if not missing:
        job.spill.remove()
        return
    progress.stage("calibrate", parameter_count(config), "parameters")
    with store.writing():
        job.run()
    progress.done()


def _experts_at_once(config: ModelConfig, device: str) -> int:
    """On a GPU as many experts as half of its free memory takes; on a CPU a batch gains nothing."""
    if not device.startswith("cuda"):
        return 1
    from exporter.model.torch import import_torch

    free = import_torch().cuda.mem_get_info(device)[0]
    k = max(config.hidden_size, config.intermediate_size)
    return int(max(1, min(config.num_local_experts, free // 2 // (_MATRICES * k * k * 4))))
