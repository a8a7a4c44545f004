"""The experts of one layer: rounded and computed, a slice of them at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exporter.model.layer import Layer, rms_norm
from exporter.model.torch import import_torch
from exporter.quantize.hessian import Moments, topped_up
from exporter.quantize.solve import Numbers, Problem, by_scheme, naming
from exporter.types import QTensor
from exporter.types.recipe import GptqSpec

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 4096  # token rows at once


@dataclass
class Tokens:
    """Which tokens meet an expert, as sorted indices; shares float32 of the routed ones.

    `seen`: what it is calibrated on: `here`, topped up where those are too few.
    """

    here: Tensor
    share: Tensor
    released: Tensor
    released_share: Tensor
    seen: Tensor


class ExpertSlices:
    """`layers`: the layer with the numbers to be stored, and as released."""

    def __init__(self, layers: Sequence[Layer], numbers: Numbers, spec: GptqSpec, at_once: int) -> None:
        self.here, self.released = layers
        self.numbers, self.spec, self.at_once = numbers, spec, at_once
        self.config, self.device = self.here.config, self.here.device
        c = self.config
        self._norms = [layer.weight("post_attention_layernorm.weight", c.hidden_size) for layer in layers]
        self._biases = [
            {n: layer.weight(f"mlp.experts.{n}_proj.bias", c.num_local_experts) for n in ("gate", "up", "down")}
            for layer in layers
        ]
        self._shared: Problem | None = None

    def run(self, states: Tensor, totals: Tensor, progress: Callable[[int], None]) -> None:
        """Round the layer's experts and add their outputs to states [2, N, H]; `totals`: zeros for their sum."""
        torch, c = import_torch(), self.config
        self.states = states
        routes = [self._route(layer, s) for s, layer in enumerate((self.here, self.released))]
        self._totals = totals
        for first in range(0, c.num_local_experts, self.at_once):
            experts = range(first, min(first + self.at_once, c.num_local_experts))
            self._slice({e: self._tokens(e, routes) for e in experts})
            for e in experts:
                progress(e)
        for stream, total in zip(states, totals, strict=True):
            for rows, add in zip(torch.split(stream, _ROWS), torch.split(total, _ROWS), strict=True):
                rows += add

    def _route(self, layer: Layer, stream: int) -> tuple[Tensor, Tensor]:
        torch = import_torch()
        parts = [
            layer.route(rows.to(self.device), self._norms[stream]) for rows in torch.split(self.states[stream], _ROWS)
        ]
        return torch.cat([p[0].cpu() for p in parts]), torch.cat([p[1].cpu() for p in parts])

    def _tokens(self, expert: int, routes: Sequence[tuple[Tensor, Tensor]]) -> Tokens:
        torch = import_torch()
        (here, slot), (released, released_slot) = (torch.where(chosen == expert) for chosen, _ in routes)
        (_, shares), (_, released_shares) = routes
        want = max(self.config.hidden_size, self.config.intermediate_size)
        seen = topped_up(here, len(self.states[0]), want)
        return Tokens(here, shares[here, slot], released, released_shares[released, released_slot], seen)

    def _inputs(self, stream: int, rows: Tensor) -> Tensor:
        """Normalised inputs [n, H] of some tokens."""
        x = self.states[stream, rows].to(self.device)
        return rms_norm(x, self._norms[stream], self.config.rms_norm_eps)

    # One slice

    def _slice(self, tokens: dict[int, Tokens]) -> None:
        if names := self._missing(("gate", "up"), tokens):
            self._round(names, self._gate_up_problem(tokens), tokens)
        down = self._missing(("down",), tokens)
        moments = {e: Moments(self.config.intermediate_size, self.device) for e in tokens} if down else {}
        inner = {e: self._forward(e, t, moments.get(e)) for e, t in tokens.items()}
        if down:
            with naming(down[0]):
                problem = Problem(list(moments.values()), _added(tokens), self.spec)
            self._round(down, problem, tokens)
        for e, t in tokens.items():
            weight, bias = self.here.expert_weight("down", e), self._biases[0]["down"][e]
            self._add(0, t.here, t.share, inner.pop(e) @ weight.T + bias)

    def _missing(self, projections: Sequence[str], tokens: dict[int, Tokens]) -> list[str]:
        """Which of these are calibrated; none where every expert of the slice is there."""
        every = [self.here.expert_name(p) for p in projections]
        names = [n for n in every if self.numbers.step(n).method == "gptq"]
        return names if not all(self.numbers.has(n, e) for n in names for e in tokens) else []

    def _gate_up_problem(self, tokens: dict[int, Tokens]) -> Problem:
        torch = import_torch()
        name = self.here.expert_name("gate")
        if self.spec.hessian == "routed":
            moments = [self._moments(t.seen) for t in tokens.values()]
            with naming(name):
                return Problem(moments, _added(tokens), self.spec)
        if self._shared is None:
            with naming(name):
                self._shared = Problem([self._moments(torch.arange(len(self.states[0])))], [0], self.spec)
        return self._shared.repeated(len(tokens))

    def _moments(self, rows: Tensor) -> Moments:
        torch = import_torch()
        moments = Moments(self.config.hidden_size, self.device)
        for some in torch.split(rows, _ROWS):
            moments.add(self._inputs(0, some), self._inputs(1, some))
        return moments

    def _round(self, names: Sequence[str], problem: Problem, tokens: dict[int, Tokens]) -> None:
        """Round projections of every expert of the slice: one batch, so what is there already comes out again."""
        for scheme, alike in by_scheme(self.numbers, names).items():
            weights = [[self.numbers.released(n, e, e + 1)[0] for e in tokens] for n in alike]
            for name, found in zip(alike, problem.solve(alike, scheme, weights, self.device), strict=True):
                for e, (q, facts) in zip(tokens, found, strict=True):
                    if not self.numbers.has(name, e):
                        assert q.scales is not None
                        self.numbers.put(name, e, QTensor(name, q.scheme, q.data[None], q.scales[None]), facts)

    def _forward(self, expert: int, t: Tokens, moments: Moments | None) -> Tensor:
        """Inputs of `down` of the routed tokens, [n, I]; the released stream's output is added on the way."""
        torch = import_torch()
        # The same rows in the same batches whether there is something to learn or not: a product's last bits
        # depend on its shape, and a resumed run must get what the first one got.
        every = torch.cat((t.seen, t.released)).unique()
        here = _Expert(self.here, expert, self._biases[0])
        released = _Expert(self.released, expert, self._biases[1])
        down, bias = self.released.expert_weight("down", expert), self._biases[1]["down"][expert]
        kept = [torch.empty((0, self.config.intermediate_size), device=self.device)]
        for rows in torch.split(every, _ROWS):
            inner_released = released.inner(self._inputs(1, rows))
            out = torch.isin(rows, t.released)
            if bool(out.any()):
                share = t.released_share[torch.isin(t.released, rows)]
                self._add(1, rows[out], share, inner_released[out] @ down.T + bias)
            mine = torch.isin(rows, t.seen)
            inner = here.inner(self._inputs(0, rows[mine]))
            if moments:
                moments.add(inner, inner_released[mine])
            kept.append(inner[torch.isin(rows[mine], t.here)])
        inputs: Tensor = torch.cat(kept)
        return inputs

    def _add(self, stream: int, rows: Tensor, share: Tensor, out: Tensor) -> None:
        self._totals[stream].index_add_(0, rows, out.cpu() * share[:, None])


class _Expert:
    """Gate and up of one expert, decoded."""

    def __init__(self, layer: Layer, expert: int, biases: dict[str, Tensor]) -> None:
        self._layer = layer
        self._gate, self._up = (layer.expert_weight(n, expert) for n in ("gate", "up"))
        self._gate_bias, self._up_bias = biases["gate"][expert], biases["up"][expert]

    def inner(self, h: Tensor) -> Tensor:
        """The input of `down`, [n, I], for h [n, H]."""
        torch = import_torch()
        gate = torch.addmm(self._gate_bias, h, self._gate.T)
        return self._layer.swiglu(gate, torch.addmm(self._up_bias, h, self._up.T))


def _added(tokens: dict[int, Tokens]) -> list[int]:
    return [len(t.seen) - len(t.here) for t in tokens.values()]
