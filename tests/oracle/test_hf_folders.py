"""Hugging Face folders, read by what we did not write: safetensors, transformers with compressed-tensors, plain loops.

GPTQModel pins another torch and has an environment of its own: scripts/load_folder.py runs there.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from exporter.checkpoint import open_checkpoint
from exporter.formats import get_format
from exporter.model.reference import reference_logits
from exporter.numerics import decode
from exporter.pipeline.profiles import load_recipe, source_text
from exporter.quantize.rtn import round_to
from scripts import load_folder
from tests.conftest import DEMO, run_exporter

RECIPE = """title = "INT4 experts, INT8 attention"
[[rule]]
match = "*.mlp.experts.*_proj.weight"
method = "{method}"
scheme = "{scheme}"
[[rule]]
match = "*.self_attn.*_proj.weight"
method = "rtn"
scheme = "int8-g32"
[[rule]]
match = "*"
method = "keep"
"""
RECIPES = {"int4": RECIPE.format(method="rtn", scheme="int4-g32"), "mx": RECIPE.format(method="pass", scheme="mxfp4")}


def made(tmp_path_factory, recipe, fmt, target=""):
    """The demo checkpoint as a folder of one format."""
    root = tmp_path_factory.mktemp("hf")
    (root / f"{recipe}.toml").write_text(RECIPES[recipe])
    text = source_text("16gb").replace('"gguf"', f'"{fmt}"\ntarget = "{target}"')
    (root / "p.toml").write_text(text.replace('"mxfp4-q8"', json.dumps(str(root / f"{recipe}.toml"))))
    done = run_exporter("quantize", "-p", root / "p.toml", DEMO, "--out", root, "--until", "export", "--json")
    assert done.code == 0, done.err
    return Path(done.json["artifacts"][0]["path"]), load_recipe(str(root / f"{recipe}.toml"))


def wanted(recipe, name):
    """float32 values of a canonical tensor as the recipe rounds it."""
    with open_checkpoint(DEMO) as checkpoint:
        spec = next(s for s in checkpoint.specs if s.name == name)
        step = recipe.step(spec, checkpoint.scheme(name))
        q = checkpoint.read(name, 0, spec.shape[0])
        return decode.values(round_to(q, step.scheme) if step.method == "rtn" else q)


@pytest.fixture(scope="module")
def gptq(tmp_path_factory):
    return made(tmp_path_factory, "int4", "gptq")


@pytest.fixture(scope="module", params=["int4", "mx"])
def packed(request, tmp_path_factory):
    return made(tmp_path_factory, request.param, "compressed-tensors")


def gptq_by_loops(tensors, layer, rows, inputs, bits, zero_shift):
    """One layer [rows, inputs] as AutoGPTQ's file format says, one number at a time."""
    words, zeros = tensors.get_tensor(f"{layer}.qweight"), tensors.get_tensor(f"{layer}.qzeros")
    scales, groups = tensors.get_tensor(f"{layer}.scales"), tensors.get_tensor(f"{layer}.g_idx")
    per, mask = 32 // bits, (1 << bits) - 1
    out = np.empty((rows, inputs), np.float32)
    for n in range(rows):
        for k in range(inputs):
            code = int(words[k // per, n]) >> (bits * (k % per)) & mask
            g = int(groups[k])
            zero = (int(zeros[g, n // per]) >> (bits * (n % per)) & mask) + zero_shift
            out[n, k] = np.float32(scales[g, n]) * (code - zero)
    return out


def test_gptq_decoded_one_number_at_a_time(gptq):
    folder, recipe = gptq
    with safe_open(folder / "model.safetensors", "np") as tensors:
        down = gptq_by_loops(tensors, "model.layers.2.mlp.experts.3.down_proj", 192, 192, 4, 1)
        gate = gptq_by_loops(tensors, "model.layers.1.mlp.experts.5.gate_proj", 192, 192, 4, 1)
        up = gptq_by_loops(tensors, "model.layers.1.mlp.experts.5.up_proj", 192, 192, 4, 1)
        k = gptq_by_loops(tensors, "model.layers.0.self_attn.k_proj", 128, 192, 8, 1)
    assert np.array_equal(down, wanted(recipe, "model.layers.2.mlp.experts.down_proj.weight")[3])
    assert np.array_equal(k, wanted(recipe, "model.layers.0.self_attn.k_proj.weight"))
    # GPTQModel calls the halves of the interleaved matrix gate_proj and up_proj.
    interleaved = np.concatenate((gate, up))
    assert np.array_equal(interleaved[0::2], wanted(recipe, "model.layers.1.mlp.experts.gate_proj.weight")[5])
    assert np.array_equal(interleaved[1::2], wanted(recipe, "model.layers.1.mlp.experts.up_proj.weight")[5])


@pytest.mark.parametrize(("target", "shift"), [("by-name", 1), ("by-name-v2", 0)])
def test_the_other_targets(target, shift, tmp_path_factory):
    folder, recipe = made(tmp_path_factory, "int4", "gptq", target)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == ("gptq" if shift else "gptq_v2")
    with safe_open(folder / "model.safetensors", "np") as tensors:
        gate = gptq_by_loops(tensors, "model.layers.1.mlp.experts.5.gate_proj", 192, 192, 4, shift)
        assert tensors.metadata()["exporter.gate_up"] == config["exporter"]["gate_up"] == "gate rows and up rows apart"
    assert np.array_equal(gate, wanted(recipe, "model.layers.1.mlp.experts.gate_proj.weight")[5])


def test_gptq_in_transformers_classes_is_the_reference_forward(gptq):
    """The script's own decoder and transformers' model, against our forward on what the format unpacks."""
    import torch

    folder, recipe = gptq
    tokens = load_folder.text_tokens(folder, 1, 64)
    with torch.inference_mode():
        theirs = load_folder.decoded_model(folder)(tokens).logits.log_softmax(-1)[0].numpy()
    compare(folder, recipe, get_format("gptq"), tokens, theirs)


def test_transformers_loads_compressed_tensors(packed):
    """Every weight arrives, and the logits are those of our forward on the numbers in the file."""
    pytest.importorskip("compressed_tensors")
    import torch

    folder, recipe = packed
    tokens = load_folder.text_tokens(folder, 1, 64)
    with torch.inference_mode():
        model = load_folder.in_transformers(folder, torch.float32)
        theirs = model(tokens).logits.log_softmax(-1)[0].numpy()
    compare(folder, recipe, get_format("compressed-tensors"), tokens, theirs)


def compare(folder, recipe, fmt, tokens, theirs):
    from exporter.pipeline import regions

    with open_checkpoint(DEMO) as checkpoint:
        steps = {s.name: recipe.step(s, checkpoint.scheme(s.name)) for s in checkpoint.specs}
        config = checkpoint.config
    located = fmt.locate(folder, list(steps.values()))
    with open(folder / "model.safetensors", "rb") as f:

        def read(name, start, stop):
            arrays = regions.read_all(f.fileno(), located[name].parts, start, stop)
            return decode.values(fmt.unpack(steps[name], arrays))

        (ours,) = reference_logits(config, read, tokens.numpy(), [config.rope], top_k=config.vocab_size)
    logprobs = np.empty_like(theirs)
    np.put_along_axis(logprobs, ours.top_ids.astype(np.int64), ours.top_logprobs, axis=1)
    kl = (np.exp(theirs) * (theirs - logprobs)).sum(-1)
    assert float(kl.mean()) < 1e-4
    assert (theirs.argmax(-1) == ours.top_ids[:, 0]).mean() > 0.98
