"""One gpt-oss layer in float32 torch, its weights read as they are used.

Source: openai/gpt-oss `torch/model.py` and transformers' modeling_gpt_oss.py (eager attention);
`tests/unit/test_reference.py` compares the two forwards.

Shapes: R variants, W windows, T tokens, H hidden, D head_dim, I intermediate, E experts. All
variants go through a layer together, so that each expert is decoded once for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from exporter.model.config import SLIDING, ModelConfig, RopeConfig, Variant
from exporter.model.rope import attention_factor, inverse_frequencies
from exporter.model.torch import import_torch
from exporter.model.weights import Read, Weights, on_device

if TYPE_CHECKING:
    from torch import Tensor

# (names of the weights about to be used, expert or None, their input [n, K]): what calibration sees.
Observe = Callable[[tuple[str, ...], int | None, "Tensor"], None]
# (layer, its experts of each row int64 [N, top_k], likeliest first): called when a layer has routed its tokens.
Routed = Callable[[int, "Tensor"], None]
# (one of the parts of a layer): called when that part is done.
Progress = Callable[[int], None]
AsVariant = RopeConfig | Variant

_SCORES = 1 << 24  # attention scores held at once: 64 MiB
_ROWS = 4096  # token rows that go through an expert, the router or the head at once


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x * weight / rms(x) over the last axis."""
    torch = import_torch()
    out: Tensor = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [..., T, D], first half paired with second half; cos and sin [T, D/2]."""
    torch = import_torch()
    a, b = x.chunk(2, dim=-1)
    out: Tensor = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return out


def as_variant(each: AsVariant) -> Variant:
    """A rope alone means everything else as released."""
    return each if isinstance(each, Variant) else Variant(each)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


class _Rows:
    """Which rows of x [R * n, H] are of variants that an expert computes otherwise."""

    def __init__(self, variants: Sequence[Variant], n: int, device: str) -> None:
        self._rounded = self._mask([v.rounded for v in variants], n, device)
        self.any_rounded = self._rounded is not None
        self._swapped = self._mask([v.swapped for v in variants], n, device)

    @staticmethod
    def _mask(marks: Sequence[bool], n: int, device: str) -> Tensor | None:
        """bool [R * n, 1]; None where it would be false everywhere."""
        if not any(marks):
            return None
        torch = import_torch()
        mask: Tensor = torch.tensor(marks, device=device).repeat_interleave(n)[:, None]
        return mask

    def short(self, values: Tensor, part: Tensor | slice) -> Tensor:
        """`values` of the rows `part`, rounded where their variant is."""
        if self._rounded is None:
            return values
        return import_torch().where(self._rounded[part], _bfloat16(values), values)  # type: ignore[no-any-return]

    def in_order(self, gate: Tensor, up: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        """Both, in each other's place where the row's variant swaps them."""
        if self._swapped is None:
            return gate, up
        where, swapped = import_torch().where, self._swapped[part]
        return where(swapped, up, gate), where(swapped, gate, up)


class Layer:
    """Layer `index` of the model; holds no weights between calls."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        read: Read | Weights,
        device: str,
        observe: Observe | None = None,
        routed: Routed | None = None,
    ) -> None:
        self.config, self.index, self.device = config, index, device
        self.weights = on_device(read, device)
        self.observe = observe or (lambda names, expert, rows: None)
        self.routed = routed or (lambda layer, chosen: None)
        self.rows_of = _Rows([], 0, device)
        self.prefix = f"model.layers.{index}."

    def forward(self, x: Tensor, ropes: Sequence[AsVariant], progress: Progress = lambda part: None) -> None:
        """Change x [R, W, T, H] into the layer's output, in place; variant r is computed as ropes[r] says.

        `progress` is called with -1 after attention and with the expert's number after each expert.
        """
        torch = import_torch()
        variants = [as_variant(each) for each in ropes]
        with torch.inference_mode():
            self.attention(x, variants)
            progress(-1)
            self.rows_of = _Rows(variants, x[0].numel() // x.shape[-1], self.device)
            self.experts(x.view(-1, x.shape[-1]), progress)

    def weight(self, name: str, rows: int) -> Tensor:
        """A whole tensor of the layer; `rows` is its leading axis."""
        return self.weights(self.prefix + name, 0, rows)

    # Attention

    def attention(self, x: Tensor, variants: Sequence[Variant]) -> None:
        """Add attention's output to x [R, W, T, H]."""
        torch, c = import_torch(), self.config
        length, hidden = x.shape[-2:]
        norm = self.weight("input_layernorm.weight", hidden)
        sinks = self.weight("self_attn.sinks", c.num_attention_heads)
        weights = {name: self.projection(name) for name in "qkvo"}
        names = {name: f"{self.prefix}self_attn.{name}_proj.weight" for name in "qkvo"}
        for rows, variant in zip(x, variants, strict=True):
            cos, sin = self.rotation(length, variant.rope)
            short = _bfloat16 if variant.rounded else _unchanged
            for window in rows:  # [T, H]
                h = short(rms_norm(window, norm, c.rms_norm_eps))
                self.observe((names["q"], names["k"], names["v"]), None, h)
                mixed = short(self.mix(h, weights, sinks, cos, sin, variant))
                self.observe((names["o"],), None, mixed)
                weight, bias = weights["o"]
                window += short(torch.addmm(bias, mixed, weight.T))
                if variant.rounded:
                    window.copy_(short(window))

    def projection(self, name: str) -> tuple[Tensor, Tensor]:
        """Weight [N, K] and bias [N] of "q", "k", "v" or "o"."""
        c = self.config
        heads = {"q": c.num_attention_heads, "k": c.num_key_value_heads, "v": c.num_key_value_heads}
        rows = heads[name] * c.head_dim if name in heads else c.hidden_size
        stem = f"self_attn.{name}_proj"
        return self.weight(f"{stem}.weight", rows), self.weight(f"{stem}.bias", rows)

    def rotation(self, length: int, rope: RopeConfig, start: int = 0) -> tuple[Tensor, Tensor]:
        """cos and sin [T, D/2] of the positions start ... start + length - 1."""
        torch = import_torch()
        angle = torch.arange(start, start + length, dtype=torch.float32)[:, None] * torch.from_numpy(
            inverse_frequencies(rope, self.config.head_dim)
        )
        factor = attention_factor(rope)
        return (torch.cos(angle) * factor).to(self.device), (torch.sin(angle) * factor).to(self.device)

    def mix(
        self,
        h: Tensor,
        weights: Mapping[str, tuple[Tensor, Tensor]],
        sinks: Tensor,
        cos: Tensor,
        sin: Tensor,
        variant: Variant | None = None,
    ) -> Tensor:
        """What the output projection sees, [..., T, heads * D], of normalised windows h [..., T, H]."""
        linear, d = import_torch().nn.functional.linear, self.config.head_dim
        q, k, v = (linear(h, *weights[n]).unflatten(-1, (-1, d)).transpose(-3, -2) for n in "qkv")  # [..., heads, T, D]
        if variant is None:
            return self.attend(rotate(q, cos, sin), rotate(k, cos, sin), v, sinks)
        short = _bfloat16 if variant.rounded else _unchanged
        if not variant.sinks:
            sinks = sinks.new_full(sinks.shape, -math.inf)
        q, k = (short(rotate(short(each), cos, sin)) for each in (q, k))
        return self.attend(q, k, short(v), sinks, variant.window)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, seen: int | None = None) -> Tensor:
        """Causal attention [..., T, heads * D] of q [..., heads, T, D], k and v [..., kv_heads, S, D], sinks [heads].

        The T queries are the last of the S positions. A sink is one more column of scores that every
        query sees and that carries no value. A sliding layer's window counts the query itself: it
        sees keys t - window + 1 ... t; `seen` is another window than the configuration's.
        """
        torch = import_torch()
        *batch, heads, length, d = q.shape
        groups, total = k.shape[-3:-1]
        past = total - length
        q = q.reshape(*batch, groups, heads // groups, length, d)
        keys, values = k.unsqueeze(-3), v.unsqueeze(-3)  # [..., groups, 1, S, D]
        column = sinks.view(groups, -1, 1, 1)
        window = self.window()
        if window is not None and seen is not None:
            window = seen
        out = torch.empty((*batch, length, heads * d), device=q.device)
        step = max(16, _SCORES // (math.prod(batch) * heads * total))
        for start in range(0, length, step):
            stop = min(start + step, length)
            first = 0 if window is None else max(0, past + start - window + 1)
            last = past + stop
            scores = q[..., start:stop, :] @ keys[..., first:last, :].transpose(-1, -2)
            scores *= d**-0.5  # [..., groups, heads/groups, t, s]
            back = torch.arange(past + start, last)[:, None] - torch.arange(first, last)  # how far back a key is
            hidden = back < 0 if window is None else (back < 0) | (back >= window)
            scores.masked_fill_(hidden.to(q.device), -torch.inf)
            with_sink = torch.cat((scores, column.expand(*scores.shape[:-1], 1)), dim=-1)
            mixed = torch.softmax(with_sink, dim=-1)[..., :-1] @ values[..., first:last, :]
            out[..., start:stop, :] = mixed.movedim(-2, -4).reshape(*batch, stop - start, -1)
        return out  # type: ignore[no-any-return]

    def window(self) -> int | None:
        """Keys that a query sees, itself included; None for all."""
        sliding = self.config.layer_types[self.index] == SLIDING
        return self.config.sliding_window if sliding else None

    # Experts

    def route(self, x: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each row of x [N, H] and their shares: int64 and float32 [N, top_k].

        Softmax is taken over the chosen experts only.
        """
        torch, c = import_torch(), self.config
        weight = self.weight("mlp.router.weight", c.num_local_experts)
        bias = self.weight("mlp.router.bias", c.num_local_experts)
        chosen, shares = [], []
        for start in range(0, len(x), _ROWS):
            part = slice(start, start + _ROWS)
            h = self.rows_of.short(rms_norm(x[part], norm, c.rms_norm_eps), part)
            self.observe((self.prefix + "mlp.router.weight",), None, h)
            top = torch.topk(torch.addmm(bias, h, weight.T), c.num_experts_per_tok, dim=-1)
            chosen.append(top.indices)
            shares.append(torch.softmax(top.values, dim=-1))
        return torch.cat(chosen), torch.cat(shares)

    def experts(self, x: Tensor, progress: Progress = lambda part: None) -> None:
        """Add the experts' output to x [N, H]; one expert decoded at a time, unused ones never."""
        torch, c = import_torch(), self.config
        norm = self.weight("post_attention_layernorm.weight", c.hidden_size)
        chosen, shares = self.route(x, norm)
        short = self.rows_of.short
        self.routed(self.index, chosen)
        biases = {
            name: self.weight(f"mlp.experts.{name}_proj.bias", c.num_local_experts) for name in ("gate", "up", "down")
        }
        total = torch.zeros_like(x)
        used = torch.unique(chosen).tolist()
        self.weights.expect((self.expert_name(name), e, e + 1) for e in used for name in ("gate", "up", "down"))
        for expert in range(c.num_local_experts):
            rows, slot = torch.where(chosen == expert)
            if len(rows):
                gate, up, down = (self.expert_weight(name, expert) for name in ("gate", "up", "down"))
                for part, place in zip(torch.split(rows, _ROWS), torch.split(slot, _ROWS), strict=True):
                    # Normalising again here is cheaper than keeping a second copy of x.
                    h = short(rms_norm(x[part], norm, c.rms_norm_eps), part)
                    self.observe((self.expert_name("gate"), self.expert_name("up")), expert, h)
                    sides = self.rows_of.in_order(
                        torch.addmm(biases["gate"][expert], h, gate.T), torch.addmm(biases["up"][expert], h, up.T), part
                    )
                    inner = short(self.swiglu(*(short(side, part) for side in sides)), part)
                    self.observe((self.expert_name("down"),), expert, inner)
                    out = short(torch.addmm(biases["down"][expert], inner, down.T), part)
                    total.index_add_(0, part, out * shares[part, place, None])
            progress(expert)
        x += total
        if self.rows_of.any_rounded:
            x.copy_(short(x, slice(None)))

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """(clamp(up) + 1) * g * sigmoid(alpha * g), g = min(gate, limit); not the usual SwiGLU."""
        torch, c = import_torch(), self.config
        gate = gate.clamp(max=c.swiglu_limit)
        up = up.clamp(-c.swiglu_limit, c.swiglu_limit)
        out: Tensor = (up + 1) * (gate * torch.sigmoid(gate * c.swiglu_alpha))
        return out

    def expert_name(self, projection: str) -> str:
        return f"{self.prefix}mlp.experts.{projection}_proj.weight"

    def expert_weight(self, projection: str, expert: int) -> Tensor:
        """[N, K] of one expert."""
        return self.weights(self.expert_name(projection), expert, expert + 1)[0]
