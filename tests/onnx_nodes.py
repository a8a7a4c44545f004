"""Graphs of one node of onnxruntime's own operators, small enough to run in a test."""

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from exporter.validate.onnx_kernels import CPU

E, H, I, K, BLOCK = 4, 64, 64, 2, 32  # noqa: E741
QMOE = {
    "k": K,
    "activation_type": "swiglu",
    "swiglu_fusion": 1,
    "activation_alpha": 1.702,
    "activation_beta": 1.0,
    "swiglu_limit": 7.0,
    "normalize_routing_weights": 1,
    "expert_weight_bits": 4,
    "block_size": BLOCK,
}


def value(name, shape, dtype=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, dtype, shape)


def model_of(nodes, inputs, outputs, initializers=(), opsets=None, ir_version=10, functions=()):
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(initializers))
    imports = [helper.make_opsetid(d, v) for d, v in (opsets or {"": 21, "com.microsoft": 1}).items()]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version, functions=list(functions))


def experts(seed=0, bits=4, more=None, **attributes):
    """One QMoE of random numbers. more: arrays of further inputs, by index; an attribute None is left out."""
    rng = np.random.default_rng(seed)
    weights = {}
    for i, (n, k) in ((1, (2 * I, H)), (2, (H, I))):
        weights[f"codes{i}"] = rng.integers(0, 256, (E, n, k * bits // 8)).astype(np.uint8)
        weights[f"scales{i}"] = rng.uniform(0.01, 0.05, (E, n, k // BLOCK)).astype(np.float32)
        weights[f"bias{i}"] = rng.normal(size=(E, n)).astype(np.float32)
    inputs = ["x", "router", *weights]
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    for index, array in (more or {}).items():
        inputs += [""] * (index + 1 - len(inputs))
        inputs[index] = f"more{index}"
        initializers.append(numpy_helper.from_array(array, f"more{index}"))
    asked = {**QMOE, "expert_weight_bits": bits, **attributes}
    asked = {name: v for name, v in asked.items() if v is not None}
    node = helper.make_node("QMoE", inputs, ["y"], name="/moe/QMoE", domain="com.microsoft", **asked)
    return model_of([node], [value("x", ["n", H]), value("router", ["n", E])], [value("y", ["n", H])], initializers)


def float_experts(**attributes):
    """One MoE, the same without quantization."""
    rng = np.random.default_rng(0)
    weights = {}
    for i, (n, k) in ((1, (2 * I, H)), (2, (H, I))):
        weights[f"weight{i}"] = rng.normal(0, 0.05, (E, n, k)).astype(np.float32)
        weights[f"bias{i}"] = rng.normal(size=(E, n)).astype(np.float32)
    asked = {k: v for k, v in QMOE.items() if k not in ("expert_weight_bits", "block_size")} | attributes
    node = helper.make_node("MoE", ["x", "router", *weights], ["y"], name="/moe", domain="com.microsoft", **asked)
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    return model_of([node], [value("x", ["n", H]), value("router", ["n", E])], [value("y", ["n", H])], initializers)


def matrix(bits=4, block=32, k=64, n=16, codes=None, **attributes):
    shape = codes or (n, -(-k // block), block * bits // 8)
    initializers = [
        numpy_helper.from_array(np.full(shape, 0x88, np.uint8), "codes"),
        numpy_helper.from_array(np.ones((n, -(-k // block)), np.float32), "scales"),
    ]
    asked = {"K": k, "N": n, "bits": bits, "block_size": block, **attributes}
    node = helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], name="/q", domain="com.microsoft", **asked)
    return model_of([node], [value("x", ["n", k])], [value("y", ["n", n])], initializers)


def attention(size=64, heads=4, kv_heads=2, **attributes):
    asked = {"num_heads": heads, "kv_num_heads": kv_heads, "do_rotary": 1, **attributes}
    inputs = ["qkv", "", "", "past_key", "past_value", "last", "total", "cos", "sin", "", "", "sinks"]
    node = helper.make_node(
        "GroupQueryAttention", inputs, ["y", "key", "value"], name="/attn", domain="com.microsoft", **asked
    )
    cache = [1, kv_heads, "past", size]
    given = [value("qkv", [1, "n", (heads + 2 * kv_heads) * size])]
    given += [value(name, cache) for name in ("past_key", "past_value")]
    given += [value("last", [1], TensorProto.INT32), value("total", [], TensorProto.INT32)]
    angles = np.outer(np.arange(32), 1 / 100 ** np.linspace(0, 1, size // 2))
    tables = {"cos": np.cos(angles), "sin": np.sin(angles), "sinks": np.zeros(heads)}
    initializers = [numpy_helper.from_array(a.astype(np.float32), name) for name, a in tables.items()]
    made = [value("y", [1, "n", heads * size]), value("key", cache), value("value", cache)]
    return model_of([node], given, made, initializers)


def session(model):
    """A session on the CPU that says nothing."""
    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[CPU])


def nothing(model):
    """Inputs that fit a graph: one token, no past, zeros."""
    types = {TensorProto.FLOAT: np.float32, TensorProto.INT32: np.int32}
    fed = {}
    for each in model.graph.input:
        shape = [{"n": 1, "past": 0}.get(d.dim_param, d.dim_value) for d in each.type.tensor_type.shape.dim]
        fed[each.name] = np.zeros(shape, types[each.type.tensor_type.elem_type])
    return {**fed, "total": np.array(1, np.int32)} if "total" in fed else fed
