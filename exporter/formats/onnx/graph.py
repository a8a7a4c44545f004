"""The graph of gpt-oss for ONNX Runtime, built node by node: small, and without a single weight in it.

Operators of the domain com.microsoft as onnxruntime 1.32 documents them (ContribOperators.md):
GroupQueryAttention with sinks, window and rotation; QMoE and MoE with the released SwiGLU; MatMulNBits.
Names of inputs and outputs are those of Hugging Face optimum. The router computes in float32 everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.formats.onnx.arrays import Initializer
from exporter.formats.onnx.builder import GraphBuilder, Place
from exporter.formats.onnx.devices import Device
from exporter.model import ModelConfig
from exporter.model.config import SLIDING
from exporter.types import Scheme

if TYPE_CHECKING:
    from onnx_ir import Value

OPSET, IR_VERSION = 22, 10  # what onnxruntime from 1.20 on loads
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Blueprint:
    """All that decides a graph. `schemes`: of every canonical tensor; `places`: of every initializer."""

    config: ModelConfig
    device: Device
    schemes: Mapping[str, Scheme]
    places: Mapping[Initializer, Place]
    windowed: bool
    metadata: Mapping[str, str]
    version: str


def build(blueprint: Blueprint) -> bytes:
    """The serialized model; the same bytes for the same blueprint."""
    builder = _Builder(blueprint)
    builder.model()
    return builder.serialized({"": OPSET, MICROSOFT: 1}, IR_VERSION, blueprint.metadata, blueprint.version)


class _Builder(GraphBuilder):
    """Nodes in the order in which they compute."""

    def __init__(self, blueprint: Blueprint) -> None:
        super().__init__(blueprint.places)
        self.blueprint = blueprint
        self.config, self.device = blueprint.config, blueprint.device
        self.io = self.ir.DataType.FLOAT if self.device.io == "f32" else self.ir.DataType.FLOAT16

    def model(self) -> None:
        ir = self.ir
        ids = self.input("input_ids", ir.DataType.INT64, ("batch_size", "sequence_length"))
        mask = self.input("attention_mask", ir.DataType.INT64, ("batch_size", "total_sequence_length"))
        lengths = self.lengths(mask)
        x = self.embed(ids)
        skip: Value | None = None
        for index in range(self.config.num_hidden_layers):
            x, skip = self.layer(index, x, skip, lengths)
        h, _ = self.norm("/model/norm", x, skip, "model.norm.weight")
        logits = self.matmul("/lm_head", h, "lm_head", self.config.vocab_size, self.config.hidden_size, "logits")
        shape = ("batch_size", "sequence_length", self.config.vocab_size)
        self.outputs.insert(0, self.typed(logits, self.io, shape))

    def float_weight(self, name: str) -> Any:
        """A weight that is no integer, in the type of activations."""
        value = self.weight(name)
        return value if value.dtype == self.io else self.cast(f"/{name}/Cast", value, self.io)

    # Parts of the model

    def lengths(self, mask: Any) -> tuple[Any, Any]:
        """int32 [batch]: tokens of each sequence less one; int32 scalar: tokens of the longest, past ones included."""
        int32, one = self.ir.DataType.INT32, np.array(1, np.int64)
        total = self.op("/model/mask/Sum", "ReduceSum", [mask, self.constant("axis_1", one.reshape(1))], keepdims=0)
        last = self.op("/model/mask/Sub", "Sub", [total, self.constant("one", one)])
        shape = self.op("/model/mask/Shape", "Shape", [mask])
        longest = self.op("/model/mask/Gather", "Gather", [shape, self.constant("one", one)], axis=0)
        return self.cast("/model/mask/last", last, int32), self.cast("/model/mask/longest", longest, int32)

    def embed(self, ids: Any) -> Any:
        scheme, name = self.blueprint.schemes["model.embed_tokens.weight"], "model.embed_tokens.weight"
        if scheme.kind == "float":
            rows = self.op("/model/embed_tokens/Gather", "Gather", [self.weight(name), ids], axis=0)
            same = self.weight(name).dtype == self.io
            return rows if same else self.cast("/model/embed_tokens/Cast", rows, self.io)
        return self.op(
            "/model/embed_tokens/Gather",
            "GatherBlockQuantized",
            [self.weight(f"{name}_codes"), ids, self.weight(f"{name}_scales")],
            MICROSOFT,
            bits=scheme.bits,
            block_size=scheme.group,
            gather_axis=0,
            quantize_axis=1,
        )

    def norm(self, name: str, x: Any, skip: Any, weight: str) -> tuple[Any, Any]:
        """(normalised x + skip, x + skip)."""
        epsilon, gamma = self.config.rms_norm_eps, self.float_weight(weight)
        if skip is None:
            return self.op(name, "SimplifiedLayerNormalization", [x, gamma], axis=-1, epsilon=epsilon, stash_type=1), x
        outputs = (f"{name}/output", "", "", f"{name}/sum")
        made = self.ops(name, "SkipSimplifiedLayerNormalization", [x, skip, gamma], outputs, MICROSOFT, epsilon=epsilon)
        return made[0], made[3]

    def matmul(self, name: str, x: Any, layer: str, n: int, k: int, out: str = "") -> Any:
        """x [..., K] times the weight [N, K] of `layer`, transposed."""
        stem = f"{layer}.weight"
        scheme = self.blueprint.schemes[stem.replace("qkv_proj", "q_proj")]
        if scheme.kind != "float":
            return self.op(
                f"{name}/MatMulNBits",
                "MatMulNBits",
                [x, self.weight(f"{stem}_codes"), self.weight(f"{stem}_scales")],
                MICROSOFT,
                out,
                K=k,
                N=n,
                bits=scheme.bits,
                block_size=scheme.group,
                accuracy_level=self.device.accuracy,
            )
        weight = self.float_weight(stem)
        if not self.device.web:
            return self.op(f"{name}/MatMul", "FusedMatMul", [x, weight], MICROSOFT, out, transB=1)
        turned = self.op(f"{name}/Transpose", "Transpose", [weight], perm=[1, 0])
        return self.op(f"{name}/MatMul", "MatMul", [x, turned], out=out)

    def layer(self, index: int, x: Any, skip: Any, lengths: tuple[Any, Any]) -> tuple[Any, Any]:
        """(what the experts add, the stream that it is added to)."""
        name, prefix = f"/model/layers.{index}", f"model.layers.{index}"
        h, x = self.norm(f"{name}/input_layernorm", x, skip, f"{prefix}.input_layernorm.weight")
        mixed = self.attention(index, h, lengths)
        h, x = self.norm(f"{name}/post_attention_layernorm", x, mixed, f"{prefix}.post_attention_layernorm.weight")
        return self.experts(index, h, self.route(index, h)), x

    def attention(self, index: int, h: Any, lengths: tuple[Any, Any]) -> Any:
        c, name, prefix = self.config, f"/model/layers.{index}/attn", f"model.layers.{index}.self_attn"
        q, kv, hidden = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim, c.hidden_size
        packed = self.matmul(f"{name}/qkv_proj", h, f"{prefix}.qkv_proj", q + 2 * kv, hidden)
        packed = self.op(f"{name}/qkv_proj/Add", "Add", [packed, self.float_weight(f"{prefix}.qkv_proj.bias")])
        mixed = self.mix(index, packed, lengths)
        out = self.matmul(f"{name}/o_proj", mixed, f"{prefix}.o_proj", hidden, q)
        return self.op(f"{name}/o_proj/Add", "Add", [out, self.float_weight(f"{prefix}.o_proj.bias")])

    def mix(self, index: int, packed: Any, lengths: tuple[Any, Any]) -> Any:
        """Attention itself, with its part of the cache among the graph's inputs and outputs."""
        c, sliding = self.config, self.config.layer_types[index] == SLIDING
        windowed = sliding and self.blueprint.windowed
        kind = "sliding" if windowed else "sequence"
        cache = ("batch_size", c.num_key_value_heads, f"past_{kind}_length", c.head_dim)
        past = [self.input(f"past_key_values.{index}.{each}", self.io, cache) for each in ("key", "value")]
        sinks = self.float_weight(f"model.layers.{index}.self_attn.sinks")
        name = f"/model/layers.{index}/attn/GroupQueryAttention"
        tables = [self.weight("cos_cache"), self.weight("sin_cache")]
        mixed, key, value = self.ops(
            name,
            "GroupQueryAttention",
            [packed, None, None, *past, *lengths, *tables, None, None, sinks],
            (f"{name}/output", f"present.{index}.key", f"present.{index}.value"),
            MICROSOFT,
            num_heads=c.num_attention_heads,
            kv_num_heads=c.num_key_value_heads,
            scale=1 / math.sqrt(c.head_dim),
            # It counts the query itself, as the model's own window does.
            local_window_size=c.sliding_window if sliding else -1,
            do_rotary=1,
            rotary_interleaved=0,
            **({"sliding_window_cache": 1} if windowed else {}),
        )
        present = ("batch_size", c.num_key_value_heads, f"total_{kind}_length", c.head_dim)
        self.outputs += [self.typed(key, self.io, present), self.typed(value, self.io, present)]
        return mixed

    def route(self, index: int, h: Any) -> Any:
        """float32 [tokens, E], one row for each token: QMoE takes the top k of it and their softmax."""
        name, prefix = f"/model/layers.{index}/moe/router", f"model.layers.{index}.mlp.router"
        rows = self.op(f"{name}/Reshape", "Reshape", [h, self.constant("rows", self._row_shape())])
        if self.io != self.ir.DataType.FLOAT:
            rows = self.cast(f"{name}/Cast", rows, self.ir.DataType.FLOAT)
        weights = [self.weight(f"{prefix}.weight"), self.weight(f"{prefix}.bias")]
        return self.op(f"{name}/Gemm", "Gemm", [rows, *weights], out=f"{name}/logits", transB=1)

    def _row_shape(self) -> np.ndarray[Any, Any]:
        return np.array([-1, self.config.hidden_size], np.int64)

    def experts(self, index: int, h: Any, logits: Any) -> Any:
        c, name, prefix = self.config, f"/model/layers.{index}/moe", f"model.layers.{index}.mlp.experts"
        if self.io != self.ir.DataType.FLOAT:
            logits = self.cast(f"{name}/router/logits/Cast", logits, self.io)
        scheme = self.blueprint.schemes[f"{prefix}.gate_proj.weight"]
        attributes: dict[str, Any] = {
            "k": c.num_experts_per_tok,
            "activation_type": "swiglu",
            "activation_alpha": c.swiglu_alpha,
            "activation_beta": 1.0,
            "swiglu_fusion": 1,  # rows of gate and up take turns
            "swiglu_limit": c.swiglu_limit,
            "normalize_routing_weights": 1,
        }
        stems = [f"{prefix}.gate_up_proj", f"{prefix}.down_proj"]
        biases = [self.float_weight(f"{stem}.bias") for stem in stems]
        if scheme.kind == "float":
            weights = [self.float_weight(f"{stem}.weight") for stem in stems]
            inputs = [h, logits, weights[0], biases[0], weights[1], biases[1]]
            return self.op(f"{name}/MoE", "MoE", inputs, MICROSOFT, **attributes)
        codes = [self.weight(f"{stem}.weight_codes") for stem in stems]
        scales = [self.weight(f"{stem}.weight_scales") for stem in stems]
        inputs = [h, logits, codes[0], scales[0], biases[0], codes[1], scales[1], biases[1]]
        attributes |= {"expert_weight_bits": scheme.bits, "block_size": scheme.group}
        if scheme.kind == "e2m1":
            ones = self.constant("global_scales", np.ones(c.num_local_experts, np.float32))
            inputs += [None] * 7 + [ones, ones]
            attributes["quant_type"] = "fp4"
        elif not self.device.web:  # runtimes for the web are older than the attribute, and do not read it
            attributes["accuracy_level"] = self.device.accuracy
            if self.device.name == "cuda":
                attributes["weights_prepacked"] = 0  # rows as they are; the kernel's own order is made at load
        return self.op(f"{name}/QMoE", "QMoE", inputs, MICROSOFT, **attributes)
