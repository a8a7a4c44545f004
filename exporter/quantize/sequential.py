"""Calibrated rounding of a whole model, layer by layer, each fed by the layers already rounded.

Two streams of hidden states go through the model side by side: one meets the numbers that will be stored, the
other the released ones. A weight is rounded for the inputs that it will really get, and aimed at what the
released model would have made of its own (`gptq.correction`). Within a layer the order is that of the
computation: q, k and v, then o; of each expert gate and up, then down. No weight is used before it is final,
and every expert is computed once for its numbers and its outputs both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.errors import ExporterError
from exporter.model.config import ModelConfig
from exporter.model.layer import Layer, rms_norm
from exporter.model.reference import I64, embed
from exporter.model.torch import as_tensor, import_torch
from exporter.quantize.experts import ExpertSlices
from exporter.quantize.hessian import Moments
from exporter.quantize.solve import Facts, Numbers, Problem, by_scheme, naming
from exporter.quantize.spill import Spill
from exporter.types import QTensor, leaf_count, leaf_rows
from exporter.types.recipe import GptqSpec

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 4096  # token rows at once, and rows of a matrix that are rounded at once
_EXPERT = ("gate", "up", "down")


class Calibration:
    """One pass of `tokens` [W, T] through the model. `run` does what is missing and leaves nothing behind."""

    def __init__(
        self,
        config: ModelConfig,
        numbers: Numbers,
        tokens: I64,
        spec: GptqSpec,
        device: str,
        folder: Path,
        *,
        experts_at_once: int = 1,
        progress: Callable[[int, str], None] = lambda parameters, name: None,
    ) -> None:
        self.config, self.numbers, self.tokens, self.spec, self.device = config, numbers, tokens, spec, device
        self.spill = Spill(folder, tokens.size, config.hidden_size)
        self.experts_at_once, self.progress = experts_at_once, progress

    def run(self) -> None:
        """Round every calibrated tensor that is not there yet."""
        torch, c = import_torch(), self.config
        with torch.inference_mode():
            start = self.spill.latest()
            if start is None or any(map(self._incomplete, range(start))):
                states = self.spill.create()
                for stream, read in zip(states, (self.numbers.final, self.numbers.released), strict=True):
                    stream[:] = embed(c, read, self.tokens, "cpu").view(-1, c.hidden_size).numpy()
                del states
                self.spill.commit(0)
                start = 0
            for index in range(start, c.num_hidden_layers):
                self._within_memory(index)
            self._head(c.num_hidden_layers)
        self.spill.remove()

    def _incomplete(self, index: int) -> bool:
        """Whether something of a layer that was done is there no longer: a damaged leaf of the store."""
        prefix = f"model.layers.{index}."
        names = [*(f"self_attn.{n}_proj.weight" for n in "qkvo"), *(f"mlp.experts.{n}_proj.weight" for n in _EXPERT)]
        return bool(self._missing([prefix + n for n in names]))

    def _within_memory(self, index: int) -> None:
        """A layer, with fewer experts at once where the device has no room; what is rounded already stays."""
        torch = import_torch()
        while True:
            try:
                return self._layer(index)
            except torch.OutOfMemoryError:
                if self.experts_at_once == 1:
                    raise ExporterError(
                        f"{self.device} has too little memory for one expert of layer {index} at a time",
                        hint="free the device, use less calibration text, or --device cpu; what is done is kept",
                    ) from None
                self.experts_at_once //= 2
            torch.cuda.empty_cache()

    def _layer(self, index: int) -> None:
        torch, c = import_torch(), self.config
        states = torch.from_numpy(self.spill.open(index))  # [2, N, H]
        layers = tuple(Layer(c, index, read, self.device) for read in (self.numbers.final, self.numbers.released))
        self._attention(layers, states.view(2, *self.tokens.shape, c.hidden_size))
        self.progress(_attention_parameters(c), layers[0].prefix + "self_attn")
        slices = ExpertSlices(layers, self.numbers, self.spec, self.experts_at_once)
        totals = torch.from_numpy(self.spill.scratch(states.shape))
        slices.run(
            states,
            totals,
            lambda expert: self.progress(3 * c.intermediate_size * c.hidden_size, f"layer {index}, expert {expert}"),
        )
        if not bool(torch.isfinite(states).all()):
            raise ExporterError(
                f"hidden states are not finite after layer {index}",
                hint="exporter doctor CHECKPOINT finds damaged tensors",
            )
        del states, totals
        self.spill.commit(index + 1)

    # Attention

    def _attention(self, layers: Sequence[Layer], states: Tensor) -> None:
        """Round q, k, v and o, and add attention's output to states [2, W, T, H]."""
        torch, c = import_torch(), self.config
        here = layers[0]
        names = {n: f"{here.prefix}self_attn.{n}_proj.weight" for n in "qkvo"}
        norms = [layer.weight("input_layernorm.weight", c.hidden_size) for layer in layers]
        sinks = [layer.weight("self_attn.sinks", c.num_attention_heads) for layer in layers]
        cos, sin = here.rotation(states.shape[2], c.rope)

        at_once = max(1, _ROWS // states.shape[2])
        batches = [slice(w, w + at_once) for w in range(0, states.shape[1], at_once)]

        def inputs(windows: slice) -> list[Tensor]:
            pair = (states[s, windows].to(self.device) for s in (0, 1))
            return [rms_norm(x, norm, c.rms_norm_eps) for x, norm in zip(pair, norms, strict=True)]

        self._round([names[n] for n in "qkv"], lambda: map(inputs, batches), c.hidden_size)
        weights = [{n: layer.projection(n) for n in "qkv"} for layer in layers]
        width = c.num_attention_heads * c.head_dim
        mixed = torch.from_numpy(self.spill.scratch((2, *states.shape[1:3], width)))
        for windows in batches:
            for s, h in enumerate(inputs(windows)):
                mixed[s, windows] = layers[s].mix(h, weights[s], sinks[s], cos, sin).cpu()

        def outputs(windows: slice) -> list[Tensor]:
            return [mixed[s, windows].to(self.device) for s in (0, 1)]

        self._round([names["o"]], lambda: map(outputs, batches), width)
        projections = [layer.projection("o") for layer in layers]
        for windows in batches:
            for s, rows in enumerate(outputs(windows)):
                states[s, windows] += torch.nn.functional.linear(rows, *projections[s]).cpu()

    def _head(self, index: int) -> None:
        """The head, if it is calibrated: its inputs are the final norm's."""
        torch, c = import_torch(), self.config
        name = "lm_head.weight"
        if not self._missing([name]):
            return
        states = torch.from_numpy(self.spill.open(index))
        norms = [
            as_tensor(read("model.norm.weight", 0, c.hidden_size), self.device)
            for read in (self.numbers.final, self.numbers.released)
        ]

        def inputs(start: int) -> list[Tensor]:
            pair = (states[s, start : start + _ROWS].to(self.device) for s in (0, 1))
            return [rms_norm(x, norm, c.rms_norm_eps) for x, norm in zip(pair, norms, strict=True)]

        self._round([name], lambda: map(inputs, range(0, states.shape[1], _ROWS)), c.hidden_size)

    # Matrices that all tokens meet

    def _missing(self, names: Sequence[str]) -> list[str]:
        """Which of these are calibrated; none where every leaf of them is there."""
        steps = [s for s in map(self.numbers.step, names) if s.method == "gptq"]
        whole = all(self.numbers.has(s.name, i) for s in steps for i in range(leaf_count(s.spec.shape)))
        return [] if whole else [s.name for s in steps]

    def _round(self, names: Sequence[str], inputs: Callable[[], Iterable[list[Tensor]]], k: int) -> None:
        """Round `names`, which share their inputs: pairs of rows [..., K], here and released."""
        missing = self._missing(names)
        if not missing:
            return
        moments = Moments(k, self.device)
        for here, released in inputs():
            moments.add(here.flatten(0, -2), released.flatten(0, -2))
        with naming(missing[0]):
            problem = Problem([moments], [0], self.spec)
        for scheme, alike in by_scheme(self.numbers, missing).items():
            if len(alike) == 1:
                self._round_rows(alike[0], problem)
                continue
            weights = [[self.numbers.released(n, 0, self.numbers.step(n).spec.shape[0])] for n in alike]
            for name, [(q, facts)] in zip(alike, problem.solve(alike, scheme, weights, self.device), strict=True):
                self._put(name, q, 0, facts)

    def _round_rows(self, name: str, problem: Problem) -> None:
        """Round one matrix [N, K], a fixed number of rows at a time: the cut is part of the numbers."""
        step = self.numbers.step(name)
        rows = leaf_rows(step.spec.shape)
        at_once = max(1, _ROWS // rows) * rows
        for start in range(0, step.spec.shape[0], at_once):
            stop = min(start + at_once, step.spec.shape[0])
            weights = self.numbers.released(name, start, stop)
            [[(q, facts)]] = problem.solve([name], step.scheme, [[weights]], self.device)
            self._put(name, q, start, facts)

    def _put(self, name: str, q: QTensor, start: int, facts: Facts) -> None:
        """Commit rows from `start`, which begins a leaf, leaf by leaf."""
        shape = self.numbers.step(name).spec.shape
        rows = leaf_rows(shape)
        assert q.scales is not None
        for at in range(0, len(q.data), rows):
            leaf = (start + at) // rows
            if not self.numbers.has(name, leaf):
                piece = slice(at, at + rows)
                self.numbers.put(name, leaf, QTensor(name, q.scheme, q.data[piece], q.scales[piece]), facts)


def _attention_parameters(c: ModelConfig) -> int:
    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    return 2 * (heads + kv) * c.hidden_size
