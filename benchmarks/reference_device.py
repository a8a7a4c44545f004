"""The reference on a device: how long its passes take, in how much memory, and how far it is from the CPU's.

    python benchmarks/reference_device.py MODEL --device cuda --limit 16G --out benchmarks/results/reference-h100.json

Each stage runs under the limit, enforced by torch's own allocator on CUDA. `--beside-cpu`: the windows are computed on
the CPU too and compared. Prints and writes one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exporter.model.reference import Routes, reference_logits
from exporter.model.torch import import_torch
from exporter.model.weights import Weights, room
from exporter.numerics import decode
from exporter.numerics.floats import F32
from exporter.pipeline.conversations import Author, conversations
from exporter.pipeline.machine import usable_cpus
from exporter.pipeline.progress import Progress
from exporter.pipeline.source import open_model
from exporter.types.sizes import parse_size
from exporter.validate import hardware, limits, text, twins
from exporter.validate.metrics import between, flips, summary

torch = import_torch()  # before anything else imports it: see there
_AHEAD = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=parse_size, default=0)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--write", action="store_true", help="also let the model write conversations")
    parser.add_argument("--beside-cpu", action="store_true")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    report = measure(asked)
    said = json.dumps(report, indent=1)
    print(said)
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(said + "\n")


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    cuda = asked.device.startswith("cuda")
    if asked.limit and cuda:
        limits.limit_torch(asked.limit)
    checkpoint = open_model(str(asked.model), Progress()).checkpoint
    config = checkpoint.config
    assert checkpoint.tokenizer_file is not None
    tokens = text.windows(checkpoint.tokenizer_file, text.standard_library(), asked.windows, asked.length).tokens

    def read(name: str, start: int, stop: int) -> F32:
        return decode.values(checkpoint.read(name, start, stop))

    keep = min(room(asked.device), asked.limit // 2) if asked.limit else room(asked.device)
    weights = Weights(read, asked.device, keep, min(usable_cpus(), _AHEAD))
    stages: dict[str, Any] = {}
    routes = Routes(config, tokens.size)
    (release,) = _timed(
        stages,
        "first pass, weights read and decoded",
        cuda,
        lambda: reference_logits(config, weights, tokens, [config.rope], device=asked.device, routed=routes),
    )
    (again,) = _timed(
        stages,
        "second pass, with the weights that stayed",
        cuda,
        lambda: reference_logits(config, weights, tokens, [config.rope], device=asked.device),
    )
    variants = twins.twins(config, config.rope)
    first = tokens[:2]
    _timed(
        stages,
        f"{len(variants)} known mistakes on {first.size} tokens",
        cuda,
        lambda: reference_logits(config, weights, first, list(variants.values()), device=asked.device),
    )
    report: dict[str, Any] = {
        "model": asked.model.name,
        "layers": config.num_hidden_layers,
        "tokens": int(tokens.size),
        "device": torch.cuda.get_device_name() if cuda else platform.processor(),
        "limit_bytes": asked.limit,
        "kept_bytes": keep,
        "threads_that_decode": min(usable_cpus(), _AHEAD),
        "hardware": hardware.hardware(),
        "stages": stages,
        "same_again": summary(between(release, again)),
    }
    if asked.write:
        with tempfile.TemporaryDirectory() as scratch:
            author = Author(checkpoint, Path(scratch), asked.device, Progress(), weights)
            written = _timed(
                stages, "writes 4 conversations of 256 tokens", cuda, lambda: conversations(author, 4, 512)
            )
        report["written"] = written.windows.source
    if asked.beside_cpu:
        on_cpu = Routes(config, tokens.size)
        (beside,) = _timed(
            stages,
            "the same on the CPU",
            False,
            lambda: reference_logits(config, read, tokens, [config.rope], device="cpu", routed=on_cpu),
        )
        positions = between(beside, release)
        report["from_the_cpu"] = summary(positions)
        report["router_from_the_cpu"] = flips(on_cpu.experts, routes.experts, positions)
    return report


def _timed(stages: dict[str, Any], name: str, cuda: bool, work: Callable[[], Any]) -> Any:
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    started, cpu = time.perf_counter(), time.process_time()
    result = work()
    if cuda:
        torch.cuda.synchronize()
    stages[name] = {
        "seconds": round(time.perf_counter() - started, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device_peak_bytes": torch.cuda.max_memory_reserved() if cuda else None,
    }
    return result


if __name__ == "__main__":
    main()
