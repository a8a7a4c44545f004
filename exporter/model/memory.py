"""What a gpt-oss model takes on a device at run time: weights, KV cache, buffers.

Only full-attention layers grow with the context: 20b needs 24,576 bytes a token in f16, 120b 36,864.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from exporter.model.config import FULL, ModelConfig
from exporter.types.profile import Hardware

# What a runtime takes beside weights and cache at a context: bytes of (logits, all else), by the ways to run it. One
# of them is enough.
Buffers = Callable[[ModelConfig, int], Mapping[str, tuple[int, int]]]

KV_ITEM = 2  # bytes of one number of the KV cache: f16, the default of llama.cpp and of GPUs in ONNX Runtime


def kv_bytes(
    c: ModelConfig, context: int, ubatch: int = 0, kv_item: int = KV_ITEM, windowed: bool = True
) -> tuple[int, int]:
    """Bytes of the KV cache: (full-attention layers, sliding layers).

    A sliding layer keeps its window; a runtime that computes `ubatch` prompt tokens at once keeps those
    as well, rounded up to 256 cells (llama.cpp `llama-kv-cache-iswa.cpp`). `ubatch` 0: the window alone.
    Without `windowed` a runtime keeps everything in every layer.
    """
    cell = 2 * c.num_key_value_heads * c.head_dim * kv_item
    full = sum(t == FULL for t in c.layer_types)
    cells = min(context, c.sliding_window) if windowed else context
    if ubatch and windowed:
        cells = min(_round_up(context), _round_up(c.sliding_window + ubatch))
        context = _round_up(context)
    return full * context * cell, (len(c.layer_types) - full) * cells * cell


def _round_up(cells: int) -> int:
    return -(-cells // 256) * 256


@dataclass(frozen=True)
class Fit:
    """Bytes on the device, line by line, against what the profile's hardware has to give.

    `ways`: totals by the ways to run it, where there are several; the lines are of the one that takes least.
    """

    context: int
    weights: int
    kv_full: int
    kv_sliding: int
    logits: int
    scratch: int
    runtime: int
    usable: int
    ways: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.weights + self.kv_full + self.kv_sliding + self.logits + self.scratch + self.runtime

    @property
    def fits(self) -> bool:
        return self.total <= self.usable


def fit(
    c: ModelConfig,
    weights: int,
    hardware: Hardware,
    context: int | None = None,
    *,
    kv_item: int = KV_ITEM,
    windowed: bool = True,
    buffers: Buffers | None = None,
) -> Fit:
    """Whether `weights` bytes of model run on `hardware` with a `context` of tokens; see kv_bytes for the rest.

    Buffers as llama.cpp's graph takes them with flash attention, its default: logits of one micro-batch
    (f32), the attention masks of full and sliding layers (f16), and the inputs of the chosen experts and of
    the layer (f32). For a 20b-shaped file its own log says 429.65, 453.65 and 549.65 MiB of compute buffer
    at 8, 32 and 128 thousand tokens; this gives the same. `buffers`: what another runtime takes in their place.
    """
    context = context or hardware.context
    kv_full, kv_sliding = kv_bytes(c, context, hardware.ubatch, kv_item, windowed)
    cells = _round_up(context) + _round_up(c.sliding_window + hardware.ubatch)
    activations = (c.num_experts_per_tok * c.intermediate_size + c.hidden_size) * 4
    logits, scratch = hardware.ubatch * c.vocab_size * 4, hardware.ubatch * (cells * 2 + activations)
    every = buffers(c, context) if buffers is not None else {}
    if every:
        logits, scratch = min(every.values(), key=sum)
    held = weights + kv_full + kv_sliding + hardware.runtime
    return Fit(
        context=context,
        weights=weights,
        kv_full=kv_full,
        kv_sliding=kv_sliding,
        logits=logits,
        scratch=scratch,
        runtime=hardware.runtime,
        usable=hardware.usable,
        ways={way: held + sum(each) for way, each in every.items()},
    )


def largest_context(
    c: ModelConfig,
    weights: int,
    hardware: Hardware,
    *,
    kv_item: int = KV_ITEM,
    windowed: bool = True,
    buffers: Buffers | None = None,
) -> int:
    """The longest context (a multiple of 256, up to the model's own) that fits; 0 if none does."""
    low, high = 0, c.max_position_embeddings // 256
    while low < high:
        middle = (low + high + 1) // 2
        if fit(c, weights, hardware, middle * 256, kv_item=kv_item, windowed=windowed, buffers=buffers).fits:
            low = middle
        else:
            high = middle - 1
    return low * 256
