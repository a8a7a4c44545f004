"""Quantized folders that we did not write: GPTQ in every dialect, by plain loops; compressed-tensors by itself."""

import json

import numpy as np
import pytest
import torch

from exporter.errors import ExporterError, Refused
from exporter.pipeline.foreign import compare_config, open_foreign
from exporter.pipeline.progress import Progress
from exporter.pipeline.weights import compare_weights
from tests import variants
from tests.foreign_files import demo_values, gptq_demo, is_layer, write_folder


def wrong(folder, expected, rows=None) -> list[str]:
    """Tensors that are not read as they were written, whole or by some rows alone."""
    foreign = open_foreign(folder)
    found = []
    for name, numbers in expected.items():
        n = numbers.shape[0]
        start, stop = rows(n) if rows else (0, n)
        if not np.array_equal(foreign.read(name, start, stop), numbers[start:stop]):
            found.append(name)
    foreign.close()
    return found


GPTQ = {
    "v1": {},
    "v2": {"version": 2},
    "8 bits": {"bits": 8},
    "2 bits": {"bits": 2},
    "groups of 64": {"group": 64},
    "one group": {"group": 192},
    "asymmetric v1": {"symmetric": False},
    "asymmetric v2": {"symmetric": False, "version": 2},
    "act-order": {"act_order": True},
    "act-order, asymmetric": {"act_order": True, "symmetric": False},
    "halves, as GPTQModel": {"halves": True},
    "halves, act-order, 8 bits": {"halves": True, "act_order": True, "bits": 8},
    "without g_idx": {"g_idx": False},
    "auto-round": {"config": {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}},
}


@pytest.mark.parametrize("case", GPTQ)
def test_gptq_in_every_dialect(case, tmp_path):
    expected = gptq_demo(tmp_path / "m", **GPTQ[case])
    assert wrong(tmp_path / "m", expected) == []
    assert wrong(tmp_path / "m", expected, lambda n: (n // 3, n // 3 + 1)) == [], "a row in the middle"
    assert wrong(tmp_path / "m", expected, lambda n: (n // 2 - 1, n // 2 + 1)) == [], "rows around the middle"


@pytest.mark.parametrize(
    ("case", "label"),
    [
        ("v1", "int4 g32"),
        ("8 bits", "int8 g32"),
        ("groups of 64", "int4 g64"),
        ("asymmetric v2", "int4 g32 asym"),
        ("act-order", "int4 g32 act-order"),
        ("act-order, asymmetric", "int4 g32 asym act-order"),
    ],
)
def test_how_it_is_stored(case, label, tmp_path):
    gptq_demo(tmp_path / "m", **GPTQ[case])
    foreign = open_foreign(tmp_path / "m")
    assert foreign.format == "gptq"
    assert foreign.stored["model.layers.2.mlp.experts.up_proj.weight"].type == label
    assert foreign.stored["model.norm.weight"].type == "BF16"
    assert foreign.stored["model.norm.weight"].exact


@pytest.mark.parametrize("fault", ["version", "halves", "act_order"])
def test_the_wrong_dialect_is_not_read_as_the_right_one(fault, tmp_path):
    """Each of them has the same shapes: a reader that takes no notice gets other numbers."""
    other = {"version": {"version": 2, "config": {"checkpoint_format": "gptq"}}}
    other |= {"halves": {"halves": True, "config": {"meta": {}}}, "act_order": {"act_order": True, "g_idx": False}}
    expected = gptq_demo(tmp_path / "m", **other[fault])
    assert len(wrong(tmp_path / "m", expected)) >= 8


def test_a_sound_file_is_sound_and_the_halves_are_named(tmp_path, demo_checkpoint):
    gptq_demo(tmp_path / "m", halves=True)
    foreign = open_foreign(tmp_path / "m")
    assert compare_config(foreign, demo_checkpoint.config) == []
    assert foreign.tool == "GPTQModel 7.7.0"
    found = compare_weights(foreign, demo_checkpoint, 1, Progress())
    assert found["problems"] == []
    assert found["kept_exact"]
    gptq_demo(tmp_path / "unsaid", halves=True, config={"meta": {}})
    found = compare_weights(open_foreign(tmp_path / "unsaid"), demo_checkpoint, 1, Progress())
    assert (
        "layers.0 experts.gate_proj: half of the interleaved matrix, gate rows and up rows mixed" in found["problems"]
    )


def test_zero_points_of_the_other_format_are_named(tmp_path, demo_checkpoint):
    gptq_demo(tmp_path / "m", version=2, config={"checkpoint_format": "gptq"})
    found = compare_weights(open_foreign(tmp_path / "m"), demo_checkpoint, 1, Progress())
    moved = "every group moved by a step: zero points are off by one, as between the two GPTQ formats"
    assert f"layers.0 q_proj: {moved}" in found["problems"]
    assert f"layers.0 experts.down_proj: {moved}" in found["problems"]


def test_layers_left_out_and_experts_as_released(tmp_path):
    """Only attention is GPTQ; experts are the released blocks in one folder, fused floats in another."""
    expected = demo_values()
    for form in ("blocks", "floats"):

        def edit(stored, form=form):
            for name in [n for n in stored if ".experts." in n]:
                del stored[name]
            released = variants.demo_tensors()
            stored.update({n: t for n, t in released.items() if n.endswith("_bias")})
            if form == "blocks":
                stored.update({n: t for n, t in released.items() if n.endswith(("_blocks", "_scales"))})
            else:
                floats = variants.expert_floats(released)
                stored.update({n: t.transpose(1, 2).contiguous().bfloat16() for n, t in floats.items()})

        attention = gptq_demo(tmp_path / form, edit=edit)
        found = {n: attention[n] if ".experts." not in n else v for n, v in expected.items()}
        assert wrong(tmp_path / form, found) == []


def test_gate_and_up_rows_in_turns_as_unsloth_names_them(tmp_path):
    """experts.gate_up_projs.E and down_projs.E, each quantized."""
    values = demo_values()

    def edit(stored):
        for i in range(4):
            for e in range(16):
                stem = f"model.layers.{i}.mlp.experts"
                for kind in ("weight", "bias"):
                    gate, up = (values[f"{stem}.{p}_proj.{kind}"][e] for p in ("gate", "up"))
                    turns = np.stack((gate, up), 1).reshape(2 * len(gate), *gate.shape[1:])
                    down = values[f"{stem}.down_proj.{kind}"][e]
                    stored[f"{stem}.gate_up_projs.{e}.{kind}"] = torch.from_numpy(turns).bfloat16()
                    stored[f"{stem}.down_projs.{e}.{kind}"] = torch.from_numpy(down.copy()).bfloat16()
        for name in [n for n in stored if ".experts." in n and n.split(".experts.")[1][0].isdigit()]:
            del stored[name]

    expected = gptq_demo(tmp_path / "m", edit=edit)
    assert wrong(tmp_path / "m", {n: v if ".experts." in n else expected[n] for n, v in values.items()}) == []


def test_experts_one_by_one_as_floats(tmp_path):
    """As llm-compressor has them before it quantizes."""
    stored = {}
    for name, numbers in demo_values().items():
        before, _, after = name.partition(".experts.")
        parts = {f"{before}.experts.{e}.{after}": one for e, one in enumerate(numbers)} if after else {name: numbers}
        stored |= {n: torch.from_numpy(one.copy()).bfloat16() for n, one in parts.items()}
    write_folder(tmp_path / "m", stored, None)
    assert open_foreign(tmp_path / "m").format == "float"
    assert wrong(tmp_path / "m", demo_values()) == []


# compressed-tensors: packed and unpacked by the library


def schemes():
    compressed = pytest.importorskip("compressed_tensors.quantization")
    args = compressed.QuantizationArgs
    return {
        "int4 g32": ("pack-quantized", args(num_bits=4, type="int", strategy="group", group_size=32)),
        "int8 g64": ("pack-quantized", args(num_bits=8, type="int", strategy="group", group_size=64)),
        "int4 channel": ("pack-quantized", args(num_bits=4, type="int", strategy="channel")),
        "int4 g32 asym": (
            "pack-quantized",
            args(num_bits=4, type="int", strategy="group", group_size=32, symmetric=False),
        ),
        "int8 channel": ("int-quantized", args(num_bits=8, type="int", strategy="channel")),
        "FP8 channel": ("float-quantized", args(num_bits=8, type="float", strategy="channel")),
        "FP8 tensor": ("float-quantized", args(num_bits=8, type="float", strategy="tensor")),
        "MXFP4": (
            "mxfp4-pack-quantized",
            args(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8),
        ),
        "NVFP4": (
            "nvfp4-pack-quantized",
            args(num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn),
        ),
    }


def packed_layer(weight, form, args):
    """(arrays of one layer, float32 that the library unpacks from them)."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    group = args.group_size or weight.shape[1]
    low = high = None
    if args.strategy == "tensor":
        low, high = weight.min().reshape(1), weight.max().reshape(1)
    else:
        parts = weight.reshape(len(weight), -1, group)
        low, high = parts.amin(-1), parts.amax(-1)
    state = {"weight": weight}
    whole = None
    if form.startswith("nvfp4"):
        whole = state["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
    scale, zero = calculate_qparams(low, high, args, global_scale=whole)
    state["weight_scale"] = scale
    if not args.symmetric:
        state["weight_zero_point"] = zero.to(torch.int8)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(form)
    arrays = compressor.compress(dict(state), scheme)
    arrays = {k: v for k, v in arrays.items() if isinstance(v, torch.Tensor)}
    back = compressor.decompress({k: v.clone() for k, v in arrays.items()}, scheme)["weight"].detach().float()
    return {k: v.detach() for k, v in arrays.items()}, back.numpy()


LABELS = ["int4 g32", "int8 g64", "int4 channel", "int4 g32 asym", "int8 channel", "FP8 channel", "FP8 tensor"]


@pytest.mark.parametrize("label", [*LABELS, "MXFP4", "NVFP4"])
def test_compressed_tensors_unpacks_the_same(label, tmp_path):
    form, args = schemes()[label]
    values, stored, expected = demo_values(), {}, {}
    names = ["model.layers.1.self_attn.q_proj.weight", "model.layers.2.mlp.experts.down_proj.weight"]
    for name, numbers in values.items():
        before, _, after = name.partition(".experts.")
        for e in range(len(numbers) if after else 1):
            one = torch.from_numpy((numbers[e] if after else numbers).copy())
            stem = f"{before}.experts.{e}.{after}" if after else name
            if name not in names:
                stored[stem] = one.bfloat16()
                continue
            arrays, back = packed_layer(one, form, args)
            stored |= {f"{stem.removesuffix('.weight')}.{k}": v for k, v in arrays.items()}
            expected.setdefault(name, []).append(back)
    write_folder(tmp_path / "m", stored, {"quant_method": "compressed-tensors", "format": form})
    foreign = open_foreign(tmp_path / "m")
    assert foreign.format == "compressed-tensors"
    for name in names:
        assert foreign.stored[name].type == label
        theirs = np.stack(expected[name]) if ".experts." in name else expected[name][0]
        found = foreign.read(name, 0, theirs.shape[0])
        # The library unpacks FP4 with FP8 scales in bfloat16.
        allowed = 2.0**-8 * np.abs(theirs) if label == "NVFP4" else 1e-6 * np.abs(theirs).max()
        assert (np.abs(found - theirs) <= allowed).all()
        middle = foreign.read(name, 5, 6)
        assert np.array_equal(middle, found[5:6])


# What is not understood


def with_config(tmp_path, **quantization):
    gptq_demo(tmp_path / "m", config=quantization)
    return tmp_path / "m"


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ({"quant_method": "awq"}, "quant_method 'awq'"),
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes'"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"pack_dtype": "int16"}, "pack_dtype 'int16'"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}, "auto_awq"),
        ({"rotation": "hadamard"}, "rotation"),
        ({"quant_method": None, "mode": "mxfp4"}, "as MLX writes it"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(quantization, named, tmp_path):
    with pytest.raises(Refused) as failure:
        open_foreign(with_config(tmp_path, **quantization))
    assert named in failure.value.message
    assert "\n" not in failure.value.message


def edited(**changes):
    def edit(stored):
        for name, change in changes.items():
            stem = "model.layers.1.mlp.experts.3.down_proj"
            key = f"{stem}.{name}"
            made = change(stored[key]) if key in stored else change(None)
            if made is None:
                del stored[key]
            else:
                stored[key] = made

    return edit


DAMAGES = {
    "a scale gone": (edited(scales=lambda t: None), "scales"),
    "zeros gone": (edited(qzeros=lambda t: None), "qzeros"),
    "too few words": (edited(qweight=lambda t: t[:-1]), "bits a weight"),
    "words of floats": (edited(qweight=lambda t: t.float()), "int32"),
    "scales of another layer": (edited(scales=lambda t: t[:, :-8]), "scales"),
    "a tensor more": (edited(lora_A=lambda t: torch.zeros(2, 2)), "lora_A"),
    "an expert gone": (edited(bias=lambda t: None), "expert 3 of 16"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_layers_are_named(case, tmp_path):
    edit, named = DAMAGES[case]
    gptq_demo(tmp_path / "m", edit=edit)
    with pytest.raises(Refused) as failure:
        open_foreign(tmp_path / "m")
    assert named in failure.value.message
    assert "\n" not in failure.value.message


@pytest.mark.parametrize("value", [6, -1, 2**31 - 1])
def test_a_group_that_there_is_not(value, tmp_path):
    """g_idx is read with the numbers: an index from a file must never become one into our memory."""

    def point(t):
        t = t.clone()
        t[17] = value
        return t

    gptq_demo(tmp_path / "m", edit=edited(g_idx=point))
    foreign = open_foreign(tmp_path / "m")
    with pytest.raises(ExporterError, match="names groups outside the 6"):
        foreign.read("model.layers.1.mlp.experts.down_proj.weight", 3, 4)


def test_remote_code_is_never_looked_at(tmp_path):
    expected = gptq_demo(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "m" / "evil.py").write_text("raise SystemExit('ran')")
    assert wrong(tmp_path / "m", expected) == []
    assert all(is_layer(n) for n in expected if "_proj.weight" in n)
