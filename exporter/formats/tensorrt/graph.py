"""The graph of gpt-oss in operators of ONNX's own domain, as TensorRT's parser takes them (opset 23).

Two graphs over the same weights. "decode" decodes only the experts that were chosen (DequantizeLinear, Gather, MatMul:
TensorRT reads the packed codes in one kernel); "prefill" sends every token through all experts and weighs most of them
with zero: many tokens need nearly all experts anyway. Matrix products and attention are in float16, all else, the
residual stream included, in float32: the released bfloat16 goes beyond what float16 holds.

An attention sink is one more key, whose score is the sink: queries get eight more numbers, of which the first is
sink * sqrt(head_dim), and keys as many zeros, but for that one key's 1. Softmax sees the released numbers, the mask is
the same for all heads and layers, and TensorRT compiles the standard Attention operator to its fused kernels.
Operators: https://onnx.ai/onnx/operators (RMSNormalization, RotaryEmbedding, Attention since 23).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporter.formats.onnx.arrays import Initializer
from exporter.formats.onnx.builder import GraphBuilder, Place
from exporter.formats.tensorrt.targets import Target, fuses
from exporter.model import ModelConfig
from exporter.model.config import SLIDING
from exporter.types import Scheme

OPSET, IR_VERSION = 23, 11  # TensorRT parses them from 10.15 on
TRT = "trt"  # NVIDIA's own operators; of these only the one that decodes FP4 under e8m0 scales
_LOWEST = -65504.0  # of float16; as a mask, no key with it counts beside the sink
_WIDER = 8  # numbers that queries and keys get for the sink; heads stay a multiple of eight wide


@dataclass(frozen=True)
class Blueprint:
    """All that decides a graph. `io`: "float16", or "float" for a twin that TensorRT does not build.

    `schemes`: of every canonical tensor; `places`: of every initializer.
    """

    config: ModelConfig
    target: Target
    schemes: Mapping[str, Scheme]
    places: Mapping[Initializer, Place]
    sparse: bool
    metadata: Mapping[str, str]
    version: str
    io: str = "float16"


def build(blueprint: Blueprint) -> bytes:
    """The serialized model; the same bytes for the same blueprint."""
    builder = _Builder(blueprint)
    builder.model()
    opsets = {"": OPSET} | ({TRT: 1} if builder.fp4 else {})
    return builder.serialized(opsets, IR_VERSION, blueprint.metadata, blueprint.version)


@dataclass(frozen=True)
class _Shared:
    """What every layer takes. `masks`: additive, [B, 1, S, T + 1], by whether a layer is sliding.

    `key`: the one that is no token's, [B, kv_heads, 1, head_dim + 8]; `sizes`: int64 [1] of B and S.
    """

    positions: Any
    masks: Mapping[bool, Any]
    key: Any
    sizes: tuple[Any, Any]


class _Builder(GraphBuilder):
    """Nodes in the order in which they compute. B sequences of S tokens after P cached ones, T = P + S; M = B * S."""

    def __init__(self, blueprint: Blueprint) -> None:
        super().__init__(blueprint.places)
        self.blueprint, self.config = blueprint, blueprint.config
        types = {"float16": self.ir.DataType.FLOAT16, "float": self.ir.DataType.FLOAT}
        self.f32, self.io, self.router = types["float"], types[blueprint.io], types[blueprint.target.router]
        self.fp4 = any(scheme.kind == "e2m1" for scheme in blueprint.schemes.values())

    def model(self) -> None:
        int64, tokens = self.ir.DataType.INT64, ("batch_size", "sequence_length")
        ids = self.input("input_ids", int64, tokens)
        positions = self.input("position_ids", int64, tokens)
        mask = self.input("attention_mask", int64, ("batch_size", "total_sequence_length"))
        caches = [self._cache(index) for index in range(self.config.num_hidden_layers)]
        shared = self._shared(ids, positions, mask, caches[0][0])
        x = self.f32_of("/model/embed_tokens", self._rows("/model/embed_tokens", "model.embed_tokens.weight", ids))
        for index, cache in enumerate(caches):
            x = self._layer(index, x, cache, shared)
        h = self._norm("/model/norm", x, "model.norm.weight")
        logits = self.matmul("/lm_head", self.to_io("/lm_head", h), "lm_head")
        logits = self.op("/lm_head/logits", "Cast", [logits], out="logits", to=int(self.f32))
        self.outputs.insert(0, self.typed(logits, self.f32, (*tokens, self.config.vocab_size)))

    # Small things

    def ints(self, *values: int) -> Any:
        return self.constant("int64_" + "_".join(map(str, values)), np.array(values, np.int64))

    def number(self, value: float, dtype: Any) -> Any:
        wide = dtype == self.f32
        array = np.array(value, np.float32 if wide else np.float16)
        return self.constant(f"{'float' if wide else 'half'}_{value!r}", array)

    def to_io(self, name: str, value: Any) -> Any:
        return value if self.io == self.f32 else self.cast(f"{name}/Cast", value, self.io)

    def f32_of(self, name: str, value: Any) -> Any:
        """`value`, in whatever type, as float32."""
        return self.cast(f"{name}/wide", value, self.f32)

    def matrix(self, name: str) -> Any:
        """The weight `name` [..., N, K] in the type of matrix products."""
        scheme = self.blueprint.schemes[_canonical(name)]
        if scheme.kind == "float":
            value = self.weight(name)
            return value if value.dtype == self.io else self.cast(f"/{name}/Cast", value, self.io)
        codes, scales = self.weight(f"{name}_codes"), self.weight(f"{name}_scales")
        if scheme.kind == "e2m1":
            kind, dtype = "TRT_MXFP8DequantizeLinear", int(self.io)
            inputs = [codes, scales]
            return self.op(f"/{name}/{kind}", kind, inputs, TRT, axis=-1, block_size=scheme.group, output_dtype=dtype)
        # The result has the type of the scales; another output_dtype is parsed and then not built.
        scales = scales if self.io == self.ir.DataType.FLOAT16 else self.cast(f"/{name}/Cast", scales, self.io)
        kind = "DequantizeLinear"
        return self.op(f"/{name}/{kind}", kind, [codes, scales], axis=-1, block_size=scheme.group)

    def _rows(self, name: str, weight: str, ids: Any) -> Any:
        stored = self.blueprint.schemes[weight]
        table = self.weight(weight) if stored.kind == "float" else self.matrix(weight)
        return self.op(f"{name}/Gather", "Gather", [table, ids], axis=0)

    def matmul(self, name: str, x: Any, layer: str) -> Any:
        """x [..., K] times the weight [N, K] of `layer`, transposed."""
        turned = self.op(f"{name}/Transpose", "Transpose", [self.matrix(f"{layer}.weight")], perm=[1, 0])
        return self.op(f"{name}/MatMul", "MatMul", [x, turned])

    def linear(self, name: str, x: Any, layer: str) -> Any:
        """float32: the same with the layer's bias."""
        product = self.f32_of(name, self.matmul(name, x, layer))
        return self.op(f"{name}/Add", "Add", [product, self.weight(f"{layer}.bias")])

    def _norm(self, name: str, x: Any, weight: str) -> Any:
        inputs = [x, self.weight(weight)]
        return self.op(name, "RMSNormalization", inputs, axis=-1, epsilon=self.config.rms_norm_eps, stash_type=1)

    # Attention

    def _cache(self, index: int) -> tuple[Any, Any]:
        c = self.config
        shape = ("batch_size", c.num_key_value_heads, "past_sequence_length", c.head_dim)
        key, value = (self.input(f"past_key_values.{index}.{kind}", self.io, shape) for kind in ("key", "value"))
        return key, value

    def _size(self, name: str, value: Any, axis: int) -> Any:
        """int64 [1]: how long `value` is along `axis`."""
        return self.op(name, "Shape", [value], start=axis, end=axis + 1)

    def _shared(self, ids: Any, positions: Any, mask: Any, past: Any) -> _Shared:
        name, c = "/model/mask", self.config
        b, s = self._size(f"{name}/batch", ids, 0), self._size(f"{name}/sequence", ids, 1)
        cached = self.op(f"{name}/past", "Squeeze", [self._size(f"{name}/past/Shape", past, 2), self.ints(0)])
        fresh = self.op(f"{name}/fresh", "Squeeze", [s, self.ints(0)])
        total = self.op(f"{name}/total", "Add", [cached, fresh])
        one, zero = (self.constant(f"int64_scalar_{i}", np.array(i, np.int64)) for i in (1, 0))
        keys = self.op(f"{name}/keys", "Range", [zero, total, one])  # [T]
        queries = self.op(f"{name}/queries", "Range", [cached, total, one])
        queries = self.op(f"{name}/queries/Unsqueeze", "Unsqueeze", [queries, self.ints(1)])  # [S, 1]
        real = self.cast(f"{name}/real", mask, self.ir.DataType.BOOL)
        real = self.op(f"{name}/real/Unsqueeze", "Unsqueeze", [real, self.ints(1, 2)])  # [B, 1, 1, T]
        causal = self.op(f"{name}/causal", "LessOrEqual", [keys, queries])
        oldest = self.op(f"{name}/oldest", "Sub", [queries, self.ints(c.sliding_window)])
        near = self.op(f"{name}/near", "And", [causal, self.op(f"{name}/window", "Greater", [keys, oldest])])
        none = self.op(f"{name}/sink/shape", "Concat", [b, self.ints(1), s, self.ints(1)], axis=0)
        none = self.op(f"{name}/sink", "Expand", [self.number(0, self.io), none])
        masks = {
            sliding: self._mask(f"{name}/{kind}", seen, real, none)
            for sliding, kind, seen in ((False, "full", causal), (True, "sliding", near))
        }
        one_key = np.zeros((1, 1, 1, c.head_dim + _WIDER), np.float32 if self.io == self.f32 else np.float16)
        one_key[..., c.head_dim] = 1
        shape = self.ints(c.num_key_value_heads, 1, c.head_dim + _WIDER)
        shape = self.op(f"{name}/key/shape", "Concat", [b, shape], axis=0)
        key = self.op(f"{name}/key", "Expand", [self.constant("sink_key", one_key), shape])
        return _Shared(positions, masks, key, (b, s))

    def _mask(self, name: str, seen: Any, real: Any, none: Any) -> Any:
        seen = self.op(f"{name}/Unsqueeze", "Unsqueeze", [seen, self.ints(0, 1)])
        seen = self.op(f"{name}/And", "And", [seen, real])
        added = self.op(f"{name}/Where", "Where", [seen, self.number(0, self.io), self.number(_LOWEST, self.io)])
        return self.op(f"{name}/Concat", "Concat", [added, none], axis=3)

    def _layer(self, index: int, x: Any, cache: tuple[Any, Any], shared: _Shared) -> Any:
        name, prefix = f"/model/layers.{index}", f"model.layers.{index}"
        h = self._norm(f"{name}/input_layernorm", x, f"{prefix}.input_layernorm.weight")
        x = self.op(f"{name}/attn/residual", "Add", [x, self._attention(index, h, cache, shared)])
        h = self._norm(f"{name}/post_attention_layernorm", x, f"{prefix}.post_attention_layernorm.weight")
        experts = self._sparse if self.blueprint.sparse else self._dense
        h = self.op(f"{name}/moe/rows", "Reshape", [h, self.ints(-1, self.config.hidden_size)])  # [M, H]
        out = experts(index, h, *self._route(index, h))
        tokens = self.op(f"{name}/moe/shape", "Concat", [*shared.sizes, self.ints(self.config.hidden_size)], axis=0)
        return self.op(f"{name}/residual", "Add", [x, self.op(f"{name}/moe/Reshape", "Reshape", [out, tokens])])

    def _attention(self, index: int, h: Any, cache: tuple[Any, Any], shared: _Shared) -> Any:
        """float32 [B, S, H]. Keys and values of all tokens become outputs of the graph."""
        c, name, prefix = self.config, f"/model/layers.{index}/attn", f"model.layers.{index}.self_attn"
        heads = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)
        packed = self.linear(f"{name}/qkv_proj", self.to_io(f"{name}/h", h), f"{prefix}.qkv_proj")
        split = self.ints(*(n * c.head_dim for n in heads))
        kinds = [f"{name}/{kind}" for kind in "qkv"]
        parts = self.ops(f"{name}/Split", "Split", [packed, split], [f"{kind}/rows" for kind in kinds], axis=-1)
        q, k, v = (self._heads(*each) for each in zip(kinds, parts, heads, strict=True))
        tables = [self.weight("cos_cache"), self.weight("sin_cache"), shared.positions]
        q, k = (
            self.op(f"{kind}/RotaryEmbedding", "RotaryEmbedding", [each, *tables])
            for kind, each in zip(kinds[:2], (q, k), strict=True)
        )
        q, k, v = (self.to_io(kind, each) for kind, each in zip(kinds, (q, k, v), strict=True))
        keys, values = (
            self._present(index, kind, past, fresh)
            for kind, past, fresh in zip(("key", "value"), cache, (k, v), strict=True)
        )
        q = self.op(f"{name}/q/sink", "Concat", [q, self._sinks(name, prefix, shared)], axis=3)
        keys = self.op(f"{name}/k/wider", "Pad", [keys, self.ints(0, 0, 0, 0, 0, 0, 0, _WIDER)])
        keys = self.op(f"{name}/k/sink", "Concat", [keys, shared.key], axis=2)
        values = self.op(f"{name}/v/sink", "Pad", [values, self.ints(0, 0, 0, 0, 0, 0, 1, _WIDER)])
        mask = shared.masks[c.layer_types[index] == SLIDING]
        mixed = self.op(f"{name}/Attention", "Attention", [q, keys, values, mask], scale=1 / math.sqrt(c.head_dim))
        mixed = self.op(f"{name}/Slice", "Slice", [mixed, self.ints(0), self.ints(c.head_dim), self.ints(3)])
        mixed = self.op(f"{name}/Transpose", "Transpose", [mixed], perm=[0, 2, 1, 3])
        mixed = self.op(f"{name}/Reshape", "Reshape", [mixed, self.ints(0, 0, heads[0] * c.head_dim)])
        return self.linear(f"{name}/o_proj", mixed, f"{prefix}.o_proj")

    def _heads(self, name: str, rows: Any, heads: int) -> Any:
        """[B, S, heads * D] -> [B, heads, S, D]"""
        split = self.op(f"{name}/Reshape", "Reshape", [rows, self.ints(0, 0, heads, self.config.head_dim)])
        return self.op(f"{name}/Transpose", "Transpose", [split], perm=[0, 2, 1, 3])

    def _present(self, index: int, kind: str, past: Any, fresh: Any) -> Any:
        c, out = self.config, f"present.{index}.{kind}"
        whole = self.op(f"/model/layers.{index}/attn/{kind}", "Concat", [past, fresh], out=out, axis=2)
        shape = ("batch_size", c.num_key_value_heads, "total_sequence_length", c.head_dim)
        self.outputs.append(self.typed(whole, self.io, shape))
        return whole

    def _sinks(self, name: str, prefix: str, shared: _Shared) -> Any:
        """[B, heads, S, 8]: what makes the product with the one key the sink, once it is scaled."""
        b, s = shared.sizes
        heads, root = self.ints(self.config.num_attention_heads), math.sqrt(self.config.head_dim)
        sinks = self.op(f"{name}/sinks/Mul", "Mul", [self.weight(f"{prefix}.sinks"), self.number(root, self.f32)])
        sinks = self.op(f"{name}/sinks/Reshape", "Reshape", [sinks, self.ints(1, -1, 1, 1)])
        sinks = self.op(f"{name}/sinks/Pad", "Pad", [sinks, self.ints(0, 0, 0, 0, 0, 0, 0, _WIDER - 1)])
        shape = self.op(f"{name}/sinks/shape", "Concat", [b, heads, s, self.ints(_WIDER)], axis=0)
        return self.op(f"{name}/sinks/Expand", "Expand", [self.to_io(f"{name}/sinks", sinks), shape])

    # Experts

    def _route(self, index: int, h: Any) -> tuple[Any, Any]:
        """(float32 [M, k], int64 [M, k]): weights and ids of the chosen experts."""
        c, name, prefix = self.config, f"/model/layers.{index}/moe/router", f"model.layers.{index}.mlp.router"
        inputs = [h, self.weight(f"{prefix}.weight"), self.weight(f"{prefix}.bias")]
        if self.router != self.f32:
            named = zip(("h", "weight", "bias"), inputs, strict=True)
            inputs = [self.cast(f"{name}/{kind}", each, self.router) for kind, each in named]
        logits = self.op(f"{name}/Gemm", "Gemm", inputs, out=f"{name}/logits", transB=1)
        outputs = [f"{name}/chosen/logits", f"{name}/chosen/ids"]
        best, ids = self.ops(f"{name}/TopK", "TopK", [logits, self.ints(c.num_experts_per_tok)], outputs, axis=-1)
        return self.op(f"{name}/Softmax", "Softmax", [self.f32_of(name, best)], axis=-1), ids

    def _sparse(self, index: int, h: Any, weights: Any, ids: Any) -> Any:
        """float32 [M, 1, H]: each token through its own experts, of which only those are decoded."""
        name, prefix = f"/model/layers.{index}/moe", f"model.layers.{index}.mlp.experts"

        def project(x: Any, kind: str) -> Any:
            """[M, k, 1, K] times the chosen [k, N, K], and bias."""
            layer, own = f"{prefix}.{kind}", f"{name}/{kind}"
            chosen = self.op(f"{own}/Gather", "Gather", [self.matrix(f"{layer}.weight"), ids], axis=0)
            turned = self.op(f"{own}/Transpose", "Transpose", [chosen], perm=[0, 1, 3, 2])
            product = self.f32_of(own, self.op(f"{own}/MatMul", "MatMul", [x, turned]))
            bias = self.op(f"{own}/bias", "Gather", [self.weight(f"{layer}.bias"), ids], axis=0)
            bias = self.op(f"{own}/bias/Unsqueeze", "Unsqueeze", [bias, self.ints(2)])
            return self.op(f"{own}/Add", "Add", [product, bias])

        x = self.op(f"{name}/Unsqueeze", "Unsqueeze", [self.to_io(f"{name}/h", h), self.ints(1, 2)])  # [M, 1, 1, H]
        out = project(self._swiglu(name, project(x, "gate_up_proj")), "down_proj")  # [M, k, 1, H]
        share = self.op(f"{name}/weights", "Unsqueeze", [weights, self.ints(2, 3)])
        out = self.op(f"{name}/weighed", "Mul", [out, share])
        return self.op(f"{name}/sum", "ReduceSum", [out, self.ints(1)], keepdims=0)

    def _dense(self, index: int, h: Any, weights: Any, ids: Any) -> Any:
        """float32 [M, H]: every token through all experts, weighed with zero where they were not chosen."""
        c, name, prefix = self.config, f"/model/layers.{index}/moe", f"model.layers.{index}.mlp.experts"
        count = self.ints(c.num_local_experts)
        shape = self.op(f"{name}/shares/shape", "Concat", [self._size(f"{name}/rows/Shape", h, 0), count], axis=0)
        shares = self.op(f"{name}/shares/zero", "Expand", [self.number(0, self.f32), shape])
        shares = self.op(f"{name}/shares", "ScatterElements", [shares, ids, weights], axis=-1)  # [M, E]
        schemes = (self.blueprint.schemes[f"{prefix}.{kind}_proj.weight"] for kind in ("gate", "down"))
        order = None if all(map(fuses, schemes)) else self._order(name, shares, count)

        def every(own: str, value: Any) -> Any:
            """`value` [E, ...], in the order in which experts are taken."""
            return value if order is None else self.op(f"{own}/Gather", "Gather", [value, order], axis=0)

        def project(x: Any, kind: str) -> Any:
            """[1 or E, M, K] times [E, N, K], and bias."""
            layer, own = f"{prefix}.{kind}", f"{name}/{kind}"
            weight = every(own, self.matrix(f"{layer}.weight"))
            turned = self.op(f"{own}/Transpose", "Transpose", [weight], perm=[0, 2, 1])
            product = self.f32_of(own, self.op(f"{own}/MatMul", "MatMul", [x, turned]))
            bias = every(f"{own}/bias", self.weight(f"{layer}.bias"))
            bias = self.op(f"{own}/bias/Unsqueeze", "Unsqueeze", [bias, self.ints(1)])
            return self.op(f"{own}/Add", "Add", [product, bias])

        x = self.op(f"{name}/Unsqueeze", "Unsqueeze", [self.to_io(f"{name}/h", h), self.ints(0)])  # [1, M, H]
        out = project(self._swiglu(name, project(x, "gate_up_proj")), "down_proj")  # [E, M, H]
        finite = [self.number(_LOWEST, self.f32), self.number(-_LOWEST, self.f32)]
        out = self.op(f"{name}/finite", "Clip", [out, *finite])  # an infinity times a share of zero is NaN
        shares = self.op(f"{name}/shares/Transpose", "Transpose", [shares], perm=[1, 0])
        shares = self.op(f"{name}/shares/Unsqueeze", "Unsqueeze", [every(f"{name}/shares", shares), self.ints(2)])
        out = self.op(f"{name}/weighed", "Mul", [out, shares])
        return self.op(f"{name}/sum", "ReduceSum", [out, self.ints(0)], keepdims=0)

    def _order(self, name: str, shares: Any, count: Any) -> Any:
        """int64 [E]: all experts, those with most to do first.

        Other weights are decoded before the product. TensorRT does that with what depends on constants alone ahead
        of everything, for all layers at once: 38 GB for 20b. What is gathered in an order that is known only when it
        runs is decoded when its layer is computed: 1.6 GB.
        """
        load = self.op(f"{name}/load", "ReduceSum", [shares, self.ints(0)], keepdims=0)
        outputs = [f"{name}/load/sorted", f"{name}/load/order"]
        return self.ops(f"{name}/load/TopK", "TopK", [load, count], outputs, axis=-1)[1]

    def _swiglu(self, name: str, both: Any) -> Any:
        """float32 [..., 2I] -> [..., I]: (up + 1) * gate * sigmoid(alpha * gate), clamped as released.

        The gate is clamped from below too: minus infinity, a float16 product that overflowed, would become NaN, and in
        prefill NaN times the share of zero that a token has in most experts.
        """
        c, f32 = self.config, self.f32
        high, low = self.number(c.swiglu_limit, f32), self.number(-c.swiglu_limit, f32)
        outputs = [f"{name}/gate", f"{name}/up"]
        gate, up = self.ops(f"{name}/Split", "Split", [both], outputs, axis=-1, num_outputs=2)
        gate = self.op(f"{name}/gate/Clip", "Clip", [gate, self.number(_LOWEST, f32), high])
        up = self.op(f"{name}/up/Clip", "Clip", [up, low, high])
        steep = self.op(f"{name}/gate/Mul", "Mul", [gate, self.number(c.swiglu_alpha, f32)])
        gate = self.op(f"{name}/gate/act", "Mul", [gate, self.op(f"{name}/gate/Sigmoid", "Sigmoid", [steep])])
        up = self.op(f"{name}/up/Add", "Add", [up, self.number(1, f32)])
        return self.to_io(f"{name}/act", self.op(f"{name}/act/Mul", "Mul", [up, gate]))


def _canonical(name: str) -> str:
    """A canonical tensor that is stored under this name of a graph."""
    return name.replace("qkv_proj", "q_proj").replace("gate_up_proj", "gate_proj")
