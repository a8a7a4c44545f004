"""Optimization profiles: for which shapes engines are made. TensorRT takes memory for the largest of them.

"decode" makes one token of one sequence, "prefill" takes a prompt in pieces. The graphs take any number of sequences
and tokens; decoding experts takes memory for each.
"""

from __future__ import annotations

from collections.abc import Mapping

from exporter.model import ModelConfig

GRAPHS = ("decode", "prefill")
PIECE = 256  # tokens of a prompt at once at most
# TensorRT-RTX 1.7 has a kernel for attention of single tokens over some 20,000 keys, and none beyond: where up to two
# come at once, it takes the one of prefill.
_SINGLE = 16384
_USUAL = 1024  # tokens in the cache for which kernels are chosen

# Input -> (smallest, usual, largest) shape.
Shapes = Mapping[str, tuple[list[int], list[int], list[int]]]


def shapes(graph: str, config: ModelConfig, context: int) -> Shapes:
    """The profile of one graph, for `context` tokens in all."""
    piece = _together(context) if graph == "decode" else min(PIECE, context)
    past = context - piece
    usual = min(_USUAL, past)
    often = 1 if graph == "decode" else piece
    tokens = [1, 1], [1, often], [1, piece]
    found = {
        "input_ids": tokens,
        "position_ids": tokens,
        "attention_mask": ([1, 1], [1, usual + often], [1, context]),
    }
    heads, width = config.num_key_value_heads, config.head_dim
    cache = [1, heads, 0, width], [1, heads, usual, width], [1, heads, past, width]
    names = [f"past_key_values.{i}.{kind}" for i in range(config.num_hidden_layers) for kind in ("key", "value")]
    return found | dict.fromkeys(names, cache)


def _together(context: int) -> int:
    """Tokens at once in decode, at most."""
    return 1 if context <= _SINGLE else 2


def buffers(config: ModelConfig, context: int, whole: bool) -> tuple[int, int]:
    """Bytes of logits, and of all else beside weights and cache, in the larger of the two profiles.

    `whole`: whether prefill decodes all experts of a layer before it multiplies by them. For layers of 20b, engines of
    TensorRT-RTX 1.7 list what this says within 4 %, a fifth less in prefill with INT4 (benchmarks/results).
    What comes out of a graph lies beside what went in, cache and all.
    """
    c, item, piece = config, 2, min(PIECE, context)
    cache = 2 * c.num_key_value_heads * c.head_dim * item * context  # of one layer
    copies = cache * (c.num_hidden_layers + 1)
    expert = 3 * c.intermediate_size * c.hidden_size * item  # decoded
    through = piece * c.num_local_experts * (3 * c.intermediate_size + c.hidden_size) * item
    prefill = 2 * piece * (context + 1) * item + through + (c.num_local_experts * expert if whole else 0)
    logits = c.vocab_size * (item + 4)
    together = _together(context)
    decode = together * logits, together * c.num_experts_per_tok * expert + copies
    return max(decode, (piece * logits, prefill + copies), key=sum)
