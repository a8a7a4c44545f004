"""What is refused before ONNX Runtime is asked, and that the rules are needed: what it does when it is asked."""

import os

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporter.errors import ExporterError, MissingExtra, Refused
from exporter.numerics.e2m1 import LEVELS
from exporter.validate import onnx_file
from exporter.validate.onnx_kernels import CPU, CUDA, WEBGPU
from exporter.validate.onnx_rules import require_runnable
from tests.onnx_nodes import E, H, I, attention, experts, float_experts, matrix, model_of, nothing, session, value


def written(tmp_path, model):
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def refusal(tmp_path, model, provider=CPU, kind=Refused):
    with pytest.raises(kind) as caught:
        require_runnable(written(tmp_path, model), provider)
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return caught.value.message


def computed(model, seed=1):
    """The output for some tokens: same seed, same tokens."""
    rng = np.random.default_rng(seed)
    fed = {"x": rng.normal(size=(8, H)), "router": rng.normal(size=(8, E))}
    return session(model).run(None, {name: a.astype(np.float32) for name, a in fed.items()})[0]


def apart(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_runs_is_let_through(tmp_path, bits):
    model = experts(bits=bits)
    require_runnable(written(tmp_path, model), CPU)
    assert np.isfinite(computed(model)).all()


def test_so_are_matrices_and_attention(tmp_path):
    for model in (matrix(), matrix(8), matrix(2, 64), attention(), attention(local_window_size=8), float_experts()):
        require_runnable(written(tmp_path, model), CPU)
        session(model).run(None, nothing(model))


# Silently wrong: the runtime accepts these


def with_fp4_meaning(model):
    """The same bytes as a model of int8 codes that mean what FP4 codes mean: 2 * level + 128, half the scale."""
    moved = onnx.ModelProto.FromString(model.SerializeToString())
    for tensor in moved.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if tensor.name.startswith("codes"):
            codes = np.stack([array & 15, array >> 4], axis=-1).reshape(*array.shape[:2], -1)
            tensor.CopyFrom(numpy_helper.from_array((2 * LEVELS[codes] + 128).astype(np.uint8), tensor.name))
        elif tensor.name.startswith("scales"):
            tensor.CopyFrom(numpy_helper.from_array(array / 2, tensor.name))
    attributes = moved.graph.node[0].attribute
    kept = [a for a in attributes if a.name not in ("expert_weight_bits", "quant_type")]
    del attributes[:]
    attributes.extend([*kept, helper.make_attribute("expert_weight_bits", 8)])
    return moved


def test_fp4_on_a_cpu_is_accepted_and_computed_as_int4(tmp_path):
    fp4 = experts(quant_type="fp4")
    assert apart(computed(fp4), computed(experts())) == 0  # the attribute changes nothing
    assert apart(computed(fp4), computed(with_fp4_meaning(fp4))) > 0.5  # what was meant is something else
    message = refusal(tmp_path, fp4)
    assert "node /moe/QMoE (QMoE): quant_type 'fp4' on CPU" in message
    assert onnxruntime.__version__ in message


@pytest.mark.parametrize("kind", ["nvfp4", "fp8", "wfp4afp8", "of the future"])
def test_so_are_all_other_types(tmp_path, kind):
    assert apart(computed(experts(quant_type=kind)), computed(experts())) == 0
    assert f"quant_type {kind!r}" in refusal(tmp_path, experts(quant_type=kind))


def test_prepacked_weights_are_accepted_and_not_what_they_say(tmp_path):
    rows, packed = (computed(experts(bits=8, weights_prepacked=p)) for p in (0, 1))
    assert (rows == packed).all()  # whatever their order
    rows, packed = (computed(experts(bits=4, weights_prepacked=p)) for p in (0, 1))
    assert np.isfinite(packed).all()
    assert apart(packed, rows) > 0.5
    for bits in (4, 8):
        assert "weights_prepacked=1" in refusal(tmp_path, experts(bits=bits, weights_prepacked=1))
        require_runnable(written(tmp_path, experts(bits=bits, weights_prepacked=0)), CPU)


def test_the_order_of_a_prepacked_matrix_is_ignored(tmp_path):
    x = np.ones((1, 64), np.float32)
    plain, packed = (session(m).run(None, {"x": x})[0] for m in (matrix(), matrix(weight_prepacked=1)))
    assert (plain == packed).all()
    assert "weight_prepacked=1" in refusal(tmp_path, matrix(weight_prepacked=1))


@pytest.mark.parametrize("index", [15, 16, 17, 18])
def test_scales_of_whole_experts_are_ignored(tmp_path, index):
    scaled = experts(more={index: np.full(E, 2, np.float32)})
    assert apart(computed(scaled), computed(experts())) == 0
    assert "inputs 15 to 20" in refusal(tmp_path, scaled)


def test_a_window_of_nothing_is_accepted(tmp_path):
    rng = np.random.default_rng(0)
    n = 6
    empty = np.zeros((1, 2, 0, 64))
    fed = {"qkv": rng.normal(size=(1, n, 8 * 64)), "past_key": empty, "past_value": empty}
    fed = {name: a.astype(np.float32) for name, a in fed.items()}
    fed |= {"last": np.array([n - 1], np.int32), "total": np.array(n, np.int32)}
    none, empty, one = (session(attention(local_window_size=w)).run(None, fed)[0] for w in (-1, 0, 1))
    assert apart(empty, none) > 0.1
    assert apart(empty, one) > 0.1
    assert "local_window_size=0" in refusal(tmp_path, attention(local_window_size=0))


# Refused by the runtime too, but with its own words, or only when it runs


CASES = {
    "swiglu in halves": (experts(swiglu_fusion=2), "swiglu_fusion=2"),
    "swiglu apart": (experts(swiglu_fusion=None), "swiglu_fusion=0"),
    "limit after the activation": (experts(swiglu_limit_after_activation=1), "swiglu_limit_after_activation"),
    "5 bits": (experts(expert_weight_bits=5), "5-bit experts"),
    "two widths": (experts(bits=8, fc2_expert_weight_bits=4), "different widths"),
    "blocks of 8": (experts(block_size=8), "blocks of 8"),
    "blocks of 48": (experts(block_size=48), "blocks of 48"),
    "negative blocks": (experts(block_size=-32), "blocks of -32"),
    "blocks that the scales do not have": (experts(block_size=64), "scales [4, 128, 2] for codes [4, 128, 32]"),
    "a third matrix": (experts(more={8: np.zeros((E, I, H // 2), np.uint8)}), "third matrix"),
    "more experts than there are": (experts(k=E + 1), "5 experts for each token of 4"),
    "no experts": (experts(k=0), "0 experts for each token"),
    "an unknown attribute": (experts(frobnicate=1), "no attribute 'frobnicate'"),
    "an attribute of another type": (experts(k="two"), "'k' is not of type INT"),
    "too many inputs": (experts(more={40: np.zeros(1, np.float32)}), "41 inputs; the operator takes 21"),
    "float experts, swiglu in halves": (float_experts(swiglu_fusion=2), "swiglu_fusion=2"),
    "float experts, more than there are": (float_experts(k=E + 1), "5 experts for each token of 4"),
    "a matrix in blocks of 8": (matrix(block=8), "blocks of 8"),
    "a matrix of 3 bits": (matrix(bits=3), "3-bit weights"),
    "a flat matrix": (matrix(codes=(16, 32)), "codes [16, 32], not [16, 2, 16]"),
    "heads of 24": (attention(24), "heads of 24; with rotation it takes multiples of 16"),
    "heads that do not divide": (attention(heads=3), "3 heads of queries for 2 of keys"),
}


@pytest.mark.parametrize("case", CASES)
def test_on_a_cpu(tmp_path, case):
    model, told = CASES[case]
    assert told in refusal(tmp_path, model)
    with pytest.raises(Exception):  # noqa: B017, PT011  # pybind's own kinds
        session(model).run(None, nothing(model))


def test_float8_scales_on_a_cpu(tmp_path):
    model = experts()
    for tensor in model.graph.initializer:
        if tensor.name.startswith("scales"):
            tensor.data_type, tensor.raw_data = TensorProto.FLOAT8E8M0, bytes(int(np.prod(tensor.dims)))
    assert "float8e8m0" in refusal(tmp_path, model)
    with pytest.raises(Exception, match="Tensor type mismatch"):
        session(model)


@pytest.fixture
def providers(monkeypatch):
    """As if the runtime had them: what their kernels do is a matter of the graph alone."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, WEBGPU, CPU])


ZEROS = {i: np.zeros((E, n, 1), np.uint8) for i, n in ((11, 2 * I), (12, H))}
ELSEWHERE = {
    "webgpu zero points": (experts(more=ZEROS), WEBGPU, "zero points, which WebGPU does not take"),
    "webgpu 2 bits": (experts(bits=2), WEBGPU, "2-bit experts, which WebGPU"),
    "webgpu fp4": (experts(quant_type="fp4"), WEBGPU, "quant_type 'fp4' on WebGPU"),
    "webgpu windows": (attention(sliding_window_cache=1, local_window_size=8), WEBGPU, "sliding_window_cache"),
    "webgpu silu": (experts(activation_type="silu"), WEBGPU, "activation 'silu'"),
    "cuda zero points": (experts(more=ZEROS), CUDA, "zero points in blocks of 32"),
    "cuda rows": (experts(), CUDA, "rows of weights without weights_prepacked=0"),
    "cuda rows that claim more": (experts(weights_prepacked=1), CUDA, "rows of weights without"),
    "cuda blocks": (experts(block_size=16), CUDA, "blocks of 16; CUDA takes 32, 64, 128"),
    "cuda types": (experts(quant_type="int5"), CUDA, "quant_type 'int5' on CUDA"),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_elsewhere(tmp_path, providers, case):
    model, provider, told = ELSEWHERE[case]
    assert told in refusal(tmp_path, model, provider)


def test_what_cuda_takes(tmp_path, providers):
    for model in (experts(quant_type="fp4"), experts(weights_prepacked=0), experts(bits=8, weights_prepacked=0)):
        require_runnable(written(tmp_path, model), CUDA)
    require_runnable(written(tmp_path, experts(bits=8)), WEBGPU)


# The runtime's own tables


def test_a_provider_that_is_not_there(tmp_path):
    with pytest.raises(Refused, match="has no CUDAExecutionProvider") as caught:
        require_runnable(written(tmp_path, experts()), CUDA)
    assert "onnxruntime-gpu" in caught.value.hint
    with pytest.raises(Refused, match="has no NoSuchProvider") as caught:
        require_runnable(written(tmp_path, experts()), "NoSuchProvider")
    assert CPU in caught.value.hint


def test_no_runtime(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match="onnxruntime"):
        require_runnable(written(tmp_path, experts()), CPU)


def relu(**settings):
    return model_of([helper.make_node("Relu", ["x"], ["y"])], [value("x", ["n"])], [value("y", ["n"])], **settings)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (relu(ir_version=99), "IR version 99 is unknown to onnxruntime"),
        (relu(opsets={"": 999}), "operator set 999 of ai.onnx is unknown"),
        (relu(opsets={"": 21, "com.microsoft": 7}), "operator set 7 of com.microsoft"),
    ],
)
def test_versions_of_the_future(tmp_path, model, told):
    assert told in refusal(tmp_path, model)
    with pytest.raises(Exception, match=r"max supported IR version|official support"):
        session(model)


def test_more_operator_sets_than_there_are(tmp_path):
    many = relu(opsets={"": 21, **{f"d{i}": 1 for i in range(1000)}})
    assert "imports 1,001 operator sets" in refusal(tmp_path, many)


def test_a_domain_that_is_not_imported(tmp_path):
    node = helper.make_node("Frob", ["x"], ["y"], domain="elsewhere")
    model = model_of([node], [value("x", ["n"])], [value("y", ["n"])])
    assert "'elsewhere' is not imported" in refusal(tmp_path, model)


def test_an_operator_of_the_future(tmp_path):
    node = helper.make_node("QMoEOfTheFuture", ["x"], ["y"], domain="com.microsoft")
    message = refusal(tmp_path, model_of([node], [value("x", ["n"])], [value("y", ["n"])]))
    assert "node that makes y (QMoEOfTheFuture): no such operator in com.microsoft 1" in message


def test_an_operator_without_a_kernel_here(tmp_path):
    node = helper.make_node("DequantizeBFP", ["a", "b", "c"], ["y"], domain="com.microsoft", bfp_type=1, block_dim=1)
    model = model_of([node], [value("x", ["n"])], [value("y", ["n"])])
    assert "no kernel computes it on CPU" in refusal(tmp_path, model)


def test_functions_of_other_operators_need_none(tmp_path):
    nodes = [helper.make_node("Swish", ["x"], ["z"]), helper.make_node("Constant", [], ["c"], value_float=1.0)]
    nodes.append(helper.make_node("Add", ["z", "c"], ["y"]))
    model = model_of(nodes, [value("x", ["n"])], [value("y", ["n"])], opsets={"": 24})
    require_runnable(written(tmp_path, model), CPU)
    session(model)


# Nothing hides


def hidden_in_branch(node):
    """If, then Loop, then the node."""
    body = helper.make_graph([node], "b", [value("i", [], 7), value("c", [], 9)], [value("c", [], 9)])
    loop = helper.make_node("Loop", ["", "c"], [], name="loop", body=body)
    other = helper.make_graph([helper.make_node("Identity", ["x"], ["e"])], "e", [], [value("e", ["n"])])
    then = helper.make_graph([loop, helper.make_node("Identity", ["x"], ["t"])], "t", [], [value("t", ["n"])])
    outer = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)
    return model_of([outer], [value("x", ["n"]), value("c", [], 9)], [value("y", ["n"])])


def test_not_in_a_branch(tmp_path):
    node = helper.make_node("QMoE", ["x", "r", "w"], ["y"], name="deep", domain="com.microsoft", quant_type="fp4")
    assert "node deep (QMoE): quant_type 'fp4'" in refusal(tmp_path, hidden_in_branch(node))
    node = helper.make_node("Unknown", ["x"], ["y"], name="deep")
    assert "node deep (Unknown): no such operator" in refusal(tmp_path, hidden_in_branch(node))


def in_function(node, *names):
    made = helper.make_function(
        "own", "F", ["x"], ["y"], [node], [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)], names
    )
    call = helper.make_node("F", ["x"], ["y"], domain="own")
    opsets = {"": 21, "com.microsoft": 1, "own": 1}
    return model_of([call], [value("x", ["n"])], [value("y", ["n"])], opsets=opsets, functions=[made])


def test_not_in_a_function(tmp_path):
    node = helper.make_node("QMoE", ["x", "x", "x"], ["y"], name="deep", domain="com.microsoft", quant_type="fp4")
    assert "node deep (QMoE): quant_type 'fp4'" in refusal(tmp_path, in_function(node))
    node = helper.make_node("QMoE", ["x", "x", "x"], ["y"], name="deep", domain="com.microsoft")
    node.attribute.add(name="quant_type", ref_attr_name="kind", type=onnx.AttributeProto.STRING)
    assert "decided where its function is called" in refusal(tmp_path, in_function(node, "kind"))
    require_runnable(written(tmp_path, in_function(helper.make_node("Relu", ["x"], ["y"]))), CPU)


def test_a_dequantized_weight_of_the_outer_graph_is_lost_in_a_branch(tmp_path):
    rng = np.random.default_rng(0)
    weights = [
        helper.make_tensor("w", TensorProto.INT8, (64, 48), rng.integers(-8, 8, 64 * 48)),
        numpy_helper.from_array(np.ones((2, 48), np.float32), "s"),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "d"], ["t"], name="product"),
    ]

    def model(outer):
        then = helper.make_graph(nodes, "t", [], [value("t", ["n", 48])], [] if outer else weights)
        zero = numpy_helper.from_array(np.zeros((64, 48), np.float32), "z")
        other = helper.make_graph(
            [helper.make_node("MatMul", ["x", "z"], ["e"])], "e", [], [value("e", ["n", 48])], [zero]
        )
        branch = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)
        given = [value("x", ["n", 64]), value("c", [], TensorProto.BOOL)]
        return model_of([branch], given, [value("y", ["n", 48])], weights if outer else [])

    assert "node product (MatMul): DequantizeLinear of 'w', a weight of the outer graph" in refusal(
        tmp_path, model(True)
    )
    with pytest.raises(Exception, match="Missing required weight"):
        session(model(True))
    require_runnable(written(tmp_path, model(False)), CPU)
    session(model(False))


def test_bottomless_graphs_end(tmp_path):
    node = helper.make_node("Relu", ["x"], ["y"])
    for _ in range(20):
        inner = helper.make_graph([node], "g", [], [value("y", ["n"])])
        node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
        if len(node.SerializeToString()) > 1 << 22:
            del node.attribute[1]
    assert "nested" in refusal(tmp_path, model_of([node], [value("x", ["n"])], [value("y", ["n"])]))


@pytest.mark.parametrize(
    ("content", "told"), [(b"", "no model"), (b"\xff" * 60, "not an ONNX model"), (b"\x08\x0a", "no model")]
)
def test_what_is_no_model(tmp_path, content, told):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ExporterError, match=told):
        require_runnable(path, CPU)


def test_files_that_are_not_graphs(tmp_path):
    with pytest.raises(ExporterError, match="is missing"):
        require_runnable(tmp_path / "none.onnx", CPU)
    with pytest.raises(ExporterError, match="no file"):
        require_runnable(tmp_path, CPU)
    path = tmp_path / "large.onnx"
    path.touch()
    os.truncate(path, onnx_file.GRAPH_CAP + 1)
    with pytest.raises(ExporterError, match="more than 67,108,864"):
        require_runnable(path, CPU)
