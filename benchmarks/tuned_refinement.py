"""Does tuning by gradients, as auto-round does it, improve numbers that our GPTQ has chosen?

    python benchmarks/tuned_refinement.py tests/data/tiny-gpt-oss --out benchmarks/results/tuned_refinement.json

Both rows go through the model layer by layer with the same moments, targets and codes to start from: INT4 in
groups of 32 for attention and experts. The tuned row then moves rounding offsets and scales of a block (one
attention, one expert) by signed gradient steps on the error of the block's output, the step falling to zero,
and keeps the best of what it saw, measured on all calibration tokens. Both end in 4-bit codes with float16
scales. Whole weights in memory: for small checkpoints.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from exporter.checkpoint import open_checkpoint
from exporter.model.layer import Layer, rms_norm
from exporter.model.reference import embed, run_layers
from exporter.numerics import decode
from exporter.quantize.gptq import Solved, gptq
from exporter.quantize.grids import grid_for
from exporter.quantize.hessian import Moments
from exporter.quantize.solve import Problem
from exporter.types import Scheme
from exporter.types.recipe import GptqSpec
from exporter.validate import text

SCHEME = Scheme.parse("int4-g32").with_rule("signed-mse")
GROUP = SCHEME.group


class Tuned:
    """Codes and scales of a matrix [K, N], with an offset on each code and a share on each scale to be learnt."""

    def __init__(self, solved: Solved) -> None:
        self.levels, self.scales = solved.levels[0].clone(), solved.scales[0].clone()
        self.offset = torch.zeros_like(self.levels, requires_grad=True)
        self.share = torch.zeros_like(self.scales, requires_grad=True)

    def values(self, stored: bool = False) -> Tensor:
        """[K, N]; gradients pass straight through the rounding. `stored`: with float16 scales."""
        moved = self.levels + self.offset
        levels = (moved + (moved.round() - moved).detach()).clamp(-8, 7)
        scales = self.scales * (1 + self.share)
        scales = scales.half().float() if stored else scales
        return (levels.unflatten(0, (-1, GROUP)) * scales[:, None]).flatten(0, 1)

    def state(self) -> tuple[Tensor, Tensor]:
        return self.offset.detach().clone(), self.share.detach().clone()


def tune(
    blocks: Sequence[Tuned], forward: Callable[[list[Tensor], Tensor], Tensor], x: Tensor, target: Tensor,
    weight: Tensor, steps: int, batch: int,
) -> list[Tensor]:  # fmt: skip
    """Values of the blocks after `steps` signed gradient steps, or before them where that was better."""

    def error() -> float:
        with torch.no_grad():
            return float(((forward([b.values(True) for b in blocks], x) - target).square() * weight).mean())

    best, kept = error(), [b.state() for b in blocks]
    random = torch.Generator().manual_seed(0)
    for step in range(steps):
        some = torch.randperm(len(x), generator=random)[:batch]
        out = forward([b.values() for b in blocks], x[some])
        ((out - target[some]).square() * weight[some]).mean().backward()
        rate = (1 - step / steps) / steps  # auto-round's: 1 / steps, falling to zero
        with torch.no_grad():
            for b in blocks:
                b.offset -= rate * b.offset.grad.sign()
                b.share -= rate / 5 * b.share.grad.sign()
                b.offset.grad = b.share.grad = None
        if step % 50 == 49 and (now := error()) < best:
            best, kept = now, [b.state() for b in blocks]
    for b, (offset, share) in zip(blocks, kept, strict=True):
        b.offset, b.share = offset, share
    return [b.values(True) for b in blocks]


class Model:
    """One pass through a checkpoint; `weights` become the quantized ones."""

    def __init__(self, folder: Path, steps: int) -> None:
        with open_checkpoint(folder) as checkpoint:
            self.config = checkpoint.config
            read = {s.name: decode.values(checkpoint.read(s.name, 0, s.shape[0])).copy() for s in checkpoint.specs}
        self.released = {name: torch.from_numpy(values) for name, values in read.items()}
        self.weights, self.steps = dict(self.released), steps

    def reader(self, weights: dict[str, Tensor]) -> Callable[[str, int, int], np.ndarray]:
        return lambda name, start, stop: weights[name][start:stop].numpy()

    @torch.no_grad()
    def log_probabilities(self, weights: dict[str, Tensor], tokens: np.ndarray) -> Tensor:
        c, read = self.config, self.reader(weights)
        x = embed(c, read, tokens, "cpu")[None].contiguous()
        run_layers(c, read, x, [c.rope], "cpu")
        rows = rms_norm(x, weights["model.norm.weight"], c.rms_norm_eps).view(-1, c.hidden_size)
        return torch.log_softmax((rows @ weights["lm_head.weight"].T).double(), -1)

    def solve(self, names: Sequence[str], x: Tensor, released: Tensor, expert: int | None = None) -> list[Solved]:
        """GPTQ of matrices that share inputs x [n, K], as the product does it."""
        moments = Moments(x.shape[-1], "cpu")
        moments.add(x, released)
        problem, grid = Problem([moments], [0], GptqSpec()), grid_for(SCHEME)
        own = [self.released[n] if expert is None else self.released[n][expert] for n in names]
        w = [m.T[None].contiguous() for m in own]
        return [gptq(torch.baddbmm(m, problem.correction, m), problem.factor, grid) for m in w]

    def run(self, tokens: np.ndarray) -> None:
        with torch.no_grad():
            x = embed(self.config, self.reader(self.released), tokens, "cpu").clone()
        streams = [x, x.clone()]
        for index in range(self.config.num_hidden_layers):
            layer = Layer(self.config, index, self.reader(self.released), "cpu")
            streams = self.experts(layer, self.attention(layer, streams))

    def attention(self, layer: Layer, streams: list[Tensor]) -> list[Tensor]:
        c, prefix = self.config, layer.prefix
        names = [f"{prefix}self_attn.{n}_proj.weight" for n in "qkvo"]
        biases = [self.released[n.replace("weight", "bias")] for n in names]
        norm, sinks = self.released[prefix + "input_layernorm.weight"], self.released[prefix + "self_attn.sinks"]
        cos, sin = layer.rotation(streams[0].shape[1], c.rope)

        def mixed(values: Sequence[Tensor], x: Tensor) -> Tensor:
            pairs = {n: (w.T, b) for n, w, b in zip("qkv", values, biases, strict=False)}
            return layer.mix(rms_norm(x, norm, c.rms_norm_eps), pairs, sinks, cos, sin)

        def whole(values: list[Tensor], x: Tensor) -> Tensor:
            return mixed(values[:3], x) @ values[3] + biases[3]

        with torch.no_grad():
            h = [rms_norm(x, norm, c.rms_norm_eps).flatten(0, 1) for x in streams]
            found = self.solve(names[:3], *h)
            released = [self.released[n].T for n in names]
            m = [mixed([f.values()[0] for f in found], streams[0]), mixed(released, streams[1])]
            found += self.solve(names[3:], *(a.flatten(0, 1) for a in m))
            target = m[1] @ released[3] + biases[3]
        values = [f.values()[0] for f in found]
        if self.steps:
            blocks = [Tuned(f) for f in found]
            values = tune(blocks, whole, streams[0], target, torch.ones(len(target), 1, 1), self.steps, 8)
        self.weights |= {n: v.T.contiguous() for n, v in zip(names, values, strict=True)}
        with torch.no_grad():
            return [streams[0] + whole(values, streams[0]), streams[1] + target]

    def experts(self, layer: Layer, streams: list[Tensor]) -> list[Tensor]:
        c, prefix = self.config, layer.prefix
        norm = self.released[prefix + "post_attention_layernorm.weight"]
        names = [layer.expert_name(p) for p in ("gate", "up", "down")]
        self.weights |= {n: self.released[n].clone() for n in names}
        flat = [x.flatten(0, 1) for x in streams]
        with torch.no_grad():
            routes = [layer.route(x, norm) for x in flat]
        totals = [torch.zeros_like(x) for x in flat]
        for e in range(c.num_local_experts):
            biases = [self.released[n.replace("weight", "bias")][e] for n in names]

            def inner(values: Sequence[Tensor], h: Tensor, b: list[Tensor] = biases) -> Tensor:
                return layer.swiglu(h @ values[0] + b[0], h @ values[1] + b[1])

            def whole(values: list[Tensor], h: Tensor, b: list[Tensor] = biases) -> Tensor:
                return inner(values, h, b) @ values[2] + b[2]

            with torch.no_grad():
                (rows, slot), (others, other_slot) = (torch.where(chosen == e) for chosen, _ in routes)
                h = [rms_norm(x[rows], norm, c.rms_norm_eps) for x in flat]
                released = [self.released[n][e].T for n in names]
                found = self.solve(names[:2], *h, expert=e)
                middle = inner(released, h[1])
                found += self.solve(names[2:], inner([f.values()[0] for f in found], h[0]), middle, expert=e)
                target, share = middle @ released[2] + biases[2], routes[0][1][rows, slot, None]
                out = whole(released, rms_norm(flat[1][others], norm, c.rms_norm_eps))
                totals[1].index_add_(0, others, out * routes[1][1][others, other_slot, None])
            values = [f.values()[0] for f in found]
            if self.steps:
                values = tune([Tuned(f) for f in found], whole, h[0], target, share.square(), self.steps, 2048)
            with torch.no_grad():
                for n, v in zip(names, values, strict=True):
                    self.weights[n][e] = v.T
                totals[0].index_add_(0, rows, whole(values, h[0]) * share)
        return [(x + t).view_as(s) for x, t, s in zip(flat, totals, streams, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    parts = (("calibration", a.windows), ("held-out", a.held_out))
    tokenizer = a.checkpoint / "tokenizer.json"
    calibration, held = (text.windows(tokenizer, text.standard_library(part), n, 256).tokens for part, n in parts)
    rows: dict[str, dict[str, float]] = {}
    by_window: dict[str, Tensor] = {}
    for name, steps in (("gptq", 0), (f"gptq, then {a.steps} steps", a.steps)):
        model, clock = Model(a.checkpoint, steps), time.process_time()
        model.run(calibration)
        cpu = time.process_time() - clock
        want = model.log_probabilities(model.released, held)
        got = model.log_probabilities(model.weights, held)
        kl = (want.exp() * (want - got)).sum(-1).view(len(held), -1).mean(1)
        by_window[name] = kl
        same = (want.argmax(-1) == got.argmax(-1)).double().mean()
        rows[name] = {"kl_mean": float(kl.mean()), "top1": float(same), "cpu_s": round(cpu, 1)}
    difference = by_window[name] - by_window["gptq"]
    error = float(difference.std() / len(difference) ** 0.5)
    answer = {
        "what": "INT4 in groups of 32, attention and experts",
        "tokens": {"calibration": list(calibration.shape), "held_out": list(held.shape)},
        "rows": rows,
        "tuned_less_gptq": {"mean": float(difference.mean()), "standard_error": error},
    }
    print(json.dumps(answer, indent=1))
    if a.out:
        a.out.write_text(json.dumps(answer, indent=1) + "\n")


if __name__ == "__main__":
    main()
