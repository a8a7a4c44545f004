"""Optimization profiles: for which shapes engines are made. TensorRT takes memory for the largest of them.

"decode" makes one token of one sequence, "prefill" takes a prompt in pieces. The graphs take any number of sequences
and tokens; dequantizing experts takes memory for each.
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
    past = max(0, context - 1)  # whatever comes last is a call of its own, of as few tokens as are left
    usual = min(_USUAL, past)
    often = 1 if graph == "decode" else piece
    tokens = [1, 1], [1, often], [1, piece]
    found = {
        "input_ids": tokens,
        "position_ids": tokens,
        "attention_mask": ([1, 1], [1, usual + often], [1, past + piece]),
    }
    heads, width = config.num_key_value_heads, config.head_dim
    cache = [1, heads, 0, width], [1, heads, usual, width], [1, heads, past, width]
    names = [f"past_key_values.{i}.{kind}" for i in range(config.num_hidden_layers) for kind in ("key", "value")]
    return found | dict.fromkeys(names, cache)


def _together(context: int) -> int:
    """Tokens at once in decode, at most."""
    return 1 if context <= _SINGLE else 2


def buffers(config: ModelConfig, context: int, whole: bool) -> dict[str, tuple[int, int]]:
    """Bytes of logits, and of all else beside weights and cache, for each engine.

    `whole`: whether prefill dequantizes all experts of a layer before it multiplies by them. What comes out of a graph
    lies beside what went in, cache and all. At a context of 8,192 the plans of engines for layers of 20b list what this
    says, less the outputs, within 4 %, and for prefill with INT4 a seventh to a quarter less (benchmarks/results); at
    131,072, by hand, up to a third less. Logits of the whole vocabulary are counted, not measured.
    """
    c, item, piece = config, 2, min(PIECE, context)
    cache = 2 * c.num_key_value_heads * c.head_dim * item * context  # of one layer
    copies = cache * (c.num_hidden_layers + 1) + c.max_position_embeddings * c.head_dim * 4  # and the rotation's tables
    expert = 3 * c.intermediate_size * c.hidden_size * item  # dequantized
    through = piece * c.num_local_experts * (3 * c.intermediate_size + c.hidden_size) * item
    prefill = 2 * piece * (context + 1) * item + through + (c.num_local_experts * expert if whole else 0)
    logits, together = c.vocab_size * (item + 4), _together(context)
    return {
        "decode": (together * logits, together * c.num_experts_per_tok * expert + copies),
        "prefill": (piece * logits, prefill + copies),
    }
