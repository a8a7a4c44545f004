"""What TensorRT refuses, each graph beside a twin that it builds: what the linter has to know.

A case says on which compute capabilities it does not build. tests/unit/test_tensorrt_rules.py asks the linter,
tests/oracle/test_tensorrt_rules.py asks TensorRT-RTX.
"""

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto as T

from tests.tensorrt_graphs import (
    B16,
    F32,
    MS,
    K,
    N,
    X,
    attention,
    attention_after_if,
    between,
    chosen,
    circle,
    constant_of,
    constant_out,
    dequantized,
    expert_in_if,
    gathered,
    inside_if,
    inside_loop,
    loop,
    made_twice,
    microscaled,
    mixed,
    nvfp4,
    one,
    outside,
    quantized,
    rotated,
    same_names,
    scaled,
    scaled_by,
    sparse,
    tensor_scatter,
    through,
    topk_of_any,
    twice_named,
    typed_weight,
    undefined,
    with_axes,
    with_function,
    words,
)

SMS = (75, 80, 86, 89, 120, 121)


@dataclass(frozen=True)
class Case:
    """rule: of the finding; none for a graph that builds. fatal: False where it builds all the same.

    taken: capabilities on which TensorRT-RTX builds it against the documentation. data: of its external file.
    """

    model: onnx.ModelProto
    rule: str = ""
    told: str = ""
    sms: tuple[int, ...] = SMS
    fatal: bool = True
    taken: tuple[int, ...] = ()
    data: bytes = b""


TOP = {"outs": 2, "result": [T.FLOAT16, T.INT64]}
HALVES = {"outs": 2, "axis": 1}
OFF = {75: (75,), 89: (75, 80, 86), 120: (75, 80, 86, 89)}  # built from this capability on: not on those
Y = ("y", (K, 4))
Y32 = ("y", (K, 4), T.FLOAT)
SCALE = ("s", (K,))
BYTES, HALF_SCALES = np.ones((N, 2, 16), np.uint8), np.ones((N * 2), np.float16)

CASES = {
    # Types
    "UINT4": Case(typed_weight(T.UINT4), "types", "of UINT4"),
    "INT16": Case(typed_weight(T.INT16), "types", "of INT16"),
    "UINT16": Case(typed_weight(T.UINT16), "types", "of UINT16"),
    "UINT32": Case(typed_weight(T.UINT32), "types", "of UINT32"),
    "STRING": Case(typed_weight(T.STRING), "types", "of STRING"),
    "FLOAT8E8M0": Case(typed_weight(T.FLOAT8E8M0), "types", "of FLOAT8E8M0"),
    "INT16 in": Case(one("Cast", ("x", (4, K), T.INT16), to=T.FLOAT16), "types", "of INT16"),
    "INT16 out": Case(one("Cast", X, to=T.INT16, result=T.INT16), "types", "of INT16"),
    "STRING in": Case(one("Cast", ("x", (4, K), T.STRING), to=T.FLOAT16), "types", "of STRING"),
    "INT16 on its way": Case(between(T.INT16), "types", "makes INT16"),
    "sparse": Case(sparse(), "types", "sparse_value"),
    "a constant of UINT4": Case(constant_of(T.UINT4), "types", "of UINT4"),
    "INT8 added": Case(typed_weight(T.INT8), "types", "must go to DequantizeLinear directly"),
    "INT4 added": Case(typed_weight(T.INT4), "types", "INT4 goes from a constant"),
    "INT8 out": Case(constant_out(), "types", "constant of INT8"),
    "FP8 by Cast": Case(one("Cast", X, to=T.FLOAT8E4M3FN, result=T.FLOAT8E4M3FN), "types", "by QuantizeLinear only"),
    "UINT8 gathered": Case(words(), "types", "expands", fatal=False),
    "UINT8 on its way": Case(between(T.UINT8), "types", "not from node to node"),
    "UINT8 turned": Case(one("Transpose", ("x", (4, K), T.UINT8), result=T.UINT8), "types", "for Cast only"),
    "remainders": Case(one("Mod", F32, ("y", (4, K), T.FLOAT), dtype=T.FLOAT), "types", "remainders of FLOAT"),
    "DOUBLE": Case(typed_weight(T.DOUBLE), "types", "casts to FLOAT", fatal=False),
    "two types added": Case(mixed(), "types", "not valid ONNX: "),
    "a product that does not fit": Case(one("MatMul", X, ("y", (K + 1, 4))), "types", "not valid ONNX: "),
    # What a GPU has
    "INT4": Case(dequantized(T.INT4), "sm", "INT4 is not there", OFF[75]),
    "FP8": Case(dequantized(T.FLOAT8E4M3FN), "sm", "FLOAT8E4M3FN is not there", OFF[89]),
    "FP4": Case(dequantized(T.FLOAT4E2M1), "sm", "FLOAT4E2M1 is not there", OFF[120]),
    "NVFP4": Case(nvfp4(), "sm", "FLOAT4E2M1 is not there", OFF[120]),
    "MXFP4": Case(microscaled(), "sm", "FLOAT4E2M1 is not there", OFF[120]),
    "MXFP8": Case(microscaled(T.FLOAT8E4M3FN), "sm", "FLOAT8E4M3FN is not there", OFF[89]),
    "experts of INT4": Case(gathered(), "sm", "INT4 is not there", OFF[75]),
    "BF16": Case(one("Relu", B16, dtype=T.BFLOAT16), "sm", "BFLOAT16 is not there", OFF[75]),
    "INT4 with BF16": Case(dequantized(T.INT4, activation=T.BFLOAT16), "sm", "BFLOAT16 is not there", OFF[75]),
    "F32 MatMul": Case(one("MatMul", F32, Y32, dtype=T.FLOAT), "sm", "float32 matrices", OFF[75]),
    "F32 Gemm": Case(one("Gemm", F32, Y32, dtype=T.FLOAT), "sm", "float32 matrices", OFF[75]),
    "F32 Einsum": Case(one("Einsum", F32, Y32, dtype=T.FLOAT, equation="ij,jk->ik"), "sm", "float32 matrices", OFF[75]),
    # Codes between the constant and DequantizeLinear
    "INT4 gathered": Case(through("Gather", T.INT4), "gather", "INT4 goes from a constant"),
    "INT8 gathered": Case(through("Gather", T.INT8), "gather", "must go to DequantizeLinear directly"),
    "FP8 gathered": Case(through("Gather", T.FLOAT8E4M3FN), "gather", "FLOAT8E4M3FN goes"),
    "FP4 gathered": Case(through("Gather", T.FLOAT4E2M1), "gather", "FLOAT4E2M1 goes"),
    "INT4 reshaped": Case(through("Reshape", T.INT4), "types", "INT4 goes from a constant"),
    "INT8 transposed": Case(through("Transpose", T.INT8, perm=[0, 2, 1]), "types", "must go to DequantizeLinear"),
    "INT8 passed on": Case(through("Identity", T.INT8), "types", "must go to DequantizeLinear directly"),
    # DequantizeLinear
    "UINT8 codes": Case(dequantized(T.UINT8), "dequantize", "codes of UINT8"),
    "a zero point": Case(dequantized(zero=1), "dequantize", "not zero"),
    "a zero point of INT4": Case(dequantized(T.INT4, zero=1), "dequantize", "not zero"),
    "a zero point while quantizing": Case(quantized(1), "dequantize", "not zero"),
    "a zero point as input": Case(quantized(None), "dequantize", "zero points that are no constant"),
    "scale 0": Case(dequantized(scale=0.0), "dequantize", "not above zero"),
    "scale -0": Case(dequantized(scale=-0.0), "dequantize", "not above zero"),
    "scale below 0": Case(dequantized(scale=-0.01), "dequantize", "not above zero"),
    "scale NaN": Case(dequantized(scale=float("nan")), "dequantize", "not above zero"),
    "scale 0 in f32": Case(dequantized(scale=0.0, scale_dtype=T.FLOAT), "dequantize", "not above zero"),
    "scale 0 in bf16": Case(dequantized(scale=0.0, activation=T.BFLOAT16), "dequantize", "not above zero"),
    "scale 0 of FP8": Case(dequantized(T.FLOAT8E4M3FN, scale=0.0), "dequantize", "not above zero"),
    "scale 0 of FP4": Case(dequantized(T.FLOAT4E2M1, scale=0.0), "dequantize", "not above zero"),
    "scales of FP8": Case(scaled_by("codes"), "dequantize", "scales of FLOAT8E4M3FN"),
    "scale 0 outside": Case(outside(0.0)[0], "dequantize", "not above zero", data=outside(0.0)[1]),
    "an input as scale": Case(scaled_by("input"), "dequantize", "no constant", fatal=False),
    "output_dtype of INT4": Case(
        dequantized(T.INT4, scale_dtype=T.FLOAT, output_dtype=T.FLOAT16), "dequantize", "output_dtype is FLOAT16"
    ),
    "output_dtype of INT8": Case(
        dequantized(scale_dtype=T.FLOAT, output_dtype=T.FLOAT16), "dequantize", "output_dtype", fatal=False
    ),
    "a rest": Case(dequantized(k=80), "dequantize", "80 rows are no whole blocks of 32"),
    "a rest that divides": Case(scaled((3, N), 36, codes=(96, N)), "dequantize", "no whole blocks", taken=SMS),
    "blocks of another size": Case(scaled((4, N)), "dequantize", "another block", taken=SMS),
    "one row of scales": Case(scaled((1, N)), "dequantize", "another block", taken=SMS),
    "too few columns": Case(scaled((2, N // 2)), "dequantize", "scales [2, 16] for codes [64, 32]"),
    "channels of another axis": Case(scaled((N,), 0), "dequantize", "without block_size for 64 channels"),
    "the first of three axes": Case(scaled((1, K, N), 4, codes=(4, K, N)), "dequantize", "along one of the last two"),
    "an axis too many": Case(scaled((N,), 0, axis=7), "dequantize", "axis 7"),
    "an axis too many for blocks": Case(scaled((2, N), axis=7), "dequantize", "axis 7"),
    "microscales of f16": Case(microscaled(scale=T.FLOAT16), "dequantize", "scales of FLOAT16", taken=(120, 121)),
    "microscales of e8m0": Case(microscaled(scale=T.FLOAT8E8M0), "types", "of FLOAT8E8M0"),
    "microscaled INT8": Case(microscaled(T.INT8), "dequantize", "codes of INT8"),
    "microscaled INT4": Case(microscaled(T.INT4), "dequantize", "codes of INT4"),
    "microscales for 16": Case(microscaled(block=16), "dequantize", "blocks of 16; it takes 32", taken=(120, 121)),
    # Attention
    "outputs for a cache": Case(attention(outs=3, past=True), "attention", "3 outputs"),
    "past keys": Case(attention(past=True), "attention", "past keys"),
    "F32 attention": Case(attention(T.FLOAT), "attention", "of FLOAT; its kernels"),
    "softcap": Case(attention(softcap=5.0), "attention", "softcap"),
    "softmax_precision": Case(attention(softmax_precision=1), "attention", "softmax_precision"),
    "lengths": Case(
        attention(opset=24, given={6: ("n", (1,), T.INT64)}), "attention", "lengths without padding", taken=SMS
    ),
    "a window": Case(attention(opset=25, is_causal=1, left_window_size=2), "attributes", "left_window", taken=SMS),
    "heads of 8": Case(attention(size=8), "attention", "heads of 8, 8, 8"),
    "heads of 264": Case(attention(size=264), "attention", "heads of 264"),
    "values of another size": Case(attention(values=32), "attention", "heads of 64, 64, 32"),
    "3 heads of keys": Case(attention(kv=3), "attention", "4 heads of queries for 3 of keys"),
    "attention in a branch": Case(inside_if(), "attention", "inside a branch"),
    "heads that do not divide": Case(attention(flat=True, q_num_heads=3), "attention", "not of as many heads"),
    "attention in a loop": Case(inside_loop(), "attention", "inside a branch"),
    "attention on both sides of If": Case(attention_after_if(before=True), "attention", "another one before it"),
    # Others
    "TensorScatter and on": Case(tensor_scatter(True), "scatter", "must be an output"),
    "TensorScatter elsewhere": Case(tensor_scatter(axis=1), "scatter", "axis 1"),
    "TensorScatter around": Case(tensor_scatter(mode="circular"), "scatter", "circular"),
    "TensorScatter in 3-D": Case(tensor_scatter(dims=3), "scatter", "3 dimensions"),
    "ScatterND adds": Case(
        one("ScatterND", X, ("i", (2, 1), T.INT64), ("u", (2, K)), reduction="add"), "scatter", "reduction 'add'"
    ),
    "ScatterElements adds": Case(
        one("ScatterElements", X, ("i", (2, K), T.INT64), ("u", (2, K)), reduction="add"), "scatter", "'add'"
    ),
    "INT32 positions": Case(rotated(T.INT32), "rotary", "of INT32", taken=SMS),
    "TopK unsorted": Case(one("TopK", X, [4], **TOP, sorted=0), "topk", "sorted=0", taken=SMS),
    "TopK of many": Case(one("TopK", ("x", (2, 5000)), [3841], **TOP), "topk", "K=3841"),
    "TopK of more than all": Case(one("TopK", X, [K + 1], **TOP), "topk", "K=65 of 64"),
    "TopK of any": Case(topk_of_any(), "topk", "no constant", taken=SMS),
    "ReduceSum": Case(with_axes("ReduceSum"), "axes", "no constant"),
    "Squeeze": Case(with_axes("Squeeze", ("x", (1, 4))), "axes", "no constant"),
    "Unsqueeze": Case(with_axes("Unsqueeze"), "axes", "no constant"),
    "Split by both": Case(one("Split", X, [32, 32], **HALVES, num_outputs=2), "split", "both"),
    "Split miscounted": Case(one("Split", X, **HALVES, num_outputs=3), "split", "num_outputs=3 and 2 outputs"),
    "Range of f16": Case(one("Range", *(np.float16(i) for i in (0, 4, 1))), "range", "of FLOAT16"),
    "Range of two types": Case(
        one("Range", np.int64(0), np.int32(4), np.int64(1), result=T.INT64), "range", "INT32 and INT64; start"
    ),
    "LayerNormalization": Case(
        one("LayerNormalization", X, SCALE, outs=3, result=[T.FLOAT16, T.FLOAT, T.FLOAT]), "norm", "more than one"
    ),
    "If of two ranks": Case(chosen(("Relu", "Gather")), "if", "2 and 1 dimensions"),
    "an expert in If": Case(expert_in_if(), "if", "ONNX Runtime", fatal=False),
    "Loop that grows": Case(loop("grow"), "loop", "changes its shape"),
    "Loop that collects": Case(loop("dynamic scan"), "loop", "not fixed"),
    # Operators
    "BitwiseAnd": Case(
        one("BitwiseAnd", ("x", (4,), T.INT32), ("y", (4,), T.INT32), result=T.INT32), "unsupported", "no such operator"
    ),
    "NonZero": Case(one("NonZero", X, result=T.INT64), "unsupported", "no such operator"),
    "an invented one": Case(one("Frob", X), "unsupported", "no such operator"),
    "of an own domain": Case(one("Frob", X, domain="own"), "unsupported", "no such operator in 'own'"),
    "MatMulNBits": Case(
        one("MatMulNBits", X, BYTES, HALF_SCALES, domain=MS, K=K, N=N, bits=4, block_size=32), "microsoft", "a plugin"
    ),
    "FusedMatMul": Case(one("FusedMatMul", X, Y, domain=MS), "microsoft", "does not know"),
    "FastGelu": Case(one("FastGelu", X, domain=MS), "microsoft", "does not know"),
    "TRT_MoE": Case(one("TRT_MoE", X, domain="trt"), "unsupported", "no such operator in 'trt'"),
    "an attribute of the future": Case(one("Relu", X, frob=1), "attributes", "pass over", taken=SMS),
    "functions": Case(with_function(), "functions", "inline_local_functions", taken=SMS),
    "attention before its time": Case(attention(opset=22), "opset", "22 has no such operator", taken=SMS),
    "operator set 25": Case(one("Relu", X, opset=25), "opset", "operator set 25", fatal=False),
    # Names
    "two of a name": Case(same_names(), "names", "the name of another"),
    "a value made twice": Case(made_twice(), "names", "made twice"),
    "a weight twice": Case(twice_named(dequantized()), "names", "made twice"),
    "from nowhere": Case(undefined(), "names", "nothing makes it"),
    "in a circle": Case(circle(), "names", "in a circle"),
}

TWINS = {
    "INT8": dequantized(),
    "quantized and back": quantized(0),
    "UINT8 in": one("Cast", ("x", (4, K), T.UINT8), to=T.FLOAT16),
    "zero points of 0": dequantized(zero=0),
    "scales of f32 and a Cast": dequantized(scale_dtype=T.FLOAT),
    "its own output_dtype": dequantized(output_dtype=T.FLOAT16),
    "blocks of N": dequantized(axis=1),
    "scales in a Constant": scaled_by("constant"),
    "codes in a Constant": constant_of(T.INT8),
    "channels": scaled((N,), 0, axis=1),
    "a whole tensor": scaled((), 0),
    "a tensor of one scale": scaled((1,), 0),
    "a middle axis": scaled((4, 2, N), axis=1, codes=(4, K, N)),
    "experts of INT8": gathered(T.INT8),
    "F16 MatMul": one("MatMul", X, Y),
    "Attention": attention(),
    "Attention with bits of a mask": attention(given={3: ("mask", (3, 8), T.BOOL)}),
    "causal Attention": attention(is_causal=1, scale=0.25),
    "Attention after If": attention_after_if(),
    "flat Attention": attention(flat=True),
    "TensorScatter": tensor_scatter(),
    "RotaryEmbedding": rotated(),
    "TopK": one("TopK", ("x", (2, 5000)), [3840], **TOP),
    "ReduceSum": one("ReduceSum", X, [1]),
    "Unsqueeze": one("Unsqueeze", X, [0]),
    "Split": one("Split", X, [32, 32], **HALVES),
    "ScatterND": one("ScatterND", X, ("i", (2, 1), T.INT64), ("u", (2, K))),
    "LayerNormalization": one("LayerNormalization", X, SCALE),
    "If": chosen(),
    "Loop": loop(),
    "Loop that collects": loop("scan"),
    "SkipSimplifiedLayerNormalization": one(
        "SkipSimplifiedLayerNormalization", ("x", (1, 4, K)), ("s", (1, 4, K)), ("g", (K,)), domain=MS
    ),
}
