"""Text written by the model itself: many sequences at once, through the streamed float32 layers.

Calibration without data, after Liu et al. 2023 ("LLM-QAT", arXiv 2305.17888). A step reads every
weight of the layers and the head once, whatever the number of sequences: 12.6 GB for gpt-oss-20b and
64 GB for 120b as released. One core takes 0.095 s for one expert's projection of 20b, nearly all of it
decoding: 2304 of them make 3.6 minutes a step. Weights that are kept between steps cost no decoding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from exporter.errors import ExporterError
from exporter.model.config import ModelConfig, Variant
from exporter.model.layer import Layer, rms_norm, rotate
from exporter.model.reference import I64
from exporter.model.torch import as_tensor, import_torch
from exporter.model.weights import Read, Weights, on_device
from exporter.types import leaves

if TYPE_CHECKING:
    from torch import Tensor

# Sequences advance token by token inside a block. When it is full, its keys and values are computed
# again in one pass: a run that starts from the blocks on disk then has the same bits as one that never
# stopped. This costs one more reading of the model for each block.
BLOCK = 32

# tokens int64 [W, t] so far -> the token that must come next for each, -1 where the model chooses.
Script = Callable[[I64], I64]


def generate(
    config: ModelConfig,
    read: Read | Weights,
    script: Script,
    windows: int,
    length: int,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    known: Sequence[I64] = (),
    device: str = "cpu",
    keep_bytes: int = 0,
    on_block: Callable[[I64], None] = lambda block: None,
    on_token: Callable[[int], None] = lambda tokens: None,
) -> I64:
    """Tokens int64 [windows, length]; `script` gives the first of each sequence and may force later ones.

    `known`: blocks [windows, BLOCK] of an earlier run, from the start, as `on_block` was given them.
    Equal arguments give equal tokens, stopped and resumed or not (on CUDA up to the rounding of its
    sums). `on_token(n)` counts columns. Raises ExporterError when logits are not finite.

    Memory: `keep_bytes` of weights held between steps on the device, and keys and values: 8 * kv_heads
    * head_dim bytes a token of a full layer, for 20b with 128 x 512 tokens 3.2 GB, and 1.3 GB for its
    sliding layers, which hold their window only.
    """
    if len(known) * BLOCK >= length:
        return np.concatenate(known, axis=1)[:, :length]
    tokens = np.zeros((windows, length), np.int64)
    decoder = Decoder(config, read, windows, length, device=device, keep_bytes=keep_bytes)
    logits: Tensor | None = None
    for block, start in enumerate(range(0, length, BLOCK)):
        stop = min(start + BLOCK, length)
        if block < len(known):
            tokens[:, start:stop] = known[block]
            on_token(stop - start)
        else:
            for t in range(start, stop):
                following = script(tokens[:, :t])
                if (following < 0).any():
                    if decoder.position < t:
                        logits = decoder.advance(tokens[:, decoder.position : t])
                    if logits is None:
                        raise ValueError("the script must give the first token")
                    chosen = sample(logits, _uniform(seed, t, windows), temperature, top_p)
                    following = np.where(following < 0, chosen, following)
                tokens[:, t] = following
                on_token(1)
            on_block(tokens[:, start:stop].copy())
        if stop < length:
            decoder.rewind(start)
            logits = decoder.advance(tokens[:, start:stop])
            decoder.commit()
    return tokens


def _uniform(seed: int, step: int, count: int) -> Tensor:
    """float64 [count] in [0, 1): of this step alone, so that no state has to be carried over a stop."""
    torch = import_torch()
    mixed = hashlib.sha256(f"{seed} {step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(mixed[:8], "little") >> 1)
    out: Tensor = torch.rand(count, generator=generator, dtype=torch.float64)
    return out


def sample(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> I64:
    """A token for each row of logits [W, V], where `uniform` [W] falls in the cumulated probabilities.

    temperature 0 takes the likeliest. top_p < 1 keeps the likeliest tokens that reach that mass
    together (Holtzman et al. 2020, arXiv 1904.09751).
    """
    torch = import_torch()
    if not bool(torch.isfinite(logits).all()):
        raise ExporterError(
            "the model's logits are not finite", hint="exporter doctor CHECKPOINT finds damaged tensors"
        )
    if temperature == 0:
        return logits.argmax(-1).cpu().numpy()
    p = torch.softmax(logits.double() / temperature, dim=-1)
    if top_p < 1:
        ordered, order = p.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        p = p.scatter(-1, order, ordered.masked_fill(before >= top_p, 0.0))
    reach = p.cumsum(-1)
    aim = uniform.to(p.device)[:, None] * reach[:, -1:]
    chosen = torch.searchsorted(reach, aim, right=True)[:, 0].clamp(max=p.shape[-1] - 1)
    return chosen.cpu().numpy()  # type: ignore[no-any-return]


class Decoder:
    """`windows` sequences of at most `length` tokens; `position` tokens of each have gone in."""

    def __init__(
        self,
        config: ModelConfig,
        read: Read | Weights,
        windows: int,
        length: int,
        *,
        device: str = "cpu",
        keep_bytes: int = 0,
    ) -> None:
        self.config, self.device, self.position = config, device, 0
        self._kept = on_device(read, device, keep_bytes)
        self._layers = [
            _CachedLayer(config, i, self._kept, _Cache(config, i, windows, length, device))
            for i in range(config.num_hidden_layers)
        ]

    def advance(self, tokens: I64, every: bool = False) -> Tensor:
        """Take tokens int64 [W, n]; logits [W, V] after the last of them, or [W, n, V] after each.

        At most BLOCK tokens from one `commit` to the next.
        """
        torch, c = import_torch(), self.config
        with torch.inference_mode():
            x = self._embed(tokens)[None]  # [1, W, n, H]
            for layer in self._layers:
                layer.start = self.position
                layer.forward(x, [c.rope])
            self.position += tokens.shape[1]
            rows = x[0] if every else x[0, :, -1]
            rows = rms_norm(rows, self._kept("model.norm.weight", 0, c.hidden_size), c.rms_norm_eps)
            logits = [rows @ self._kept("lm_head.weight", *part).T for part in leaves((c.vocab_size, c.hidden_size))]
            out: Tensor = torch.cat(logits, dim=-1)
            return out

    def rewind(self, position: int) -> None:
        """Forget what came in at `position` and after; not further back than the last `commit`."""
        for layer in self._layers:
            layer.cache.count -= self.position - position
        self.position = position

    def commit(self) -> None:
        """Give up being able to rewind: sliding layers drop what is behind their window."""
        for layer in self._layers:
            layer.cache.trim()

    def _embed(self, tokens: I64) -> Tensor:
        """[W, n, H], read row by row: a few thousand tokens would touch every leaf."""
        used, place = np.unique(tokens, return_inverse=True)
        rows = [self._kept.read("model.embed_tokens.weight", int(t), int(t) + 1) for t in used]
        return as_tensor(np.concatenate(rows)[place.reshape(tokens.shape)], self.device)


class _Cache:
    """Keys and values [W, kv_heads, S, D] of one layer, of the `count` latest positions."""

    def __init__(self, c: ModelConfig, index: int, windows: int, length: int, device: str) -> None:
        torch = import_torch()
        window = Layer(c, index, lambda *_: np.empty(0, np.float32), device).window()
        self.behind = length if window is None else window - 1  # positions that a later query may see
        shape = (windows, c.num_key_value_heads, min(length, self.behind + BLOCK), c.head_dim)
        self.keys, self.values = torch.empty(shape, device=device), torch.empty(shape, device=device)
        self.count = 0

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of n more positions; all that are held."""
        start, self.count = self.count, self.count + keys.shape[-2]
        for held, new in ((self.keys, keys), (self.values, values)):
            held[:, :, start : self.count] = new
        return self.keys[:, :, : self.count], self.values[:, :, : self.count]

    def trim(self) -> None:
        if self.count > self.behind:
            for held in (self.keys, self.values):
                held[:, :, : self.behind] = held[:, :, self.count - self.behind : self.count].clone()
            self.count = self.behind


class _CachedLayer(Layer):
    """A layer whose attention also sees the tokens of earlier calls. `start`: position of the first new one."""

    def __init__(self, config: ModelConfig, index: int, kept: Weights, cache: _Cache) -> None:
        super().__init__(config, index, kept, kept.device)
        self.cache, self.start = cache, 0

    def attention(self, x: Tensor, variants: Sequence[Variant]) -> None:
        """Add attention's output to x [1, W, n, H]."""
        torch, c = import_torch(), self.config
        windows, n, hidden = x.shape[1:]
        norm = self.weight("input_layernorm.weight", hidden)
        weights = {name: self.projection(name) for name in "qkvo"}
        h = rms_norm(x, norm, c.rms_norm_eps).view(-1, hidden)
        q, k, v = (  # [W, heads, n, D]
            torch.addmm(bias, h, weight.T).view(windows, n, -1, c.head_dim).transpose(1, 2)
            for weight, bias in (weights["q"], weights["k"], weights["v"])
        )
        cos, sin = self.rotation(n, variants[0].rope, self.start)
        keys, values = self.cache.extend(rotate(k, cos, sin), v)
        mixed = self.attend(rotate(q, cos, sin), keys, values, self.weight("self_attn.sinks", c.num_attention_heads))
        weight, bias = weights["o"]
        x += torch.addmm(bias, mixed.view(windows * n, -1), weight.T).view(x.shape)
