"""CPU seconds of one calibrated rounding at the released shape, 2880 x 2880, part by part, on one thread.

python benchmarks/gptq_step.py --out benchmarks/results/gptq_step.json

`objective` is |(W - Q) X|^2 as a share of that of rounding to nearest with the same scale rule.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from exporter.quantize.gptq import Solved, correction, factor, gptq
from exporter.quantize.grids import Grid, grid_for
from exporter.types import Scheme


def cpu_seconds(work: Callable[[], Any], repeat: int = 3) -> tuple[float, Any]:
    """The least of several runs, and the result of the last."""
    best, result = float("inf"), None
    for _ in range(repeat):
        clock = time.process_time()
        result = work()
        best = min(best, time.process_time() - clock)
    return round(best, 3), result


def nearest(weights: torch.Tensor, grid: Grid) -> Solved:
    """Each group rounded on its own."""
    groups = weights[0].unflatten(0, (-1, grid.group))  # [K / group, group, N]
    scales = grid.choose(groups, torch.ones(groups.shape[:2]))
    levels = grid.level(groups, grid.divisor(scales)[:, None])
    return Solved(levels.flatten(0, 1)[None], scales[None], torch.zeros(()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=2880)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(8192, a.size) + torch.randn(8192, 1) / 2
    x[:, :40] *= 6  # a few inputs are much larger than the rest, as in real layers
    hessian, weights = (x.T @ x)[None], torch.randn(1, a.size, a.size) / 50

    def objective(solved: Solved) -> float:
        difference = weights - solved.values()
        return float((difference * (hessian @ difference)).sum())

    answer: dict[str, Any] = {"size": a.size, "threads": 1, "cpu_s": {}, "objective": {}}
    with torch.inference_mode():
        answer["cpu_s"]["factor"], f = cpu_seconds(lambda: factor(hessian, 0.01))
        answer["cpu_s"]["correction"], _ = cpu_seconds(lambda: correction(hessian, hessian / 100, 0.02))
        schemes = [("int4-g32", rule) for rule in ("absmax", "mse", "signed-mse")]
        schemes += [("int4-g64", "signed-mse"), ("int8-g32", "absmax"), ("mxfp4", "mse")]
        for name, rule in schemes:
            grid, label = grid_for(Scheme.parse(name).with_rule(rule)), f"gptq {name} {rule}"
            answer["cpu_s"][label], solved = cpu_seconds(lambda grid=grid: gptq(weights, f, grid))
            answer["objective"][label] = round(objective(solved) / objective(nearest(weights, grid)), 4)
    answer["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    text = json.dumps(answer, indent=1)
    print(text)
    if a.out:
        a.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
