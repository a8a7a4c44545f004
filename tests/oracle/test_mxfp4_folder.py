"""The released layout, read by safetensors and transformers, and by ourselves as a checkpoint.

A released checkpoint written again has equal tensors, so whatever loads the release loads the folder.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.checkpoint import open_checkpoint
from exporter.formats import get_format
from exporter.pipeline.profiles import load_recipe
from exporter.pipeline.progress import Progress
from exporter.pipeline.prove import check_digests
from scripts import load_folder
from tests import variants
from tests.conftest import DEMO, run_exporter
from tests.oracle.test_hf_folders import compare

RECIPE = "mxfp4-bf16"
GATE_UP, DOWN = (f"model.layers.2.mlp.experts.{name}_proj" for name in ("gate_up", "down"))


def written(model, out, *more):
    """A checkpoint as a folder of this format."""
    done = run_exporter(
        "quantize", "-p", "24gb", model, "--format", "mxfp4", "--out", out, "--until", "export", "--json", *more
    )
    assert done.code == 0, done.err
    return Path(done.json["artifacts"][0]["path"])


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return written(DEMO, tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def fine_tune(tmp_path_factory):
    """A bf16 fine-tune whose experts are off the grid: where it lies, and its folder."""
    root = tmp_path_factory.mktemp("tuned")
    model = variants.off_grid_bf16(root / "tuned")
    return model, written(model, root / "out")


def tensors_of(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def differing(ours, theirs):
    """Names of tensors that are not bit for bit the same, or in one of the two only."""
    same = (name for name in ours.keys() & theirs.keys() if ours[name].dtype == theirs[name].dtype)
    equal = {n for n in same if torch.equal(bits(ours[n]), bits(theirs[n]))}
    return sorted((ours.keys() | theirs.keys()) - equal)


def test_a_release_written_again_is_byte_for_byte_the_same(demo):
    assert differing(tensors_of(demo), variants.demo_tensors()) == []
    assert json.loads((demo / "config.json").read_text()) == json.loads((DEMO / "config.json").read_text())


@pytest.mark.parametrize("variant", ["original_layout", "tied_head", "off_by_one_shards"])
def test_the_same_from_other_layouts(variant, tmp_path):
    build, _ = variants.VARIANTS[variant]
    found, released = tensors_of(written(build(tmp_path / "model"), tmp_path / "out")), variants.demo_tensors()
    if variant == "tied_head":
        released["lm_head.weight"] = released["model.embed_tokens.weight"]
    assert differing(found, released) == []


@pytest.mark.parametrize("variant", ["fused_bf16", "per_expert", "mixed_layers"])
def test_floats_on_the_grid_come_back_as_they_were_released(variant, tmp_path):
    """The numbers; their bytes may differ where a block of small numbers has several exponents that hold it."""
    build, _ = variants.VARIANTS[variant]
    folder = written(build(tmp_path / "model"), tmp_path / "out")
    found, released = tensors_of(folder), variants.demo_tensors()
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {n: (t.dtype, t.shape) for n, t in released.items()}
    found, released = variants.canonical(found), variants.canonical(released)
    assert differing(found, released) == []
    listed = json.loads((folder / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert not any("experts" in name for name in listed)


def test_a_fine_tune_is_near_to_what_it_was(fine_tune):
    """Decoded by a few lines of torch: every expert row by itself, so that rows in wrong places would show."""
    model, folder = fine_tune
    found, tuned = tensors_of(folder), tensors_of(model)
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {
        n: (t.dtype, t.shape) for n, t in variants.demo_tensors().items()
    }
    for stem, values in variants.expert_floats(found).items():
        wanted = tuned[stem].float().transpose(1, 2)
        error = (values - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        assert 0.005 < float(error.mean()) < 0.1, stem
        assert float(error.max()) < 0.2, stem
    rest = {n: t for n, t in found.items() if not n.endswith(("_blocks", "_scales"))}
    assert differing(rest, {n: tuned[n] for n in rest}) == []


def in_transformers(folder):
    """float32; MXFP4 numbers are exact in the bf16 that they are decoded to."""
    from transformers import GptOssForCausalLM, Mxfp4Config

    model, info = GptOssForCausalLM.from_pretrained(
        folder, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.float().eval()


def logits(folder):
    tokens = load_folder.text_tokens(DEMO, 2, 192)
    with torch.inference_mode():
        return in_transformers(folder)(tokens).logits.log_softmax(-1).numpy()


@pytest.fixture(scope="module")
def released_logits():
    return logits(DEMO)


def test_transformers_sees_the_release(demo, released_logits):
    assert np.array_equal(logits(demo), released_logits)


@pytest.mark.parametrize("which", ["demo", "fine_tune"])
def test_transformers_computes_the_reference_forward(which, request):
    folder = request.getfixturevalue(which)
    folder = folder if which == "demo" else folder[1]
    tokens = load_folder.text_tokens(folder, 1, 192)
    with torch.inference_mode():
        theirs = in_transformers(folder)(tokens).logits.log_softmax(-1)[0].numpy()
    compare(folder, load_recipe(RECIPE), get_format("mxfp4"), tokens, theirs)


# As a checkpoint


def test_the_folder_is_a_checkpoint(demo):
    done = run_exporter("inspect", demo, "--json")
    assert done.code == 0, done.err
    assert done.json["layout"] == "hf-mxfp4"
    released = run_exporter("inspect", DEMO, "--json").json
    assert done.json["parameters"] == released["parameters"]


@pytest.mark.parametrize("which", ["demo", "fine_tune"])
def test_quantized_again_it_has_the_same_digests(which, request, tmp_path):
    folder = request.getfixturevalue(which)
    folder = folder if which == "demo" else folder[1]
    again = written(folder, tmp_path)
    assert differing(tensors_of(again), tensors_of(folder)) == []
    ours, theirs = (json.loads((f / "manifest.json").read_text())["tensors"] for f in (again, folder))
    assert {n: t["digest"] for n, t in ours.items()} == {n: t["digest"] for n, t in theirs.items()}


# Planted faults: what an error in the geometry or in the packing would write


def _rows_swapped(tensors):
    for kind in ("blocks", "scales"):
        name = f"{GATE_UP}_{kind}"
        tensors[name] = torch.stack((tensors[name][:, 1::2], tensors[name][:, 0::2]), 2).flatten(1, 2)


def _halves(tensors):
    for kind in ("blocks", "scales"):
        name = f"{GATE_UP}_{kind}"
        tensors[name] = torch.cat((tensors[name][:, 0::2], tensors[name][:, 1::2]), 1)


def _nibbles_swapped(tensors):
    tensors[f"{DOWN}_blocks"] = tensors[f"{DOWN}_blocks"] >> 4 | tensors[f"{DOWN}_blocks"] << 4


def _blocks_of_another_expert(tensors):
    tensors[f"{DOWN}_blocks"] = tensors[f"{DOWN}_blocks"].roll(1, 0)


def _scales_of_another_expert(tensors):
    tensors[f"{GATE_UP}_scales"] = tensors[f"{GATE_UP}_scales"].roll(1, 0)


def _biases_swapped(tensors):
    name = f"{GATE_UP}_bias"
    tensors[name] = torch.stack((tensors[name][:, 1::2], tensors[name][:, 0::2]), 2).flatten(1, 2)


FAULTS = {
    "gate and up rows swapped": (_rows_swapped, {"gate_proj.weight", "up_proj.weight"}),
    "gate and up as halves": (_halves, {"gate_proj.weight", "up_proj.weight"}),
    "nibbles swapped": (_nibbles_swapped, {"down_proj.weight"}),
    "blocks of another expert": (_blocks_of_another_expert, {"down_proj.weight"}),
    "scales of another expert": (_scales_of_another_expert, {"gate_proj.weight", "up_proj.weight"}),
    "gate and up biases swapped": (_biases_swapped, {"gate_proj.bias", "up_proj.bias"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, demo, released_logits, tmp_path):
    """By the comparison of bytes, by the digests of `validate`, and by transformers' logits."""
    damage, parts = FAULTS[fault]
    folder = tmp_path / "folder"
    shutil.copytree(demo, folder)
    tensors = tensors_of(folder)
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert differing(tensors_of(folder), variants.demo_tensors())
    with open_checkpoint(DEMO) as checkpoint:
        recipe = load_recipe(RECIPE)
        steps = [recipe.step(s, checkpoint.scheme(s.name)) for s in checkpoint.specs]
    manifest = json.loads((folder / "manifest.json").read_text())["tensors"]
    expected = {name: entry["digest"] for name, entry in manifest.items()}
    found = check_digests(folder, get_format("mxfp4"), steps, expected, 1, Progress())
    assert {name.split(".experts.")[1] for name in found["different"]} == parts
    theirs = logits(folder)
    kl = (np.exp(released_logits) * (released_logits - theirs)).sum(-1).mean()
    assert kl > 1e-4  # without a fault they are equal
