"""What TensorRT's ONNX parser and builder do not take of one operator.

Sources: the parser's table of operators (onnx-tensorrt, docs/operators.md, 10.15), TensorRT's documentation of
IDequantizeLayer and IAttention; and TensorRT for RTX 1.7.1 itself, which tests/oracle/test_tensorrt_rules.py asks.
Where the table is stricter than that release the table counts: other releases share it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from exporter.validate.onnx_file import printable
from exporter.validate.tensorrt_graph import BF16, TRT, Problem, Problems, Site, name_of
from exporter.validate.tensorrt_quantized import dequantize, microscaled, product, types, zeros

MICROSOFT = "com.microsoft"

# What `OnnxParser.supports_operator` of TensorRT for RTX 1.7.1 says yes to, less what then misses a plugin or a
# kernel: CausalConvWithState, LinearAttention, NonMaxSuppression, NonZero and RoiAlign. Most are known by name only:
# the rules below are for what a decoder is made of.
_NAMES = """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization
    BlackmanWindow Cast CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv
    ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand
    EyeLike Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool
    GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HammingWindow HannWindow HardSigmoid
    HardSwish Hardmax Identity If InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less
    LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul Max MaxPool Mean
    MeanVarianceNormalization Min Mish Mod Mul Neg Not OneHot Or PRelu Pad Pow QuantizeLinear
    RMSNormalization RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceL1
    ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare
    Relu Reshape Resize ReverseSequence RotaryEmbedding Round STFT Scan Scatter ScatterElements
    ScatterND Selu Shape Shrink Sigmoid Sign SimplifiedLayerNormalization Sin Sinh Size Slice Softmax Softplus
    Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Swish Tan Tanh TensorScatter ThresholdedRelu Tile TopK
    Transpose Trilu Unsqueeze Upsample Where Xor
"""
OPERATORS = frozenset(_NAMES.split())
OPSETS = (9, 24)  # what the parser's table covers
_NATIVE = frozenset({"SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization", "MultiHeadAttention"})
_PLUGINS = frozenset({"MatMulNBits", "GroupQueryAttention", "QMoE"})  # supports_operator says yes to them
_TOPK = 3840
_HEADS = range(9, 257)  # sizes of a head
_MICROSCALED = {"axis": 2, "block_size": 2, "output_dtype": 2}  # attributes; 2: INT


def problems(site: Site) -> Problems:
    """All that is wrong with a node."""
    op = site.node.op_type
    if site.domain == MICROSOFT and op not in _NATIVE:
        what = (
            "a plugin that TensorRT for RTX does not bring" if op in _PLUGINS else "an operator that it does not know"
        )
        yield Problem("microsoft", f"ONNX Runtime's own operator; for TensorRT it is {what}")
        return
    known = op in OPERATORS if site.domain == "" else (site.domain, op) in _RULES or site.domain == MICROSOFT
    if not known:
        domain = "" if site.domain == "" else f" in {site.domain[:48]!r}"
        yield Problem("unsupported", f"TensorRT has no such operator{domain}")
        return
    if any(a.ref_attr_name for a in site.node.attribute):
        yield Problem("functions", "what it does is decided where its function is called")
        return
    strange = list(_attributes(site))
    yield from strange
    yield from types(site)
    rule = _RULES.get((site.domain, op))
    if rule and not strange:
        yield from rule(site)


def _attributes(site: Site) -> Problems:
    """TensorRT passes over what it does not know, so a newer operator set's attribute would be lost in silence."""
    from onnx import defs

    known: dict[str, int] = _MICROSCALED
    if site.domain == MICROSOFT or site.node.op_type in _NATIVE:
        return  # no rule looks at them
    if site.domain != TRT:
        opset = site.scope.opsets.get(site.domain, 0)
        try:
            schema: Any = defs.get_schema(site.node.op_type, min(opset, OPSETS[1]), site.domain)
        except defs.SchemaError:
            yield Problem("opset", f"operator set {opset} has no such operator")
            return
        known = {name: int(a.type) for name, a in schema.attributes.items()}
    for attribute in site.node.attribute:
        name = printable(attribute.name)
        if attribute.name not in known:
            yield Problem("attributes", f"attribute {name!r}, which TensorRT would pass over")
        elif attribute.type != known[attribute.name]:
            yield Problem("attributes", f"attribute {name!r} is of another type than the operator's")


def _attention(site: Site) -> Problems:
    if len(site.node.output) != 1:
        yield Problem("attention", f"{len(site.node.output)} outputs; TensorRT gives one: keep the cache outside of it")
    for index, what in ((4, "past keys"), (5, "past values"), (6, "lengths without padding")):
        if site.has(index):
            yield Problem("attention", f"takes no {what}: join the cache to the keys and values before it")
    for name in ("softcap", "softmax_precision", "qk_matmul_output_mode"):
        if site.attributes.get(name, 0):
            yield Problem("attention", f"attribute {name}, which TensorRT does not compute")
    wrong = next((d for d in map(site.dtype, range(3)) if d not in (10, BF16, None)), None)
    if wrong is not None and not _decomposed(site):
        yield Problem("attention", f"queries or keys of {name_of(wrong)}; its kernels take FLOAT16 and BFLOAT16")
    yield from _heads(site)
    if site.scope.outer is not None:
        yield Problem("attention", "inside a branch or a loop, where TensorRT has no kernel for it")
    elif site.known.attends_first and not site.known.chosen.isdisjoint(site.node.input):
        yield Problem("attention", "after an If, with another one before it: TensorRT finds no kernel then, or crashes")


def _decomposed(site: Site) -> bool:
    """Whether it becomes products and a softmax, which take any type and size: flat, no mask, as many heads of keys."""
    a, shape = site.attributes, site.shape(0)
    flat = shape is not None and len(shape) == 3 and a.get("q_num_heads", 0) == a.get("kv_num_heads", 0)
    return flat and not site.has(3) and not a.get("is_causal", 0)


def _heads(site: Site) -> Problems:
    """Queries, keys and values are [batch, heads, tokens, size] or [batch, tokens, heads * size]."""
    counts = [site.attributes.get(f"{of}_num_heads", 0) for of in ("q", "kv", "kv")]
    found = [
        (count, shape) for count, shape in zip(counts, map(site.shape, range(3)), strict=True) if shape is not None
    ]
    for count, shape in found:
        if len(shape) not in (3, 4) or (len(shape) == 3 and (count < 1 or (shape[2] or 0) % count)):
            yield Problem("attention", "queries or keys that are not of as many heads as it says")
            return
    heads = [shape[1] if len(shape) == 4 else count for count, shape in found]
    sizes = [shape[3] if len(shape) == 4 else (shape[2] or 0) // count for count, shape in found]
    wrong = any(size and size not in _HEADS for size in sizes) and not _decomposed(site)
    if wrong or len({size for size in sizes if size}) > 1:
        text = f"heads of {', '.join(map(str, sizes))}; they are of one size from {_HEADS[0]} to {_HEADS[-1]}"
        yield Problem("attention", text)
    if len(heads) == 3 and heads[0] and heads[1] and heads[0] % heads[1]:
        yield Problem("attention", f"{heads[0]} heads of queries for {heads[1]} of keys")


def _tensor_scatter(site: Site) -> Problems:
    shape, axis = site.shape(0), site.attributes.get("axis", -2)
    if shape is not None and len(shape) != 4:
        yield Problem("scatter", f"a cache of {len(shape)} dimensions; it takes 4")
    if axis not in (-2, 2):
        yield Problem("scatter", f"axis {axis}; the sequence must be the last but one")
    if site.attributes.get("mode", "linear") != "linear":
        yield Problem("scatter", "mode circular; it takes linear")
    if site.scope.outer is not None or not site.known.outputs.issuperset(site.node.output):
        yield Problem("scatter", "its result must be an output of the graph itself, with nothing between")


def _reduction(site: Site) -> Problems:
    if site.attributes.get("reduction", "none") != "none":
        yield Problem("scatter", f"reduction {site.attributes['reduction']!r}; it takes none")


def _rotary(site: Site) -> Problems:
    if site.dtype(3) not in (None, 7):  # INT64
        yield Problem("rotary", f"position_ids of {name_of(site.dtype(3))}; they are INT64")


def _topk(site: Site) -> Problems:
    if site.attributes.get("sorted", 1) != 1:
        yield Problem("topk", "sorted=0; TensorRT sorts")
    if not site.constant(1):
        yield Problem("topk", "K is no constant")
    k, shape = site.number(1), site.shape(0)
    if k is not None and not 0 < k <= _TOPK:
        yield Problem("topk", f"K={k}; it takes 1 to {_TOPK}")
    axis = site.attributes.get("axis", -1)
    if k is not None and shape and -len(shape) <= axis < len(shape) and k > (shape[axis] or k):
        yield Problem("topk", f"K={k} of {shape[axis]}")


def _axes(site: Site) -> Problems:
    if site.has(1) and not site.constant(1):
        yield Problem("axes", "axes that are no constant")


def _split(site: Site) -> Problems:
    count = site.attributes.get("num_outputs", 0)
    if site.has(1) and count:
        yield Problem("split", "has both sizes and num_outputs")
    elif count and count != len(site.node.output):
        yield Problem("split", f"num_outputs={count} and {len(site.node.output)} outputs")


def _range(site: Site) -> Problems:
    dtypes = {site.dtype(i) for i in range(3)} - {None}
    if len(dtypes) > 1:
        yield Problem(
            "range", f"of {' and '.join(sorted(map(name_of, dtypes)))}; start, limit and delta are of one type"
        )
    elif dtypes - {1, 6, 7, 11}:  # FLOAT, INT32, INT64; DOUBLE is cast down
        yield Problem("range", f"of {name_of(dtypes.pop())}; INT32, INT64 and FLOAT are taken")


def _mod(site: Site) -> Problems:
    if not site.attributes.get("fmod", 0) and site.dtype(0) not in (None, 6, 7):
        yield Problem("types", f"remainders of {name_of(site.dtype(0))} without fmod; INT32 and INT64 are taken")


def _normalization(site: Site) -> Problems:
    if any(site.node.output[1:]):
        yield Problem("norm", "more than one output")


def _constant(site: Site) -> Problems:
    for name in ("sparse_value", "value_string", "value_strings"):
        if name in site.attributes:
            yield Problem("types", f"a constant by {name}")


def _if(site: Site) -> Problems:
    """Both branches make values of the same rank; TensorRT gives other shapes no name."""
    then, other = (site.inner(name) for name in ("then_branch", "else_branch"))
    if then is None or other is None:
        yield Problem("if", "a branch is missing")
        return
    for a, b in zip(then.scope.graph.output, other.scope.graph.output, strict=False):
        ranks = [None if s is None else len(s) for s in (then.shape(a.name), other.shape(b.name))]
        if None in ranks:
            yield Problem("types", "its branches give values of unknown shape; both must be of one rank", fatal=False)
        elif ranks[0] != ranks[1]:
            yield Problem("if", f"its branches give {ranks[0]} and {ranks[1]} dimensions")
    if any(n.op_type == "DequantizeLinear" for branch in (then, other) for n in branch.scope.graph.node):
        text = "DequantizeLinear in a branch, which ONNX Runtime 1.32 optimizes to wrong numbers without a word"
        yield Problem("if", text, fatal=False)


def _loop(site: Site) -> Problems:
    """Body: iteration, condition, carried values; condition, carried values, scanned values."""
    body = site.inner("body")
    if body is None:
        yield Problem("loop", "its body is missing")
        return
    graph, carried = body.scope.graph, max(len(site.node.input) - 2, 0)
    for a, b in zip(graph.input[2:], graph.output[1 : 1 + carried], strict=False):
        before, after = body.shape(a.name), body.shape(b.name)
        if before is None or after is None:
            yield Problem("types", "shapes of carried values that are not known; they must stay the same", fatal=False)
        elif before != after or (None in after and body.named(a.name) != body.named(b.name)):
            yield Problem("loop", f"a carried value changes its shape: {b.name[:48]!r}")
    for scanned in graph.output[1 + carried :]:
        if None in (body.shape(scanned.name) or (None,)):
            yield Problem("loop", f"collects {scanned.name[:48]!r}, whose shape is not fixed")


Rule = Callable[[Site], Problems]
_RULES: Mapping[tuple[str, str], Rule] = {
    **{("", op): product for op in ("MatMul", "Gemm", "Einsum", "LSTM", "GRU", "RNN")},
    **{("", op): _axes for op in OPERATORS if op.startswith("Reduce")},
    **{("", op): _axes for op in ("Squeeze", "Unsqueeze", "CumSum")},
    **{("", op): _reduction for op in ("ScatterND", "ScatterElements", "Scatter")},
    ("", "Attention"): _attention,
    ("", "Constant"): _constant,
    ("", "DequantizeLinear"): dequantize,
    ("", "If"): _if,
    ("", "LayerNormalization"): _normalization,
    ("", "Loop"): _loop,
    ("", "Mod"): _mod,
    ("", "QuantizeLinear"): zeros,
    ("", "Range"): _range,
    ("", "RotaryEmbedding"): _rotary,
    ("", "Split"): _split,
    ("", "TensorScatter"): _tensor_scatter,
    ("", "TopK"): _topk,
    (TRT, "TRT_MXFP8DequantizeLinear"): microscaled,
}
