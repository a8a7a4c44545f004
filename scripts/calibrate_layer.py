"""Round the experts and attention of one gpt-oss layer of the released shape, and say what it took.

    python scripts/calibrate_layer.py --device cuda --model 20b --tokens 65536

Weights are made up (MXFP4 experts, seeded), so the numbers mean nothing; time and memory are those of the
real thing. With --compare, the same layer is rounded on the CPU too and the shares of equal codes and scales
are reported: sums are taken in another order there, and a code at the border between two goes the other way.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import platform
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporter.model.config import ModelConfig
from exporter.model.released import RELEASED, released_repo
from exporter.model.tensors import tensor_specs
from exporter.numerics import decode, e2m1
from exporter.numerics.floats import F32
from exporter.quantize.sequential import Calibration
from exporter.quantize.solve import Facts
from exporter.types import QTensor, Scheme, TensorSpec, leaf_rows
from exporter.types.recipe import GptqSpec, Step


class MadeUp:
    """Numbers of a layer, made when they are asked for and the same every time."""

    def __init__(self, config: ModelConfig, scheme: Scheme) -> None:
        self.steps = {s.name: self._step(s, scheme) for s in tensor_specs(config)}
        self.made: dict[tuple[str, int], QTensor] = {}
        self.facts: dict[tuple[str, int], Facts] = {}

    def _step(self, spec: TensorSpec, scheme: Scheme) -> Step:
        bf16 = Scheme.parse("bf16")
        rounded = spec.role in ("expert", "linear")
        return Step(spec, "gptq" if rounded else "keep", bf16, scheme if rounded else bf16)

    def step(self, name: str) -> Step:
        return self.steps[name]

    def has(self, name: str, leaf: int) -> bool:
        return (name, leaf) in self.made

    def put(self, name: str, leaf: int, q: QTensor, facts: Facts) -> None:
        self.made[name, leaf], self.facts[name, leaf] = q, facts

    def final(self, name: str, start: int, stop: int) -> F32:
        if self.steps[name].method != "gptq":
            return self.released(name, start, stop)
        rows = leaf_rows(self.steps[name].spec.shape)
        first = start // rows
        parts = [decode.values(self.made[name, i]) for i in range(first, -(-stop // rows))]
        return np.concatenate(parts)[start - first * rows : stop - first * rows]

    def released(self, name: str, start: int, stop: int) -> F32:
        spec = self.steps[name].spec
        if spec.role == "expert":
            return np.stack([self._expert(spec, i) for i in range(start, stop)])
        rng = np.random.default_rng(int(hashlib.sha256(name.encode()).hexdigest()[:12], 16))
        if name == "model.embed_tokens.weight":
            return np.random.default_rng(start).standard_normal((stop - start, spec.shape[1]), np.float32)
        if name.endswith("norm.weight"):
            return np.ones(spec.shape, np.float32)[start:stop]
        return (rng.standard_normal(spec.shape, np.float32) * 0.02)[start:stop]

    def _expert(self, spec: TensorSpec, expert: int) -> F32:
        rng = np.random.default_rng(int(hashlib.sha256(f"{spec.name}{expert}".encode()).hexdigest()[:12], 16))
        n, k = spec.shape[1:]
        data = rng.integers(0, 256, (n, k // 2), np.uint8)
        return e2m1.dequantize(data, rng.integers(119, 122, (n, k // 32), np.uint8))


def run(config: ModelConfig, scheme: Scheme, tokens: int, spec: GptqSpec, device: str, at_once: int) -> dict[str, Any]:
    """Round the layer; figures, and the numbers under "numbers"."""
    numbers = MadeUp(config, scheme)
    ids = np.random.default_rng(0).integers(0, 180, (tokens // 512, 512))
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory() as folder:
        clock, cpu = time.perf_counter(), time.process_time()
        job = Calibration(config, numbers, ids, spec, device, Path(folder) / "spill", experts_at_once=at_once)
        job.run()
        seconds, cpu_seconds = time.perf_counter() - clock, time.process_time() - cpu
    errors = [f.error for f in numbers.facts.values()]
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "experts_at_once": job.experts_at_once,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_device_bytes": torch.cuda.max_memory_allocated(device) if cuda else None,
        "matrices": len(numbers.made),
        "mean_error": float(np.mean(errors)),
        "numbers": numbers.made,
    }


def equal_shares(a: dict[tuple[str, int], QTensor], b: dict[tuple[str, int], QTensor]) -> dict[str, float]:
    """Shares of codes and of scales that are equal in two runs."""
    codes = [np.mean(decode.codes(a[key]) == decode.codes(b[key])) for key in a]
    scales = [np.mean(a[key].scales == b[key].scales) for key in a]
    return {"codes": float(np.mean(codes)), "scales": float(np.mean(scales))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="20b", help="20b or 120b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--scheme", default="int4-g32")
    parser.add_argument("--hessian", default="routed", choices=("routed", "shared"))
    parser.add_argument("--at-once", type=int, default=0, help="experts in a batch; 1 on a CPU, 8 on a GPU")
    parser.add_argument("--compare", action="store_true", help="on the CPU too")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    released = RELEASED[released_repo(a.model)]
    config = dataclasses.replace(released, num_hidden_layers=1, layer_types=released.layer_types[:1])
    rule = "signed-mse" if a.scheme.startswith("int4") else "mse" if a.scheme == "mxfp4" else "absmax"
    scheme, spec = Scheme.parse(a.scheme).with_rule(rule), GptqSpec(hessian=a.hessian)
    done = run(config, scheme, a.tokens, spec, a.device, a.at_once or (8 if a.device.startswith("cuda") else 1))
    numbers = done.pop("numbers")
    answer: dict[str, Any] = {
        "what": f"one layer of {a.model}, {a.scheme} {rule}, {a.tokens} tokens",
        "hessian": a.hessian,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **done,
    }
    if a.compare:
        on_cpu = run(config, scheme, a.tokens, spec, "cpu", 1)
        answer["equal_to_cpu"] = equal_shares(numbers, on_cpu.pop("numbers"))
        answer["cpu"] = on_cpu
    text = json.dumps(answer, indent=1)
    print(text)
    if a.out:
        a.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
