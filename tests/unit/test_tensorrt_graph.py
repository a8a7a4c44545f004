"""The TensorRT format: what it refuses, and the graphs it builds."""

from dataclasses import replace

import numpy as np
import onnx
import pytest

from exporter.errors import UsageError
from exporter.formats import get_format
from exporter.formats.tensorrt.graph import OPSET
from exporter.model.rope import rotation_table
from exporter.types import Scheme, TensorSpec
from exporter.types.recipe import Step
from tests.unit.test_onnx_graph import EXPERT, LINEAR, graph_of, job

NORM = TensorSpec("model.norm.weight", (192,), "vector")
FLOAT, FLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
# Target and a recipe that it takes.
MADE = [("sm75", "exact-f16"), ("sm80", "exact-bf16"), ("sm120", "mxfp4-q8")]


def fmt(target):
    return get_format("tensorrt").for_target(target)


def step(spec, name, rule=None):
    scheme = Scheme.parse(name, rule)
    return Step(spec, "rtn", scheme, scheme)


def graphs(target, recipe, **changes):
    layouts = fmt(target).layout(job(recipe, **changes))
    return [graph_of(layouts, f"{name}.onnx") for name in ("decode", "prefill")]


def file_of(layouts, name):
    return next(f for f in layouts if f.filename == name)


# Refused


@pytest.mark.parametrize(
    ("target", "scheme", "spec", "reason"),
    [
        ("sm75", "bf16", LINEAR, "bfloat16 begins with SM80; float16 (recipe exact-f16), or --target sm80"),
        ("sm75", "int4-g32", EXPERT, "INT4 begins with SM80; 8-bit integers, or --target sm80"),
        ("sm75", "mxfp4", EXPERT, "recipe exact-f16 holds the same numbers as INT8 for sm75, or --target sm120"),
        ("sm80", "mxfp4", EXPERT, "recipe exact-bf16 holds the same numbers as INT8 for sm80, or --target sm120"),
        ("sm80", "mxfp4", LINEAR, "FP4 begins with SM120; int8-g32 is near for sm80"),
        ("sm120", "int8-g32-asym", LINEAR, "int8-g32-asym has zero points, which TensorRT does not take"),
        ("sm120", "int4-g128", LINEAR, "last axis is 192, which 128 does not divide"),
        ("", "mxfp4", EXPERT, "--target sm120"),
    ],
)
def test_what_no_engine_can_hold_is_refused(target, scheme, spec, reason):
    assert reason in fmt(target).refuse(Scheme.parse(scheme), spec)


def test_signed_scales_are_refused_for_int8_alone():
    signed = Scheme.parse("int8-g32", "signed-mse")
    assert "some of its scales are negative" in fmt("sm120").refuse(signed, LINEAR)
    assert fmt("sm120").refuse(Scheme.parse("int4-g32", "signed-mse"), LINEAR) is None


@pytest.mark.parametrize(
    ("target", "scheme", "spec"),
    [
        ("sm75", "bf16", NORM),  # stored in float32
        ("sm75", "int8-g64", EXPERT),
        ("sm80", "bf16", LINEAR),
        ("sm80", "int4-g96", EXPERT),
        ("sm120", "mxfp4", EXPERT),
        ("sm120", "int4-g64", EXPERT),
    ],
)
def test_what_they_can_hold_is_taken(target, scheme, spec):
    assert fmt(target).refuse(Scheme.parse(scheme), spec) is None


def test_an_unknown_target_is_named():
    with pytest.raises(UsageError, match=r'tensorrt has no target "sm08"\. Did you mean "sm80"\?') as error:
        fmt("sm08")
    assert error.value.hint == "targets: sm75, sm80, sm120"
    with pytest.raises(UsageError, match='no target "sm90"'):
        fmt("sm90")


def test_models_that_the_graph_computes_otherwise_are_refused():
    config = job().config
    assert fmt("sm80").refuse_model(config) is None
    assert "multiples of 8" in fmt("sm80").refuse_model(replace(config, head_dim=68))
    assert "gelu" in fmt("sm80").refuse_model(replace(config, hidden_act="gelu"))


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        ("self_attn.q_proj", "self_attn.k_proj", True),
        ("self_attn.q_proj", "self_attn.o_proj", False),
        ("mlp.experts.gate_proj", "mlp.experts.up_proj", True),
    ],
)
def test_one_matrix_has_one_scheme(one, other, together):
    specs = [replace(LINEAR, name=f"model.layers.0.{name}.weight") for name in (one, other)]
    reason = fmt("sm80").refuse_steps([step(s, x) for s, x in zip(specs, ("int8-g32", "int4-g32"), strict=True)])
    assert ("they are one matrix" in reason) if together else reason is None


# The graphs


@pytest.mark.parametrize(("target", "recipe"), MADE)
def test_operators_are_onnxs_own_but_for_fp4(target, recipe):
    own = {"trt": 1} if recipe.startswith("mxfp4") else {}
    for model in graphs(target, recipe):
        assert {o.domain: o.version for o in model.opset_import} == {"": OPSET, **own}
        assert (OPSET, model.ir_version) == (23, 11)
        foreign = {(n.domain, n.op_type) for n in model.graph.node if n.domain}
        assert foreign == ({("trt", "TRT_MXFP8DequantizeLinear")} if own else set())


@pytest.mark.parametrize(("target", "recipe"), MADE)
def test_inputs_and_outputs(target, recipe):
    caches = [f"{i}.{kind}" for i in range(4) for kind in ("key", "value")]
    for model in graphs(target, recipe):
        types = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
        plain = dict.fromkeys(("input_ids", "position_ids", "attention_mask"), onnx.TensorProto.INT64)
        past, present = ({f"{kind}.{c}": FLOAT16 for c in caches} for kind in ("past_key_values", "present"))
        assert types == {**plain, **past, "logits": FLOAT, **present}
        assert [v.name for v in model.graph.output] == ["logits", *present]


@pytest.mark.parametrize(("target", "recipe"), MADE)
def test_both_graphs_read_the_same_weights(target, recipe):
    def external(model):
        tensors = (t for t in model.graph.initializer if t.external_data)
        return {t.name: (t.data_type, *t.dims, *((e.key, e.value) for e in t.external_data)) for t in tensors}

    decode, prefill = graphs(target, recipe)
    assert external(decode) == external(prefill)
    assert len(external(decode)) > 60
    inside = sum(len(t.raw_data) for m in (decode, prefill) for t in m.graph.initializer if not t.external_data)
    assert inside < 4096
    every = sum(n.op_type == "ScatterElements" for n in prefill.graph.node)
    chosen = sum(n.op_type == "ScatterElements" for n in decode.graph.node)
    assert (every, chosen) == (4, 0)


def test_a_layout_is_the_same_twice():
    first, second = (fmt("sm80").layout(job("exact-bf16")) for _ in range(2))
    assert [(f.filename, f.head, f.size) for f in first] == [(f.filename, f.head, f.size) for f in second]


@pytest.mark.parametrize(
    ("target", "recipe", "wanted"), [("sm75", "exact-f16", FLOAT16), ("sm80", "exact-bf16", FLOAT)]
)
def test_experts_are_chosen_in_float32_where_there_is_such_a_product(target, recipe, wanted):
    for model in graphs(target, recipe):
        types = {i.name: i.data_type for i in model.graph.initializer}
        types |= {n.output[0]: n.attribute[0].i for n in model.graph.node if n.op_type == "Cast"}
        gemms = [n for n in model.graph.node if n.op_type == "Gemm"]
        assert len(gemms) == 4
        assert {types[name] for n in gemms for name in n.input[1:]} == {wanted}


def test_attention_has_what_makes_it_one_kernel():
    """Four-dimensional float16, one output, the head size's own scale; masks of two kinds, by turns."""
    for model in graphs("sm80", "exact-bf16"):
        found = [n for n in model.graph.node if n.op_type == "Attention"]
        assert [len(n.output) for n in found] == [1] * 4
        assert {(a.name, a.f) for n in found for a in n.attribute} == {("scale", 0.125)}
        kinds = [n.input[3].split("/")[3] for n in found]
        assert kinds == ["sliding", "full", "sliding", "full"]


MIXED = """
title = "one projection in INT4"
[[rule]]
match = "*.mlp.experts.{}_proj.weight"
method = "rtn"
scheme = "int4-g32"
[[rule]]
match = "*.mlp.experts.*_proj.weight"
method = "rtn"
scheme = "{}"
[[rule]]
match = "*"
method = "keep"
"""


@pytest.mark.parametrize(
    ("first", "rest", "ordered"),
    [("down", "int8-g32", True), ("[gu][ap]*", "int8-g32", True), ("down", "int4-g64", False)],
)
def test_experts_that_are_decoded_first_are_decoded_layer_by_layer(tmp_path, first, rest, ordered):
    """What depends on constants alone TensorRT decodes for all layers at once: experts come in an order of the run."""
    (tmp_path / "mixed.toml").write_text(MIXED.format(first, rest))
    decode, prefill = graphs("sm80", str(tmp_path / "mixed.toml"))
    assert not any(n.name.endswith("/load/TopK") for n in decode.graph.node)
    nodes = {n.name: n for n in prefill.graph.node}
    assert sum(name.endswith("/load/TopK") for name in nodes) == (4 if ordered else 0)
    for kind in ("gate_up_proj", "down_proj"):
        stem = f"/model/layers.3/moe/{kind}"
        by = nodes[f"{stem}/Transpose"].input[0]
        assert by == (
            f"{stem}/Gather/output" if ordered else f"/model.layers.3.mlp.experts.{kind}.weight/DequantizeLinear/output"
        )
        if ordered:
            names = (f"{stem}/Gather", f"{stem}/bias/Gather", "/model/layers.3/moe/shares/Gather")
            assert {nodes[name].input[1] for name in names} == {"/model/layers.3/moe/load/order"}


def test_the_rotation_reaches_as_far_as_the_model():
    made = job("exact-bf16")
    config = made.config
    data = file_of(fmt("sm80").layout(made), "weights.data")
    tables = {at.offset: at for at in data.fixed}
    model = graph_of(fmt("sm80").layout(made), "decode.onnx")
    for name, wave in (("cos_cache", np.cos), ("sin_cache", np.sin)):
        tensor = next(t for t in model.graph.initializer if t.name == name)
        assert list(tensor.dims) == [config.max_position_embeddings, config.head_dim // 2]
        offset = next(int(e.value) for e in tensor.external_data if e.key == "offset")
        found = tables[offset].make().view(np.float32).reshape(*tensor.dims)
        wanted = rotation_table(wave, config.rope, config.head_dim, config.max_position_embeddings)
        assert np.array_equal(found, wanted)


def test_where_numbers_came_from_is_in_one_graph():
    decode, prefill = graphs("sm80", "exact-bf16")
    assert {p.key: p.value for p in decode.metadata_props}["exporter.digest"] == "digest"
    assert not prefill.metadata_props
