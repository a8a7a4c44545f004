"""The TensorRT format: what a person needs to make engines of its graphs, where numbers are, what engines take."""

import json
import re
from dataclasses import replace

import onnx
import pytest

from exporter.errors import ExporterError
from exporter.formats.tensorrt import shapes as profiles
from exporter.formats.tensorrt.targets import GPUS
from exporter.model.memory import fit
from exporter.pipeline.profiles import load_profile
from exporter.types import TensorSpec
from exporter.validate.tensorrt_graph import SMS
from tests.unit.test_onnx_graph import EXPERT, LINEAR, graph_of, job
from tests.unit.test_tensorrt_graph import FLOAT16, MADE, NORM, file_of, fmt, step

EMBEDDING = TensorSpec("model.embed_tokens.weight", (64, 192), "embedding")

# Files beside them


def test_profiles_name_every_input():
    layouts = fmt("sm80").layout(job("exact-bf16", context=4096))
    body = json.loads(file_of(layouts, "profiles.json").head)
    assert (body["sms"], body["context"]) == ([80, 86, 89, 120, 121], 4096)
    for graph, piece in (("decode", 1), ("prefill", 256)):
        inputs = [i.name for i in graph_of(layouts, f"{graph}.onnx").graph.input]
        shapes = body["graphs"][graph]
        assert sorted(shapes) == sorted(inputs)
        assert shapes["input_ids"] == {"min": [1, 1], "opt": [1, piece], "max": [1, piece]}
        assert shapes["attention_mask"]["max"] == [1, 4095 + piece]
        for name in inputs[3:]:
            assert [shapes[name][kind][2] for kind in ("min", "opt", "max")] == [0, 1024, 4095]
        for each in shapes.values():
            assert all(a <= b <= c for a, b, c in zip(*(each[k] for k in ("min", "opt", "max")), strict=True))


@pytest.mark.parametrize("context", [1, 100, 256, 257, 1200, 16384, 16385])
def test_every_call_within_the_context_is_inside_the_shapes(context):
    layouts = fmt("sm80").layout(job("exact-bf16", context=context))
    for shapes in json.loads(file_of(layouts, "profiles.json").head)["graphs"].values():
        new, seen = shapes["input_ids"], shapes["attention_mask"]
        past = shapes["past_key_values.3.value"]
        for kind in ("opt", "max"):
            assert new[kind][1] >= 1
            assert new[kind][1] + past[kind][2] == seen[kind][1]
        assert past["max"][2] == context - 1  # and one token more


def test_long_contexts_decode_two_tokens_at_once_as_well():
    """TensorRT has a kernel for one alone up to some 20,000 keys: tests/oracle/test_tensorrt_shapes.py."""
    config = job().config
    assert [profiles.shapes("decode", config, n)["input_ids"][2] for n in (16384, 16385)] == [[1, 1], [1, 2]]


def test_without_a_context_it_is_the_models():
    body = json.loads(file_of(fmt("sm80").layout(job("exact-bf16")), "profiles.json").head)
    assert body["context"] == 131072


def test_the_readme_has_commands_that_name_every_input():
    layouts = fmt("sm80").layout(job("exact-bf16", context=8192))
    text = file_of(layouts, "README.md").head.decode()
    assert "For 8,192 tokens in all" in text
    assert [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| SM")] == [
        f"| SM{sm}" for sm in (80, 86, 89, 120, 121)
    ]
    body = json.loads(file_of(layouts, "profiles.json").head)["graphs"]
    for graph in ("decode", "prefill"):
        command = text.partition(f"tensorrt_rtx --onnx={graph}.onnx --saveEngine={graph}.engine \\\n")[2]
        for kind in ("min", "opt", "max"):
            (said,) = re.findall(rf"^  --{kind}Shapes=(\S+)", command.partition("\n\n")[0], re.MULTILINE)
            found = dict(each.split(":") for each in said.split(","))
            assert found == {name: "x".join(map(str, each[kind])) for name, each in body[graph].items()}
    assert "SM75" not in text


def test_the_readme_says_whose_operators_there_are():
    own = "in operators of ONNX's own domain (opset 23)"
    for target, recipe in MADE:
        text = file_of(fmt(target).layout(job(recipe)), "README.md").head.decode()
        assert (f"{own},\n" in text) == (target != "sm120")
        assert (f"{own}\nand NVIDIA's `TRT_MXFP8DequantizeLinear`, which" in text) == (target == "sm120")


def test_turing_is_asked_for_by_name():
    text = file_of(fmt("sm75").layout(job("exact-f16")), "README.md").head.decode()
    assert "set_compute_capability(trt.ComputeCapability.SM75, 0)" in text


# Where the numbers are


def written(folder, target="sm80", recipe="f32", change=None, graph="decode.onnx", **changes):
    """The files of a layout without their numbers, one graph changed by `change`."""
    made = job(recipe, **changes)
    layouts = fmt(target).layout(made)
    for layout in layouts:
        path = folder / layout.filename
        path.write_bytes(layout.head)
        with open(path, "r+b") as f:
            f.truncate(layout.size)
    if change:
        model = onnx.load(folder / graph, load_external_data=False)
        change(model.graph)
        (folder / graph).write_bytes(model.SerializeToString())
    return made.steps, layouts


@pytest.mark.parametrize("split", [0, 2_000_000], ids=["one file", "split"])
@pytest.mark.parametrize(("target", "recipe"), MADE)
def test_tensors_are_found_where_they_were_laid_out(tmp_path, target, recipe, split):
    steps, layouts = written(tmp_path, target, recipe, split_size=split)
    located = fmt(target).locate(tmp_path, steps)
    laid_out = {name: (f.filename, parts) for f in layouts for name, parts in f.parts.items()}
    assert {name: (place.path.name, place.parts) for name, place in located.items()} == laid_out
    data = [f for f in layouts if f.filename.startswith("weights.data")]
    assert (len(data) == 1) == (split == 0)
    assert all(f.filename == ("weights.data" if i == 0 else f"weights.data_{i}") for i, f in enumerate(data))


def named(graph, name):
    return next(i for i in graph.initializer if i.name == name)


def rename(graph):
    named(graph, "model.norm.weight").name += "x"


def retype(graph):
    tensor = named(graph, "lm_head.weight")
    tensor.data_type, tensor.dims[0] = FLOAT16, tensor.dims[0] * 2


def move(graph):
    """Two layers' norms change places."""
    places = [named(graph, f"model.layers.{i}.input_layernorm.weight").external_data for i in (0, 1)]
    one, other = (next(e for e in p if e.key == "offset") for p in places)
    one.value, other.value = other.value, one.value


def add(graph):
    extra = graph.initializer.add()
    extra.CopyFrom(named(graph, "cos_cache"))
    extra.name = "stranger"
    graph.initializer.remove(named(graph, "cos_cache"))


@pytest.mark.parametrize(
    ("change", "graph", "reason"),
    [
        (rename, "decode.onnx", r"decode\.onnx: model\.norm\.weight is missing"),
        (retype, "decode.onnx", r"lm_head\.weight is float16 .*; expected float \[2048, 192\]"),
        (add, "decode.onnx", "unknown tensor stranger"),
        (move, "prefill.onnx", r"prefill\.onnx: its weights are not those of decode\.onnx"),
        (rename, "prefill.onnx", "its weights are not those of"),
        (add, "prefill.onnx", "its weights are not those of"),
    ],
)
def test_graphs_that_are_not_ours_are_named(tmp_path, change, graph, reason):
    steps, _ = written(tmp_path, change=change, graph=graph)
    with pytest.raises(ExporterError, match=reason):
        fmt("sm80").locate(tmp_path, steps)


# What it takes, and where it runs


@pytest.mark.parametrize(
    ("spec", "scheme", "bits"),
    [
        (EXPERT, "int4-g32", 4 + 16 / 32),
        (EXPERT, "int8-g32", 8 + 16 / 32),  # decoded while its layer is computed
        (EXPERT, "mxfp4", 4 + 16 / 32),  # scales become float16
        (LINEAR, "int4-g64", 4 + 16 / 64),
        (LINEAR, "int8-g32", 8 + 16 / 32 + 16),  # and decoded ahead of all computing
        (LINEAR, "mxfp4", 4 + 16 / 32 + 16),
        (EMBEDDING, "int8-g32", 8 + 16 / 32),
        (LINEAR, "bf16", 16),
        (EXPERT, "f32", 16),
        (NORM, "bf16", 32),
    ],
)
def test_weights_are_what_an_engine_holds(spec, scheme, bits):
    found = fmt("sm120").footprint([step(spec, scheme)])
    assert (found.weights, found.kv_item, found.windowed) == (spec.elements * bits / 8, 2, False)


def test_experts_that_are_decoded_first_take_a_layer_of_buffers():
    config = replace(job().config, num_local_experts=1024)
    packed, decoded = (
        fmt("sm120").footprint([step(EXPERT, scheme)]).buffers(config, 256) for scheme in ("int4-g32", "mxfp4")
    )
    layer = 1024 * 3 * config.hidden_size * config.intermediate_size * 2
    assert sum(decoded["prefill"]) - sum(packed["prefill"]) == layer
    assert decoded["decode"] == packed["decode"]


def test_the_engine_that_takes_least_decides_whether_it_fits():
    hardware = load_profile("16gb").hardware
    taken = fmt("sm120").footprint([step(EXPERT, "mxfp4")])
    found = fit(job().config, taken.weights, hardware, 4096, windowed=False, buffers=taken.buffers)
    assert list(found.ways) == ["decode", "prefill"]
    assert found.total == found.ways["decode"] < found.ways["prefill"]


def test_gpus_are_those_that_the_rules_know():
    assert tuple(GPUS) == SMS


def test_hardware_says_where_engines_build():
    found = {v.device: v for v in fmt("sm80").hardware(job("exact-bf16").steps)}
    assert list(found) == ["SM75", "SM80", "SM86", "SM89", "SM120", "SM121"]
    assert found["SM75"].refusal == "made for SM80 and later"
    assert not any(v.refusal for name, v in found.items() if name != "SM75")
    assert {v.form for v in found.values()} == {"INT8 in blocks of 32"}
    assert "L4" in found["SM89"].examples
    fp4 = fmt("sm120").hardware(job("mxfp4-q8").steps)
    assert [v.device for v in fp4 if not v.refusal] == ["SM120", "SM121"]
    assert {v.form for v in fp4} == {"FLOAT4E2M1 in blocks of 32"}
    assert {v.form for v in fmt("sm80").hardware(job("f32").steps)} == {"float"}
