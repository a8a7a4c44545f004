"""The ONNX format: what it refuses, the graph it builds, the tables it reads back."""

import json
from dataclasses import replace

import onnx
import pytest

from exporter.checkpoint import open_checkpoint
from exporter.errors import ExporterError, UsageError
from exporter.formats import get_format
from exporter.formats.base import ExportJob, Provenance
from exporter.pipeline.profiles import load_recipe
from exporter.types import Scheme, TensorSpec
from exporter.types.recipe import Step
from tests.conftest import DEMO

EXPERT = TensorSpec("model.layers.0.mlp.experts.gate_proj.weight", (2, 8, 192), "expert", 0)
LINEAR = TensorSpec("model.layers.0.self_attn.q_proj.weight", (8, 192), "linear", 0)


def job(recipe="f32", **changes):
    with open_checkpoint(DEMO) as checkpoint:
        steps = [load_recipe(recipe).step(s, checkpoint.scheme(s.name)) for s in checkpoint.specs]
        settings = {"generation_config": {"eos_token_id": [7, 8]}, "chat_template": "{{ messages }}", **changes}
        return ExportJob(
            model_name="demo",
            config=settings.pop("config", checkpoint.config),
            steps=steps,
            provenance=Provenance("1", "", "", recipe, "0", "digest", {s.name: "0" for s in steps}),
            tokenizer={},
            tokenizer_config={},
            **settings,
        )


def graph_of(layouts, name):
    return onnx.load_model_from_string(next(f.head for f in layouts if f.filename == name))


def fmt(target):
    return get_format("onnx").for_target(target)


@pytest.mark.parametrize(
    ("target", "scheme", "spec", "reason"),
    [
        ("cpu", "mxfp4", EXPERT, "only CUDA"),
        ("webgpu", "mxfp4", EXPERT, "only CUDA"),
        ("cuda", "mxfp4", LINEAR, "only by FP4 experts"),
        ("webgpu", "bf16", EXPERT, "no kernel for experts"),
        ("webgpu", "int4-g64-asym", EXPERT, "WebGPU's kernels do not take"),
        ("cuda", "int4-g32-asym", EXPERT, "from groups of 64 on"),
        ("cpu", "int4-g32-asym", EXPERT, "not written"),
        ("cpu", "int8-g48", LINEAR, "powers of two"),
        ("cpu", "int8-g8", LINEAR, "powers of two"),
        ("cuda", "int4-g16", EXPERT, "32, 64 or 128"),
        ("cpu", "int4-g128", LINEAR, "does not divide"),
    ],
)
def test_what_the_kernels_cannot_compute_is_refused(target, scheme, spec, reason):
    assert reason in fmt(target).refuse(Scheme.parse(scheme), spec)


def test_an_unknown_target_is_named():
    with pytest.raises(UsageError, match=r'no target "cudda".* Did you mean "cuda"'):
        fmt("cudda")


def test_models_that_the_kernels_compute_otherwise_are_refused():
    config = job().config
    assert fmt("cpu").refuse_model(config) is None
    assert "multiples of 16" in fmt("cpu").refuse_model(replace(config, head_dim=40))
    assert "gelu" in fmt("cpu").refuse_model(replace(config, hidden_act="gelu"))


@pytest.mark.parametrize(("names", "together"), [(("q", "k"), True), (("q", "o"), False)])
def test_one_operator_has_one_scheme(names, together):
    specs = [TensorSpec(f"model.layers.0.self_attn.{n}_proj.weight", (8, 192), "linear", 0) for n in names]
    schemes = [Scheme.parse("int8-g32"), Scheme.parse("int4-g32")]
    reason = fmt("cpu").refuse_steps([Step(s, "rtn", x, x) for s, x in zip(specs, schemes, strict=True)])
    assert ("one operator" in reason) if together else reason is None


def test_experts_of_a_layer_have_one_scheme():
    specs = [EXPERT, replace(EXPERT, name=EXPERT.name.replace("gate", "down"))]
    schemes = [Scheme.parse("int8-g32"), Scheme.parse("int4-g32")]
    assert "one operator" in fmt("cpu").refuse_steps(
        [Step(s, "rtn", x, x) for s, x in zip(specs, schemes, strict=True)]
    )


def test_the_graph_has_the_names_of_optimum():
    graph = graph_of(fmt("cpu").layout(job()), "model.onnx").graph
    past = [f"past_key_values.{i}.{kind}" for i in range(4) for kind in ("key", "value")]
    assert [i.name for i in graph.input] == ["input_ids", "attention_mask", *past]
    present = [f"present.{i}.{kind}" for i in range(4) for kind in ("key", "value")]
    assert [o.name for o in graph.output] == ["logits", *present]


def test_genai_keeps_windows_in_a_graph_of_its_own():
    layouts = fmt("cpu").layout(job(context=4096))
    plain, genai = (graph_of(layouts, name).graph for name in ("model.onnx", "model_genai.onnx"))

    def attention(graph):
        return [{a.name: a for a in n.attribute} for n in graph.node if n.op_type == "GroupQueryAttention"]

    assert ["sliding_window_cache" in a for a in attention(genai)] == [True, False, True, False]
    assert not any("sliding_window_cache" in a for a in attention(plain))
    assert [a["local_window_size"].i for a in attention(plain)] == [128, -1, 128, -1]
    settings = json.loads(next(f.head for f in layouts if f.filename == "genai_config.json"))
    assert settings["model"]["decoder"]["filename"] == "model_genai.onnx"
    assert settings["model"]["decoder"]["sliding_window"]["layers"] == [0, 2]
    assert settings["model"]["eos_token_id"] == [7, 8]
    assert settings["search"]["max_length"] == 4096


def test_both_graphs_share_every_weight():
    layouts = fmt("cpu").layout(job())

    def places(name):
        found = {}
        for i in graph_of(layouts, name).graph.initializer:
            found[i.name] = [(e.key, e.value) for e in i.external_data]
        return found

    assert places("model.onnx") == places("model_genai.onnx")
    assert len([f for f in layouts if ".data" in f.filename]) == 1


def test_routers_compute_in_float32_everywhere():
    for target, recipe in (("cpu", "exact-q8"), ("cuda", "mxfp4-q8"), ("webgpu", "exact-q8")):
        layouts = fmt(target).layout(job(recipe))
        graph = onnx.load_model_from_string(layouts[0].head).graph
        types = {i.name: i.data_type for i in graph.initializer}
        gemms = [n for n in graph.node if n.op_type == "Gemm"]
        assert len(gemms) == 4
        assert {types[name] for n in gemms for name in n.input[1:]} == {onnx.TensorProto.FLOAT}
        assert [n.output[0] for n in gemms] == [f"/model/layers.{i}/moe/router/logits" for i in range(4)]


def test_accuracy_is_set_on_purpose():
    graph = onnx.load_model_from_string(fmt("cpu").layout(job("exact-q8"))[0].head).graph
    levels = [a.i for n in graph.node for a in n.attribute if a.name == "accuracy_level"]
    assert levels == [4] * (4 * 3 + 1)


def test_a_layout_is_the_same_twice():
    first, second = (fmt("cpu").layout(job("exact-q8")) for _ in range(2))
    assert [(f.filename, f.head, f.size) for f in first] == [(f.filename, f.head, f.size) for f in second]


def written(tmp_path, target="cpu", recipe="f32", change=None):
    """The files of a layout without their numbers, the graph changed by `change`."""
    layouts = fmt(target).layout(job(recipe))
    for layout in layouts:
        path = tmp_path / layout.filename
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(layout.head)
        with open(path, "r+b") as f:
            f.truncate(layout.size)
    if change:
        model = onnx.load(tmp_path / layouts[0].filename, load_external_data=False)
        change(model.graph)
        (tmp_path / layouts[0].filename).write_bytes(model.SerializeToString())
    return job(recipe).steps


@pytest.mark.parametrize(("target", "recipe"), [("cpu", "exact-q8"), ("cuda", "mxfp4-q8"), ("webgpu", "exact-q8")])
def test_tensors_are_found_where_they_were_laid_out(tmp_path, target, recipe):
    steps = written(tmp_path, target, recipe)
    located = fmt(target).locate(tmp_path, steps)
    laid_out = {name: parts for f in fmt(target).layout(job(recipe)) for name, parts in f.parts.items()}
    assert {name: place.parts for name, place in located.items()} == laid_out


def rename(graph):
    graph.initializer[5].name += "x"


def retype(graph):
    next(i for i in graph.initializer if i.name == "model.norm.weight").dims[0] = 96
    entry = next(i for i in graph.initializer if i.name == "model.norm.weight").external_data
    next(e for e in entry if e.key == "length").value = str(96 * 4)


def add(graph):
    extra = graph.initializer.add()
    extra.CopyFrom(next(i for i in graph.initializer if i.name == "model.norm.weight"))
    extra.name = "stranger"
    next(e for e in extra.external_data if e.key == "offset").value = "0"
    taken = next(i for i in graph.initializer if i.name == "cos_cache")
    graph.initializer.remove(taken)


@pytest.mark.parametrize(
    ("change", "reason"),
    [(rename, "is missing"), (retype, r"\[96\]; expected float \[192\]"), (add, "unknown tensor stranger")],
)
def test_a_graph_that_is_not_ours_is_named(tmp_path, change, reason):
    steps = written(tmp_path, change=change)
    with pytest.raises(ExporterError, match=reason):
        fmt("cpu").locate(tmp_path, steps)


def test_memory_is_what_the_runtime_holds():
    steps = job("gptq-int4-g64").steps
    weights = [s for s in steps if s.spec.role == "expert"]
    elements = sum(s.spec.elements for s in weights)
    assert fmt("cpu").footprint(weights).weights == elements // 2 + elements // 64 * 8
    assert fmt("webgpu").footprint(weights).weights == elements // 2 + elements // 64 * 2
    assert (fmt("cpu").footprint(steps).kv_item, fmt("cuda").footprint(steps).kv_item) == (4, 2)
