"""The released layout as a format: names, types and shapes, what its configuration says, what it refuses."""

import dataclasses
import json

import numpy as np
import pytest

from exporter.errors import ExporterError, UsageError
from exporter.formats import get_format
from exporter.formats.base import ExportJob, Provenance
from exporter.formats.mxfp4 import RELEASED_FLOATS
from exporter.model import ModelConfig, tensor_specs
from exporter.model.released import RELEASED
from exporter.pipeline.plan import released_scheme
from exporter.types import Scheme, TensorSpec
from exporter.types.recipe import Step
from tests.conftest import DEMO

FORMAT = get_format("mxfp4")
CONFIG = ModelConfig.from_hf(json.loads((DEMO / "config.json").read_text()))
LISTED = [*RELEASED_FLOATS, "model.norm"]


def job(config=CONFIG, files=None, split_size=0):
    """The release of a model. `files`: JSON of small files of the checkpoint by name."""
    raw = {name: json.dumps(value).encode() for name, value in (files or {}).items()}
    steps = [Step(s, "keep", released_scheme(s), released_scheme(s)) for s in tensor_specs(config)]
    facts = Provenance("0", "", "", "r", "0" * 64, "0" * 64, {})
    return ExportJob("m", config, steps, facts, {}, {}, {}, None, split_size=split_size, file=raw.get)


def headers(layouts):
    """(type, shape) of every tensor by name, and by file."""
    files = {}
    for each in layouts:
        if each.filename.endswith(".safetensors"):
            table = json.loads(each.head[8:])
            table.pop("__metadata__")
            files[each.filename] = {name: (t["dtype"], tuple(t["shape"])) for name, t in table.items()}
    return files


def test_tensors_are_called_typed_and_shaped_as_released():
    ours = headers(FORMAT.layout(job()))["model.safetensors"]
    released = {}
    for path in sorted(DEMO.glob("*.safetensors")):
        raw = path.read_bytes()
        table = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        table.pop("__metadata__", None)
        released |= {name: (t["dtype"], tuple(t["shape"])) for name, t in table.items()}
    assert ours == released


@pytest.mark.parametrize(
    ("repo", "total"), [("openai/gpt-oss-20b", 13_761_264_768), ("openai/gpt-oss-120b", 65_248_815_744)]
)
def test_the_released_models_have_their_sizes(repo, total):
    """`metadata.total_size` of the released index, and shapes of the first expert matrix."""
    layouts = FORMAT.layout(job(RELEASED[repo], split_size=5 * 10**9))
    index = json.loads(next(f.head for f in layouts if f.filename == "model.safetensors.index.json"))
    assert index["metadata"]["total_size"] == total
    experts = RELEASED[repo].num_local_experts
    found = {name: entry for file in headers(layouts).values() for name, entry in file.items()}
    assert found.keys() == index["weight_map"].keys()
    stem = "model.layers.0.mlp.experts.gate_up_proj"
    assert found[f"{stem}_blocks"] == ("U8", (experts, 5760, 90, 16))
    assert found[f"{stem}_scales"] == ("U8", (experts, 5760, 90))
    assert found[f"{stem}_bias"] == ("BF16", (experts, 5760))


def test_gate_and_up_share_a_tensor_in_turns():
    (file,) = [f for f in FORMAT.layout(job()) if f.parts]
    gate, up = (file.parts[f"model.layers.2.mlp.experts.{n}_proj.weight"] for n in ("gate", "up"))
    for even, odd in zip(gate, up, strict=True):
        row = even.width
        assert even.axes == odd.axes == ((192, 2 * row),)
        assert odd.offset == even.offset + row
        assert odd.lead == even.lead == 2 * 192 * row
    assert [part.width for part in gate] == [96, 6]


def test_every_byte_is_of_one_tensor():
    """Together the parts fill the file, and none takes the bytes of another."""
    (file,) = [f for f in FORMAT.layout(job()) if f.parts]
    taken = np.zeros(file.size, np.uint8)
    for spec in tensor_specs(CONFIG):
        for part in file.parts[spec.name]:
            counts, strides = zip((spec.shape[0], part.lead), *part.axes, (part.width, 1), strict=True)
            # Indices may run past the end only if the part is wrong: numpy then raises.
            at = part.offset + sum(
                np.arange(n).reshape(-1, *[1] * (len(counts) - 1 - i)) * stride
                for i, (n, stride) in enumerate(zip(counts, strides, strict=True))
            )
            np.add.at(taken, at.reshape(-1), 1)
    assert not taken[: len(file.head)].any()
    assert (taken[len(file.head) :] == 1).all()


def test_a_layer_is_in_one_file():
    files = headers(FORMAT.layout(job(split_size=1)))
    layers = [{n.split(".")[2] for n in names if ".layers." in n} for names in files.values()]
    assert [len(numbers) for numbers in layers if numbers] == [1] * CONFIG.num_hidden_layers


def quantization(own):
    return FORMAT.quantization_config(job(files={"config.json": {"quantization_config": own}}))


@pytest.mark.parametrize(
    ("own", "listed"),
    [
        ({"quant_method": "mxfp4", "modules_to_not_convert": LISTED}, LISTED),
        ({"quant_method": "bitsandbytes", "modules_to_not_convert": LISTED}, RELEASED_FLOATS),
        ({"quant_method": "mxfp4", "modules_to_not_convert": None}, RELEASED_FLOATS),
        ({"quant_method": "mxfp4", "modules_to_not_convert": [1]}, RELEASED_FLOATS),
        (None, RELEASED_FLOATS),
        # A layer that was bf16 in the checkpoint is MXFP4 here: a reader must not pass it over.
        ({"quant_method": "mxfp4", "modules_to_not_convert": [*LISTED, "model.layers.1.mlp.experts"]}, RELEASED_FLOATS),
        ({"quant_method": "mxfp4", "modules_to_not_convert": [*LISTED, "model.layers.*.mlp"]}, RELEASED_FLOATS),
        ({"quant_method": "mxfp4", "modules_to_not_convert": [*LISTED, "experts"]}, RELEASED_FLOATS),
        ({"quant_method": "mxfp4", "modules_to_not_convert": [*LISTED, "mlp"]}, RELEASED_FLOATS),
    ],
)
def test_the_list_of_floats(own, listed):
    assert quantization(own) == {"quant_method": "mxfp4", "modules_to_not_convert": list(listed)}


def test_the_list_of_a_checkpoint_without_a_configuration_of_this_kind():
    assert FORMAT.quantization_config(job())["modules_to_not_convert"] == list(RELEASED_FLOATS)


def config_of(raw):
    layouts = FORMAT.layout(job(files={"config.json": raw} if raw else {}))
    return json.loads(next(f.head for f in layouts if f.filename == "config.json"))


def test_the_released_configuration_stays_as_it_is():
    raw = json.loads((DEMO / "config.json").read_text())
    assert config_of(raw) == raw


def test_a_configuration_of_transformers_5_is_spelled_as_the_release():
    """transformers 4 passes over `rope_parameters` and rotates by defaults: another theta must reach it."""
    raw = json.loads((DEMO / "config.json").read_text())
    rope = {**raw.pop("rope_scaling"), "rope_theta": 170000}
    del raw["rope_theta"], raw["quantization_config"]
    found = config_of({**raw, "rope_parameters": rope, "dtype": "float32"})
    assert "rope_parameters" not in found
    assert found["rope_theta"] == 170000
    assert found["rope_scaling"] == {key: value for key, value in rope.items() if key != "rope_theta"}
    assert found["dtype"] == "bfloat16"
    assert ModelConfig.from_hf(found) == dataclasses.replace(
        CONFIG, rope=dataclasses.replace(CONFIG.rope, theta=170000)
    )


def test_a_configuration_is_made_where_the_checkpoint_has_none():
    found = config_of(None)
    assert ModelConfig.from_hf(found) == CONFIG
    assert found["rope_theta"] == CONFIG.rope.theta
    assert "rope_parameters" not in found
    assert found["quantization_config"]["quant_method"] == "mxfp4"


@pytest.mark.parametrize(
    ("role", "scheme", "reason"),
    [
        ("expert", "bf16", "experts in MXFP4 only"),
        ("expert", "int4-g32", "experts in MXFP4 only"),
        ("head", "mxfp4", "MXFP4 for experts only"),
        ("linear", "int8-g32", "BF16 here"),
        ("vector", "f32", "BF16 here"),
        ("router", "f16", "BF16 here"),
    ],
)
def test_what_readers_do_not_expect_is_refused(role, scheme, reason):
    assert reason in FORMAT.refuse(Scheme.parse(scheme), TensorSpec("t", (2, 8, 64), role))


def test_what_was_released_is_held():
    assert [FORMAT.refuse(released_scheme(s), s) for s in tensor_specs(CONFIG)] == [None] * 79


def test_there_is_one_kind():
    with pytest.raises(UsageError, match='no target "vllm"'):
        FORMAT.for_target("vllm")


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    (file,) = [f for f in FORMAT.layout(job()) if f.parts]
    narrower = file.head.replace(b"[16,384,6,16]", b"[16,384,16,6]")
    assert narrower != file.head
    with open(tmp_path / "model.safetensors", "wb") as f:
        f.write(narrower)
        f.truncate(file.size)
    with pytest.raises(ExporterError, match=r"expected U8 \[16, 384, 6, 16\]"):
        FORMAT.locate(tmp_path, job().steps)
