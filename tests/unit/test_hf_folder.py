"""Headers, configurations and expressions of Hugging Face folders; files that lie about themselves."""

import json
import re

import numpy as np
import pytest

from exporter.errors import ExporterError, UsageError
from exporter.formats import get_format
from exporter.formats.base import ExportJob, Provenance
from exporter.formats.folder.layers import patterns
from exporter.formats.folder.shards import Stored, encode_header, read_headers
from exporter.model import ModelConfig, tensor_specs
from exporter.model.config import FULL, SLIDING
from exporter.model.released import RELEASED
from exporter.types import Scheme
from exporter.types.recipe import Step
from tests.conftest import DEMO

TENSORS = [Stored("a.bias", "BF16", (3,)), Stored("b", "I32", (2, 2)), Stored("a.shape", "I64", (2,))]
CONFIG = ModelConfig.from_hf(json.loads((DEMO / "config.json").read_text()))


def steps(**schemes):
    """Every tensor of the demo model in bf16, but those whose name has one of the keys in it."""
    found = []
    for spec in tensor_specs(CONFIG):
        name = next((s for key, s in schemes.items() if re.search(key.replace("__", r"\."), spec.name)), "bf16")
        name = name if spec.role in ("expert", "linear", "head") else "bf16"
        found.append(Step(spec, "rtn", Scheme.parse("bf16"), Scheme.parse(name)))
    return found


def job(config=CONFIG, file=lambda name: None, **schemes):
    facts = Provenance("0", "", "", "r", "0" * 64, "0" * 64, {})
    return ExportJob("m", config, steps(**schemes), facts, {}, {}, {}, None, file=file)


def test_a_header_is_what_the_format_says(tmp_path):
    head, offsets, size = encode_header(TENSORS, {"format": "pt"})
    assert len(head) % 8 == 0
    assert int.from_bytes(head[:8], "little") == len(head) - 8
    assert offsets == {"a.shape": len(head), "b": len(head) + 16, "a.bias": len(head) + 32}
    assert size == len(head) + 38
    (tmp_path / "f").write_bytes(head + bytes(38))
    found = read_headers([tmp_path / "f"])
    assert {n: (e.dtype, e.shape, e.offset) for n, e in found.items()} == {
        t.name: (t.dtype, t.shape, offsets[t.name]) for t in TENSORS
    }
    from safetensors import safe_open

    with safe_open(tmp_path / "f", "np") as theirs:
        assert set(theirs.keys()) == {t.name for t in TENSORS}


def header(**entry):
    whole = {"dtype": "I32", "shape": [2], "data_offsets": [0, 8], **entry}
    raw = json.dumps({"t": whole}).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(8)


HOSTILE = {
    "empty": b"",
    "a length beyond the file": (1 << 62).to_bytes(8, "little") + b"{}",
    "not JSON": (4).to_bytes(8, "little") + b"{{{{",
    "a nesting bomb": (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "a list": (2).to_bytes(8, "little") + b"[]",
    "no type of ours": header(dtype="F8_E5M2"),
    "a size that is no number": header(shape=["2"]),
    "a negative size": header(shape=[-2]),
    "a shape of 2^59 numbers": header(shape=[1 << 59]),
    "a place beyond the file": header(data_offsets=[8, 16]),
    "a place that is too short": header(data_offsets=[0, 4]),
    "one offset": header(data_offsets=[8]),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused(case, tmp_path):
    (tmp_path / "h.safetensors").write_bytes(HOSTILE[case])
    with pytest.raises(ExporterError, match=r"h\.safetensors"):
        read_headers([tmp_path / "h.safetensors"])


def test_a_tensor_may_be_in_one_file_only(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(header())
    with pytest.raises(ExporterError, match="twice"):
        read_headers(paths)


def matches(expressions, name):
    return [e for e in expressions if re.match(e, name)]


def test_expressions_match_their_layers_and_no_other():
    every = [s for s in steps() if s.spec.role in ("expert", "linear", "head")]
    some = [s for s in every if "gate_proj" in s.name or ("q_proj" in s.name and s.spec.layer in (0, 3))]
    found = patterns(some, every)
    assert found == [
        r"^model\.layers\.(?:0|3)\.self_attn\.q_proj$",
        r"^model\.layers\.\d+\.mlp\.experts\.\d+\.gate_proj$",
    ]
    assert matches(found, "model.layers.3.self_attn.q_proj")
    assert matches(found, "model.layers.2.mlp.experts.15.gate_proj")
    for other in ("model.layers.1.self_attn.q_proj", "model.layers.3.self_attn.q_proj.x", "lm_head"):
        assert not matches(found, other)


def test_gptq_says_what_differs_from_most():
    settings = get_format("gptq").quantization_config(job(experts="int4-g32", q_proj="int8-g64", lm_head="int8-g32"))
    assert (settings["bits"], settings["group_size"], settings["lm_head"]) == (4, 32, True)
    dynamic = settings["dynamic"]
    assert dynamic[r"+:^model\.layers\.\d+\.self_attn\.q_proj$"] == {"bits": 8, "group_size": 64}
    assert dynamic["+:^lm_head$"] == {"bits": 8, "group_size": 32}
    assert dynamic[r"-:^model\.layers\.\d+\.self_attn\.v_proj$"] == {}
    assert len(dynamic) == 5


def test_compressed_tensors_has_a_group_for_each_scheme():
    settings = get_format("compressed-tensors").quantization_config(job(experts="mxfp4", q_proj="int8-g32"))
    experts, attention = settings["config_groups"].values()
    assert settings["format"] == "mixed-precision"
    assert (experts["format"], experts["weights"]["type"]) == ("mxfp4-pack-quantized", "float")
    assert attention["targets"] == [r"re:^model\.layers\.\d+\.self_attn\.q_proj$"]
    assert attention["weights"]["num_bits"] == 8
    assert matches([i.removeprefix("re:") for i in settings["ignore"]], "lm_head")


def test_a_model_in_floats_has_no_quantization():
    files = {f.filename: f.head for f in get_format("gptq").layout(job())}
    assert "quantization_config" not in json.loads(files["config.json"])


def test_a_config_is_made_where_the_checkpoint_has_none_of_this_kind():
    """OpenAI's own layout: what is written must mean the same model."""
    released = RELEASED["openai/gpt-oss-20b"]
    for file in (lambda name: None, lambda name: b'{"num_experts": 32}' if name == "config.json" else None):
        from exporter.formats.folder.config import config_json

        raw = json.loads(config_json(job(released, file), {}))
        assert ModelConfig.from_hf(raw) == released


def test_the_files_of_the_tokenizer_are_copied():
    made = get_format("gptq").layout(job(file=lambda name: (DEMO / name).read_bytes()))
    small = {f.filename: f for f in made if not f.parts}
    assert small["tokenizer.json"].head == (DEMO / "tokenizer.json").read_bytes()
    assert small["tokenizer.json"].size == len(small["tokenizer.json"].head)
    config = json.loads(small["config.json"].head)
    original = json.loads((DEMO / "config.json").read_text())
    assert {k: v for k, v in config.items() if k != "quantization_config"} == {
        k: v for k, v in original.items() if k != "quantization_config"
    }


def test_layers_are_never_cut_apart():
    fmt, whole = get_format("gptq"), job(experts="int4-g32")
    files = [f for f in fmt.layout(ExportJob(**{**vars(whole), "split_size": 1})) if f.parts]
    layers = [{n.split(".")[2] for n in f.parts if ".layers." in n} for f in files]
    assert [len(names) for names in layers if names] == [1] * CONFIG.num_hidden_layers


def test_halves_need_an_even_number_of_rows():
    import dataclasses

    odd = dataclasses.replace(CONFIG, intermediate_size=191)
    assert "halves" in get_format("gptq").refuse_model(odd)
    assert get_format("gptq").for_target("by-name").refuse_model(odd) is None
    assert {SLIDING, FULL} == set(CONFIG.layer_types)


def test_fixed_bytes_are_what_the_two_conventions_say():
    for target, word in (("gptqmodel", 0x77777777), ("gptqmodel-v2", 0x88888888)):
        fmt = get_format("gptq").for_target(target)
        step = next(s for s in steps(experts="int4-g32") if "down_proj.weight" in s.name)
        zeros, groups = fmt.constants(step)
        assert (zeros.make().view("<u4") == word).all()
        assert np.array_equal(groups.make().view("<i4"), np.repeat(np.arange(6), 32))
        assert (zeros.make().size, groups.make().size) == (zeros.nbytes, groups.nbytes)


@pytest.mark.parametrize(("fmt", "target"), [("gptq", "v1"), ("compressed-tensors", "x")])
def test_unknown_targets(fmt, target):
    with pytest.raises(UsageError, match=f'no target "{target}"'):
        get_format(fmt).for_target(target)
