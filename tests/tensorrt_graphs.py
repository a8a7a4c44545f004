"""Small graphs of what a decoder is made of, right and wrong, for TensorRT to take or to refuse."""

from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto as T
from onnx import helper, numpy_helper

K, N, BLOCK = 64, 32, 32
QUANT = {T.INT4: 4, T.UINT4: 4, T.FLOAT4E2M1: 4, T.INT8: 8, T.UINT8: 8, T.FLOAT8E4M3FN: 8, T.FLOAT8E8M0: 8, T.INT16: 16}


@dataclass
class Net:
    """A graph in the making. Values are their names; x is [4, K] of `dtype`."""

    dtype: int = T.FLOAT16
    opset: int = 23
    nodes: list = field(default_factory=list)
    inputs: list = field(default_factory=list)
    outputs: list = field(default_factory=list)
    weights: list = field(default_factory=list)
    domains: dict = field(default_factory=dict)

    def input(self, name="x", shape=(4, K), dtype=None):
        self.inputs.append(helper.make_tensor_value_info(name, dtype or self.dtype, shape))
        return name

    def weight(self, array, dtype=None, name=None):
        """An array, or a shape of codes that are all 0x11 in a quantized type."""
        name = name or f"w{len(self.weights)}"
        if isinstance(array, tuple):
            size = int(np.prod(array)) * QUANT[dtype] // 8
            tensor = helper.make_tensor(name, dtype, array, bytes([0x11]) * size, raw=True)
        elif dtype == T.BFLOAT16:
            tensor = helper.make_tensor(name, dtype, np.shape(array), np.ravel(array))
        else:
            cast = np.asarray(array, helper.tensor_dtype_to_np_dtype(dtype or self.dtype))
            tensor = numpy_helper.from_array(cast, name)
        self.weights.append(tensor)
        return name

    def ints(self, *values):
        return self.weight(list(values), T.INT64)

    def node(self, op, *inputs, outs=1, domain="", **attributes):
        made = [f"v{len(self.nodes)}_{i}" for i in range(outs)]
        self.nodes.append(
            helper.make_node(op, list(inputs), made, name=f"/{op}_{len(self.nodes)}", domain=domain, **attributes)
        )
        if domain:
            self.domains[domain] = 1
        return made[0] if outs == 1 else made

    def model(self, *results, dtype=None, shape=None):
        """The graph whose outputs are these values."""
        kinds = dtype if isinstance(dtype, list) else [dtype or self.dtype] * len(results)
        self.outputs = [helper.make_tensor_value_info(r, kind, shape) for r, kind in zip(results, kinds, strict=True)]
        graph = helper.make_graph(self.nodes, "g", self.inputs, self.outputs, self.weights)
        opsets = [helper.make_opsetid(d, v) for d, v in {"": self.opset, **self.domains}.items()]
        return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def one(op, *arguments, result=None, opset=23, dtype=T.FLOAT16, outs=1, keep=None, domain="", **attributes):
    """A graph of one node. arguments: (name, shape, dtype) for an input; an array, or a list of int64, for a weight."""
    net = Net(dtype, opset)
    given = []
    for a in arguments:
        if isinstance(a, str):
            given.append("")
        elif isinstance(a, tuple) and isinstance(a[0], str):
            given.append(net.input(a[0], a[1], a[2] if len(a) > 2 else None))
        elif isinstance(a, np.ndarray | np.generic):
            given.append(net.weight(a, helper.np_dtype_to_tensor_dtype(a.dtype)))
        else:
            given.append(net.ints(*a))
    made = net.node(op, *given, outs=outs, domain=domain, **attributes)
    made = [made] if outs == 1 else made
    return net.model(*(made if keep is None else [made[i] for i in keep]), dtype=result)


def dequantized(
    dtype=T.INT8, axis=0, block=BLOCK, scale=0.01, scale_dtype=None, activation=T.FLOAT16, k=K, zero=None, **more
):
    """x @ DequantizeLinear(codes [K, N]) with scales [K / block, N]."""
    net = Net(activation)
    scale_dtype = scale_dtype or activation
    rows = [-(-k // block), N] if axis == 0 else [k, -(-N // block)]
    scales = np.full(rows, 0.01)
    scales[0, 0] = scale
    given = [net.weight((k, N), dtype, "codes"), net.weight(scales, scale_dtype, "scales")]
    if zero is not None:
        zeros = np.zeros(rows, np.int8)
        zeros[-1, -1] = zero
        if dtype in (T.INT4, T.UINT4):
            given.append("zeros")
            net.weights.append(helper.make_tensor("zeros", dtype, rows, zeros.ravel()))
        else:
            given.append(net.weight(zeros, dtype, "zeros"))
    w = net.node("DequantizeLinear", *given, axis=axis, block_size=block, **more)
    if more.get("output_dtype", scale_dtype) != activation:
        w = net.node("Cast", w, to=activation)
    return net.model(net.node("MatMul", net.input(shape=(4, k)), w))


def through(op, dtype, **attributes):
    """Codes [4, K, N] that go through another operator before they are dequantized."""
    net = Net()
    more = {"Gather": [net.input("i", (2,), T.INT64)], "Reshape": [net.ints(2, 2 * K, N)]}
    codes = net.node(op, net.weight((4, K, N), dtype, "codes"), *more.get(op, []), **attributes)
    shape = {"Gather": (2, K // BLOCK, N), "Reshape": (2, 2 * K // BLOCK, N), "Transpose": (4, K // BLOCK, N)}
    scales = net.weight(np.full(shape.get(op, (4, K // BLOCK, N)), 0.01), name="scales")
    axis = 2 if op == "Transpose" else 1
    if op == "Transpose":
        scales = net.weight(np.full((4, N, K // BLOCK), 0.01))
    return net.model(net.node("DequantizeLinear", codes, scales, axis=axis, block_size=BLOCK))


def gathered(dtype=T.INT4):
    """The experts' form: dequantized [E, K, N], then gathered by [2], then multiplied."""
    net = Net()
    w = net.node(
        "DequantizeLinear",
        net.weight((4, K, N), dtype, "codes"),
        net.weight(np.full((4, K // BLOCK, N), 0.01)),
        axis=1,
        block_size=BLOCK,
    )
    w = net.node("Gather", w, net.input("i", (2,), T.INT64), axis=0)
    return net.model(net.node("MatMul", net.input("x", (2, 1, K)), w))


def nvfp4():
    net = Net()
    inner = net.node("DequantizeLinear", net.weight((N, K // 16), T.FLOAT8E4M3FN), net.weight(0.01))
    w = net.node("DequantizeLinear", net.weight((N, K), T.FLOAT4E2M1), inner, axis=-1, block_size=16)
    return net.model(net.node("MatMul", net.input(), net.node("Transpose", w, perm=[1, 0])))


def microscaled(dtype=T.FLOAT4E2M1, scale=T.UINT8, block=32, axis=-1, **more):
    net = Net()
    shape = (N, K // block) if axis in (-1, 1) else (N // block, K)
    scales = net.weight(np.full(shape, 0.01), scale) if scale == T.FLOAT16 else net.weight(shape, scale)
    attributes = {"axis": axis, "block_size": block, "output_dtype": T.FLOAT16, **more}
    attributes = {k: v for k, v in attributes.items() if v is not None}
    w = net.node("TRT_MXFP8DequantizeLinear", net.weight((N, K), dtype), scales, domain="trt", **attributes)
    return net.model(net.node("MatMul", net.input(), net.node("Transpose", w, perm=[1, 0])))


def scaled_by(how):
    """A scale that is no initializer."""
    net = Net()
    x = net.input()
    rows = np.full((K // BLOCK, N), 0.01)
    if how == "input":
        scale = net.input("s", rows.shape)
    elif how == "cast":
        scale = net.node("Cast", net.weight(rows, T.FLOAT), to=T.FLOAT16)
    elif how == "codes":
        scale = net.weight(rows.shape, T.FLOAT8E4M3FN)
    elif how == "constant":
        scale = net.node("Constant", value=numpy_helper.from_array(rows.astype(np.float16)))
    w = net.node("DequantizeLinear", net.weight((K, N), T.INT8, "codes"), scale, axis=0, block_size=BLOCK)
    return net.model(net.node("MatMul", x, w))


def attention(
    dtype=T.FLOAT16, outs=1, past=False, flat=False, opset=23, given=None, size=64, values=None, kv=2, **attributes
):
    """4 heads of queries, 2 of keys, 3 tokens, 5 past; given: a further input by its index."""
    net = Net(dtype, opset)
    if flat:
        q, *cache = (
            net.input("q", (1, 3, 4 * size)),
            net.input("k", (1, 8, kv * size)),
            net.input("v", (1, 8, kv * size)),
        )
        attributes = {"q_num_heads": 4, "kv_num_heads": kv, **attributes}
    else:
        q, k = net.input("q", (1, 4, 3, size)), net.input("k", (1, kv, 8, size))
        cache = [k, net.input("v", (1, kv, 8, values or size))]
    inputs = [q, *cache]
    if past:
        inputs += [net.input("mask", (1, 4, 3, 13)), net.input("pk", (1, 2, 5, 64)), net.input("pv", (1, 2, 5, 64))]
    for index, extra in (given or {}).items():
        inputs += [""] * (index - len(inputs)) + [net.input(*extra)]
    made = net.node("Attention", *inputs, outs=outs, **attributes)
    return net.model(*([made] if outs == 1 else made))


def attention_after_if(before=False):
    net = Net()
    keys = net.weight(np.zeros((1, 2, 8, 64)))
    q = net.input("q", (1, 4, 3, 64))
    if before:
        q = net.node("Attention", q, keys, keys)
    return net.model(net.node("Attention", branches(net, q, ["Relu", "Neg"]), keys, keys))


def branches(net, x, ops, names=("t", "e"), shapes=(None, None)):
    """If of an input `c`: one operator in each branch. Adds the node to the net."""
    graphs = {}
    for key, op, name, shape in zip(("then_branch", "else_branch"), ops, names, shapes, strict=True):
        nodes = [helper.make_node(*op, [name])] if isinstance(op, tuple) else [helper.make_node(op, [x], [name])]
        out = helper.make_tensor_value_info(name, net.dtype, shape)
        graphs[key] = helper.make_graph(nodes, key, [], [out])
    return net.node("If", net.input("c", (), T.BOOL), **graphs)


def chosen(ops=("Relu", "Neg"), **more):
    net = Net()
    x = net.input()
    first = net.weight(0, T.INT64)
    ops = [(op, [x, first]) if op == "Gather" else op for op in ops]
    return net.model(branches(net, x, ops, **more))


def expert_in_if():
    """DequantizeLinear and MatMul inside a branch, its weights in the main graph."""
    net = Net()
    x = net.input()
    codes, scales = net.weight((K, K), T.INT8, "codes"), net.weight(np.full((K // BLOCK, K), 0.01), name="scales")
    inner = [
        helper.make_node("DequantizeLinear", [codes, scales], ["d"], name="/dq", axis=0, block_size=BLOCK),
        helper.make_node("MatMul", [x, "d"], ["t"]),
    ]
    then = helper.make_graph(inner, "then", [], [helper.make_tensor_value_info("t", T.FLOAT16, None)])
    other = helper.make_graph(
        [helper.make_node("Relu", [x], ["e"])], "else", [], [helper.make_tensor_value_info("e", T.FLOAT16, None)]
    )
    return net.model(net.node("If", net.input("c", (), T.BOOL), then_branch=then, else_branch=other))


def loop(body="carry"):
    """Three turns: x doubled (carry), kept (scan), or longer each time (grow)."""
    net = Net()
    x = net.input()
    given = [
        helper.make_tensor_value_info("i", T.INT64, []),
        helper.make_tensor_value_info("on", T.BOOL, []),
        helper.make_tensor_value_info("a", T.FLOAT16, (4, K) if body != "grow" else ("n", K)),
    ]
    nodes = [helper.make_node("Identity", ["on"], ["still"])]
    outs = [helper.make_tensor_value_info("still", T.BOOL, [])]
    if body == "grow":
        nodes.append(helper.make_node("Concat", ["a", "a"], ["b"], axis=0))
        outs.append(helper.make_tensor_value_info("b", T.FLOAT16, ("m", K)))
    else:
        nodes.append(helper.make_node("Add", ["a", "a"], ["b"]))
        outs.append(helper.make_tensor_value_info("b", T.FLOAT16, (4, K)))
    results = 1
    if body == "scan":
        nodes.append(helper.make_node("Relu", ["b"], ["s"]))
        outs.append(helper.make_tensor_value_info("s", T.FLOAT16, (4, K)))
        results = 2
    if body == "dynamic scan":
        nodes.append(helper.make_node("NonZero", ["b"], ["s"]))
        outs.append(helper.make_tensor_value_info("s", T.INT64, (2, "z")))
        results = 2
    graph = helper.make_graph(nodes, "body", given, outs)
    made = net.node("Loop", net.weight(3, T.INT64), net.weight(True, T.BOOL), x, outs=results, body=graph)
    kinds = [T.FLOAT16, T.INT64 if body == "dynamic scan" else T.FLOAT16][:results]
    return net.model(*([made] if results == 1 else made), dtype=kinds)


def tensor_scatter(through=False, dims=4, **attributes):
    net = Net(opset=24)
    shape = (1, 2, 16, 64) if dims == 4 else (1, 16, 64)
    past, new = net.input("past", shape), net.input("new", (*shape[:-2], 3, 64))
    made = net.node("TensorScatter", past, new, net.input("at", (1,), T.INT64), **{"axis": -2, **attributes})
    return net.model(net.node("Identity", made) if through else made)


def rotated(positions=T.INT64):
    net = Net()
    tables = [net.weight(np.ones((32, 32)), name=n) for n in ("cos", "sin")]
    return net.model(
        net.node("RotaryEmbedding", net.input("x", (1, 4, 3, 64)), *tables, net.input("p", (1, 3), positions))
    )


def words():
    """Bytes as a constant that is gathered and cast."""
    net = Net()
    w = net.node("Gather", net.weight((16, K), T.UINT8, "codes"), net.input("i", (4,), T.INT64), axis=0)
    return net.model(net.node("Cast", w, to=T.FLOAT16))


def typed_weight(dtype):
    """A weight of one type, cast to f16 and added."""
    net = Net()
    if dtype == T.STRING:
        net.weights.append(helper.make_tensor("w", dtype, [1], [b"a"]))
    elif dtype in QUANT:
        net.weight((K,), dtype, "w")
    else:
        net.weights.append(helper.make_tensor("w", dtype, [1], [1]))
    return net.model(net.node("Add", net.input(), net.node("Cast", "w", to=T.FLOAT16)))


def outside(scale=0.01):
    """INT8 with its scales in a file: the model and the file's bytes."""
    model = dequantized(T.INT8, scale=scale)
    tensor = next(t for t in model.graph.initializer if t.name == "scales")
    data = bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = T.EXTERNAL
    for key, text in (("location", "weights.data"), ("offset", "64"), ("length", str(len(data)))):
        tensor.external_data.add(key=key, value=text)
    return model, bytes(64) + data


X = ("x", (4, K))
F32 = ("x", (4, K), T.FLOAT)
B16 = ("x", (4, K), T.BFLOAT16)
MS = "com.microsoft"


def same_names():
    """Two DequantizeLinear of one name: TensorRT calls a layer after its node, and these twice."""
    net = Net()
    a, b = (net.node("DequantizeLinear", net.weight((K, N), T.INT8), net.weight(0.01)) for _ in range(2))
    net.nodes[1].name = net.nodes[0].name
    return net.model(net.node("MatMul", net.input(), net.node("Add", a, b)))


def made_twice():
    net = Net()
    x = net.input()
    made = net.node("Relu", x)
    net.nodes.append(helper.make_node("Neg", [x], [made]))
    return net.model(made)


def with_function():
    model = one("F", X, domain="own")
    relu = helper.make_node("Relu", ["x"], ["y"])
    model.functions.append(helper.make_function("own", "F", ["x"], ["y"], [relu], [helper.make_opsetid("", 23)]))
    return model


def constant_of(dtype):
    """A quantized matrix that is the tensor of a Constant."""
    net = Net()
    codes = helper.make_tensor("c", dtype, (K, N), bytes([0x11]) * (K * N * QUANT[dtype] // 8), raw=True)
    made = net.node("Constant", value=codes)
    w = net.node("DequantizeLinear", made, net.weight(np.full((K // BLOCK, N), 0.01)), axis=0, block_size=BLOCK)
    return net.model(net.node("MatMul", net.input(), w))


def sparse():
    net = Net()
    values, indices = helper.make_tensor("v", T.FLOAT16, [1], [1.0]), helper.make_tensor("i", T.INT64, [1], [1])
    made = net.node("Constant", sparse_value=helper.make_sparse_tensor(values, indices, [K]))
    return net.model(net.node("Add", net.input(), made))


def scaled(shape, block=BLOCK, axis=0, codes=(K, N)):
    """INT8 codes with scales of some shape."""
    net = Net()
    more = {"block_size": block} if block else {}
    scales = net.weight(np.full(shape, 0.01))
    return net.model(net.node("DequantizeLinear", net.weight(codes, T.INT8), scales, axis=axis, **more))


def undefined():
    net = Net()
    return net.model(net.node("Add", net.input(), "nowhere"))


def circle():
    net = Net()
    net.nodes.append(helper.make_node("Add", [net.input(), "b"], ["a"], name="first"))
    net.nodes.append(helper.make_node("Relu", ["a"], ["b"], name="second"))
    return net.model("b")


def constant_out():
    net = Net()
    net.weight((K, N), T.INT8, "w")
    return net.model(net.node("Relu", net.input()), "w", dtype=[T.FLOAT16, T.INT8])


def topk_of_any():
    """K is the size of the batch."""
    net = Net()
    x = net.input("x", ("b", K))
    return net.model(*net.node("TopK", x, net.node("Shape", x, end=1), outs=2), dtype=[T.FLOAT16, T.INT64])


def mixed():
    net = Net()
    return net.model(net.node("Add", net.input(), net.input("y", dtype=T.FLOAT)))


def between(dtype):
    net = Net()
    return net.model(net.node("Cast", net.node("Cast", net.input(), to=dtype), to=T.FLOAT16))


def quantized(zero):
    """A zero point that is a number, or the input that it is."""
    net = Net()
    at = net.input("z", (), T.INT8) if zero is None else net.weight(zero, T.INT8)
    scale = net.weight(0.01)
    made = net.node("QuantizeLinear", net.input(), scale, at)
    return net.model(net.node("DequantizeLinear", made, scale))


def inside_if():
    net = Net()
    given = [net.input("q", (1, 4, 3, 64)), net.input("k", (1, 2, 8, 64)), net.input("v", (1, 2, 8, 64))]
    return net.model(branches(net, given[0], [("Attention", given), "Relu"]))


def inside_loop():
    net = Net()
    q, k = net.input("q", (1, 4, 3, 64)), net.input("k", (1, 2, 8, 64))
    nodes = [helper.make_node("Identity", ["on"], ["still"]), helper.make_node("Attention", ["a", k, k], ["b"])]
    given = [("i", T.INT64, ()), ("on", T.BOOL, ()), ("a", T.FLOAT16, (1, 4, 3, 64))]
    made = [("still", T.BOOL, ()), ("b", T.FLOAT16, (1, 4, 3, 64))]
    values = [[helper.make_tensor_value_info(*each) for each in side] for side in (given, made)]
    body = helper.make_graph(nodes, "body", *values)
    return net.model(net.node("Loop", net.weight(3, T.INT64), net.weight(True, T.BOOL), q, body=body))


def twice_named(model):
    model.graph.initializer.append(model.graph.initializer[0])
    return model


def with_axes(op, x=X):
    return one(op, x, ("c", (1,), T.INT64))
