"""Every layout found in the field decodes to the same numbers as the file that made it."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.errors import BadCheckpoint
from exporter.model import ModelConfig
from exporter.numerics.decode import values
from exporter.types import leaves
from tests import variants
from tests.variants import DEMO, VARIANTS


def read_all(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """A whole canonical tensor, leaf by leaf as the pipeline reads it."""
    shape = next(s.shape for s in checkpoint.specs if s.name == name)
    parts = [values(checkpoint.read(name, a, b)) for a, b in leaves(shape)]
    return np.concatenate(parts).reshape(shape)


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_decodes_to_the_demo(name: str, tmp_path: Path) -> None:
    build, layout = VARIANTS[name]
    expected = variants.canonical()
    if name == "tied_head":
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    with open_checkpoint(build(tmp_path / "c")) as checkpoint:
        assert checkpoint.layout == layout
        assert {s.name for s in checkpoint.specs} == set(expected)
        for spec in checkpoint.specs:
            want = expected[spec.name]
            if checkpoint.scheme(spec.name).name == "f16":
                want = want.half().float()
            got = read_all(checkpoint, spec.name)
            assert got.shape == spec.shape == tuple(want.shape)
            np.testing.assert_array_equal(got, want.numpy(), err_msg=spec.name)


def test_mxfp4_agrees_with_transformers() -> None:
    """Against transformers' own dequantization, which gives [E, in, out] in bf16."""
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    stored = variants.demo_tensors()
    with open_checkpoint(DEMO) as checkpoint:
        for layer in (0, 3):
            p = f"model.layers.{layer}.mlp.experts."
            dense = {
                part: mxfp4.convert_moe_packed_tensors(
                    stored[f"{p}{part}_proj_blocks"], stored[f"{p}{part}_proj_scales"]
                ).float()
                for part in ("gate_up", "down")
            }
            want = {"gate": dense["gate_up"][..., 0::2], "up": dense["gate_up"][..., 1::2], "down": dense["down"]}
            for part, w in want.items():
                got = read_all(checkpoint, f"{p}{part}_proj.weight")
                np.testing.assert_array_equal(got, w.transpose(1, 2).numpy())


@pytest.mark.filterwarnings("ignore")
def test_what_transformers_saves_is_the_same_model(tmp_path: Path) -> None:
    """Loaded and dequantized by transformers, saved by it: floats, under the names of the blocks."""
    transformers = pytest.importorskip("transformers")
    quantization = transformers.Mxfp4Config(dequantize=True)
    model = transformers.GptOssForCausalLM.from_pretrained(DEMO, quantization_config=quantization, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    with open_checkpoint(tmp_path / "saved") as checkpoint, open_checkpoint(DEMO) as demo:
        assert checkpoint.layout == "hf-fused"
        assert checkpoint.config == demo.config
        for name, want in variants.canonical().items():
            np.testing.assert_array_equal(read_all(checkpoint, name), want.numpy(), err_msg=name)


def test_mxfp4_bits_are_moved_untouched() -> None:
    stored = variants.demo_tensors()
    p = "model.layers.2.mlp.experts."
    with open_checkpoint(DEMO) as checkpoint:
        q = checkpoint.read(p + "up_proj.weight", 3, 5)
    assert q.scheme.name == "mxfp4"
    assert q.data.shape == (2, 192, 96)
    assert q.scales is not None
    assert q.scales.shape == (2, 192, 6)
    np.testing.assert_array_equal(q.data, stored[p + "gate_up_proj_blocks"][3:5, 1::2].flatten(2).numpy())
    np.testing.assert_array_equal(q.scales, stored[p + "gate_up_proj_scales"][3:5, 1::2].numpy())


def test_released_and_original_give_equal_leaf_digests(tmp_path: Path) -> None:
    """The same model in another layout is the same numbers, byte for byte."""
    with open_checkpoint(DEMO) as a, open_checkpoint(variants.original_layout(tmp_path / "o")) as b:
        for spec in a.specs:
            for start, stop in leaves(spec.shape):
                x, y = a.read(spec.name, start, stop), b.read(spec.name, start, stop)
                assert x.leaf_digest() == y.leaf_digest(), spec.name


def test_off_grid_is_what_was_saved(tmp_path: Path) -> None:
    folder = variants.off_grid_bf16(tmp_path / "c")
    stored = {}
    for shard in folder.glob("*.safetensors"):
        stored.update(variants.load_file(shard))
    name = "model.layers.1.mlp.experts."
    with open_checkpoint(folder) as checkpoint:
        got = read_all(checkpoint, name + "gate_proj.weight")
        assert checkpoint.scheme(name + "gate_proj.weight").name == "bf16"
    want = stored[name + "gate_up_proj"][:, :, 0::2].transpose(1, 2).float()
    np.testing.assert_array_equal(got, want.numpy())


@pytest.mark.parametrize(("hidden", "ff"), [(64, 96), (64, 32), (32, 64), (64, 64)])
@pytest.mark.parametrize("rows_first", [False, True])
def test_orientation_follows_shape(hidden: int, ff: int, rows_first: bool, tmp_path: Path) -> None:
    """[E, in, out] or [E, out, in] by shape; a square tensor follows its partner."""
    e, h = 4, hidden
    config = {
        **variants.demo_config(),
        "num_hidden_layers": 1, "layer_types": ["full_attention"], "hidden_size": h,
        "intermediate_size": ff, "num_local_experts": e, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 50,
    }  # fmt: skip
    g = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(torch.bfloat16)

    p = "model.layers.0."
    tensors = {"model.embed_tokens.weight": rand(50, h), "lm_head.weight": rand(50, h)}
    tensors |= {"model.norm.weight": rand(h), p + "input_layernorm.weight": rand(h)}
    tensors |= {p + "post_attention_layernorm.weight": rand(h), p + "self_attn.sinks": rand(2)}
    for x, (n, k) in {"q": (32, h), "k": (16, h), "v": (16, h), "o": (h, 32)}.items():
        tensors |= {f"{p}self_attn.{x}_proj.weight": rand(n, k), f"{p}self_attn.{x}_proj.bias": rand(n)}
    tensors |= {p + "mlp.router.weight": rand(e, h), p + "mlp.router.bias": rand(e)}
    p += "mlp.experts."
    gate_up, down = rand(e, 2 * ff, h), rand(e, h, ff)  # [E, out, in]
    tensors |= {p + "gate_up_proj_bias": rand(e, 2 * ff), p + "down_proj_bias": rand(e, h)}
    for name, t in (("gate_up_proj", gate_up), ("down_proj", down)):
        tensors[p + name] = t.clone() if rows_first else t.transpose(1, 2).contiguous()
    folder = variants._write(tmp_path / "c", tensors, config)
    with open_checkpoint(folder) as checkpoint:
        np.testing.assert_array_equal(read_all(checkpoint, p + "up_proj.weight"), gate_up[:, 1::2].float())
        np.testing.assert_array_equal(read_all(checkpoint, p + "down_proj.weight"), down.float())


def test_original_folder_given_directly_finds_its_tokenizer(tmp_path: Path) -> None:
    folder = variants.original_layout(tmp_path / "o")
    for given in (folder, folder / "original"):
        with open_checkpoint(given) as checkpoint:
            assert checkpoint.tokenizer_file == folder / "tokenizer.json"
            assert checkpoint.chat_template
            assert checkpoint.config.rope.truncate is False


def test_both_config_spellings_are_one_model(tmp_path: Path) -> None:
    configs: list[ModelConfig] = []
    for rope in ("scaling", "parameters"):
        with open_checkpoint(variants.fused_bf16(tmp_path / rope, rope=rope)) as checkpoint:
            configs.append(checkpoint.config)
    assert configs[0] == configs[1]


def test_hub_cache_links_are_followed(tmp_path: Path) -> None:
    """snapshots/REVISION/file -> ../../blobs/HASH is how the Hub's cache looks."""
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / "abc123"
    (repo / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, f in enumerate(sorted(DEMO.iterdir())):
        shutil.copy(f, repo / "blobs" / f"{i:040x}")
        (snapshot / f.name).symlink_to(f"../../blobs/{i:040x}")
    with open_checkpoint(snapshot, repo="org/name", revision="abc123") as checkpoint:
        assert (checkpoint.repo, checkpoint.revision) == ("org/name", "abc123")
        assert checkpoint.tokenizer_file is not None
        read_all(checkpoint, "model.norm.weight")
    shard = snapshot / "model-00001-of-00002.safetensors"
    target = shard.resolve()
    target.rename(tmp_path / "outside")
    shard.unlink()
    shard.symlink_to(tmp_path / "outside")
    with pytest.raises(BadCheckpoint, match="outside the checkpoint's folder"):
        open_checkpoint(snapshot)


def test_threads_read_the_same_bytes(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(variants.per_expert(tmp_path / "c"))
    name = "model.layers.0.mlp.experts.gate_proj.weight"
    want = [checkpoint.read(name, e, e + 1).leaf_digest() for e in range(16)]
    wrong: list[int] = []

    def work(seed: int) -> None:
        order = [int(e) for e in np.random.default_rng(seed).permutation(16)]
        wrong.extend(e for e in order if checkpoint.read(name, e, e + 1).leaf_digest() != want[e])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    checkpoint.close()
    assert wrong == []
    assert checkpoint.read(name, 0, 1).leaf_digest() == want[0]  # opens again after close
    checkpoint.close()


def test_bounds_are_checked() -> None:
    with open_checkpoint(DEMO) as checkpoint:
        for start, stop in ((-1, 1), (0, 0), (3, 2), (0, 193)):
            with pytest.raises(ValueError, match=r"model\.norm\.weight"):
                checkpoint.read("model.norm.weight", start, stop)
