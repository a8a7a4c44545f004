"""The main job on the demo checkpoint and on every layout a checkpoint comes in."""

import hashlib
import json
import math

import pytest

from tests.conftest import DEMO, run_exporter
from tests.variants import VARIANTS, off_grid_bf16


def test_the_answer_is_complete(demo_run):
    answer = demo_run.done.json
    assert demo_run.done.err == ""
    (artifact,) = answer["artifacts"]
    assert artifact["status"] == "passed"
    assert artifact["digests_equal"] is True
    assert artifact["digests"] == {"tensors": 79, "equal": 79, "different": []}
    assert all(g["passed"] for g in artifact["gates"])
    assert artifact["tokenizer_equal"] is True
    metrics = artifact["metrics"]
    for key in ("kl_mean", "kl_p99", "top1", "ppl_ratio"):
        assert math.isfinite(metrics[key])
        assert math.isfinite(metrics["export"][key])
    # llama.cpp's rounded YaRN range is a property of the runtime, on a line of its own.
    assert 1e-4 < metrics["runtime"]["kl_mean"] < 1e-2
    assert metrics["export"]["kl_mean"] < metrics["kl_mean"]
    assert artifact["speed"]["decode_tokens_per_second"] > 0
    assert artifact["memory"]["peak_rss_bytes"] > artifact["bytes"]
    assert answer["peak_rss_bytes"] > 0


def test_the_folder_holds_one_runnable_thing(demo_run):
    names = sorted(p.name for p in demo_run.folder.iterdir())
    reports = ["report.html", "report.json", "report.md"]
    assert names == ["SHA256SUMS", "manifest.json", "provenance.json", *reports, "tiny-gpt-oss-mxfp4-q8.gguf"]
    for line in (demo_run.folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((demo_run.folder / name).read_bytes()).hexdigest() == digest
    manifest = json.loads((demo_run.folder / "manifest.json").read_text())
    assert manifest["tensors"]["model.layers.0.mlp.experts.up_proj.weight"]["method"] == "pass"
    assert set(manifest["source"]["files"]) >= {"config.json", "tokenizer.json", "model-00001-of-00002.safetensors"}


def test_experts_are_the_released_bits(demo_run, demo_checkpoint):
    """Nibbles and scales of the file, taken apart by hand, are those of the checkpoint."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(next(demo_run.folder.glob("*.gguf")))
    tensor = next(t for t in reader.tensors if t.name == "blk.2.ffn_up_exps.weight")
    blocks = tensor.data.reshape(16, 192, 6, 17)
    q = demo_checkpoint.read("model.layers.2.mlp.experts.up_proj.weight", 0, 16)
    assert np.array_equal(blocks[..., 0], q.scales)
    split = blocks[..., 1:]
    values = np.concatenate([split & 15, split >> 4], axis=-1).reshape(16, 192, 192)
    released = np.stack([q.data & 15, q.data >> 4], axis=-1).reshape(16, 192, 192)
    assert np.array_equal(values, released)


def without_identity(manifest):
    return {name: (t["digest"], t["scheme"]) for name, t in manifest["tensors"].items()}


@pytest.fixture(scope="module")
def demo_manifest(demo_run):
    return json.loads((demo_run.folder / "manifest.json").read_text())


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "demo"])
def test_every_layout_gives_the_same_experts(variant, demo_manifest, tmp_path):
    """Whatever a checkpoint was saved as, experts that lie on the MXFP4 grid come out with equal values."""
    from exporter.checkpoint import open_checkpoint
    from exporter.formats import get_format
    from exporter.numerics import decode

    build, _ = VARIANTS[variant]
    folder, out = build(tmp_path / "tiny-gpt-oss"), tmp_path / "out"
    done = run_exporter("quantize", "--profile", "24gb", folder, "--out", out, "--until", "export", "--json")
    assert done.code == 0, done.err
    (artifact,) = done.json["artifacts"]
    if "repacked" in artifact:
        assert artifact["repacked"]["exact_blocks"] == artifact["repacked"]["blocks"] > 0
    made = out / "tiny-gpt-oss" / "24gb" / "gguf-mxfp4-bf16"
    tensors = json.loads((made / "manifest.json").read_text())["tensors"]
    if "repacked" not in artifact:
        same = [n for n, t in tensors.items() if t["digest"] == demo_manifest["tensors"][n]["digest"]]
        assert len([n for n in same if ".experts." in n and n.endswith(".weight")]) == 12
        return
    fmt = get_format("gguf")
    name = "model.layers.1.mlp.experts.down_proj.weight"
    with open_checkpoint(folder) as checkpoint:
        spec = next(s for s in checkpoint.specs if s.name == name)
        want = decode.values(checkpoint.read(name, 0, 16))
    from exporter.types import Scheme
    from exporter.types.recipe import Step

    step = Step(spec, "repack", Scheme.parse("bf16"), Scheme.parse("mxfp4"))
    import numpy as np

    assert np.array_equal(decode.values(fmt.unpack(step, [bytes_of_one(made, fmt, step)])), want)


def bytes_of_one(folder, fmt, step):
    """The bytes of one tensor of a finished GGUF."""
    import numpy as np

    from exporter.formats.gguf import file

    gguf = file.read_gguf(next(folder.glob("*.gguf")))
    target = fmt.target(step)
    found = next(t for t in gguf.tensors if t.name == target.name)
    return np.fromfile(gguf.path, np.uint8, target.nbytes, offset=gguf.data_start + found.offset)


def test_off_the_grid_is_rounded_and_said(tmp_path):
    folder = off_grid_bf16(tmp_path / "tuned")
    done = run_exporter("quantize", "-p", "24gb", folder, "--out", tmp_path / "out", "--until", "export", "--json")
    assert done.code == 0, done.err
    repacked = done.json["artifacts"][0]["repacked"]
    assert repacked["exact_blocks"] < repacked["blocks"]
    manifest = json.loads(next((tmp_path / "out").rglob("manifest.json")).read_text())
    entry = manifest["tensors"]["model.layers.0.mlp.experts.gate_proj.weight"]
    assert (entry["method"], entry["scale_rule"]) == ("repack", "mse")


@pytest.mark.slow
def test_splits_are_one_model_to_llama_cpp(tmp_path):
    """A profile that splits at 1 MB: several files, one artifact, still proven."""
    from exporter.pipeline.profiles import source_text

    profile = tmp_path / "split.toml"
    profile.write_text(source_text("16gb").replace('split_size = "45G"', 'split_size = "1M"'))
    done = run_exporter("quantize", "-p", profile, DEMO, "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    (artifact,) = done.json["artifacts"]
    folder = tmp_path / "out" / "tiny-gpt-oss" / "split" / "gguf-mxfp4-q8"
    names = sorted(p.name for p in folder.glob("*.gguf"))
    assert len(names) > 4
    assert names[0] == f"tiny-gpt-oss-mxfp4-q8-00001-of-{len(names):05d}.gguf"
    assert max(p.stat().st_size for p in folder.glob("*.gguf")) < 1.1e6
    assert artifact["digests_equal"] is True


@pytest.mark.slow
def test_the_structure_twin_separates_export_from_quantization(tmp_path):
    """All in float32, the file differs from the runtime's own arithmetic by the runtime's noise alone."""
    done = run_exporter("quantize", "-p", "16gb", DEMO, "--recipe", "f32", "--out", tmp_path, "--json")
    assert done.code == 0, done.err
    metrics = done.json["artifacts"][0]["metrics"]
    assert metrics["export"]["kl_mean"] < 3e-4
    assert metrics["export"]["top1"] > 0.99


def test_a_gate_that_fails_is_exit_code_3_and_said(tmp_path):
    from exporter.pipeline.profiles import source_text

    profile = tmp_path / "strict.toml"
    profile.write_text(source_text("16gb").replace("release_kl_mean = 0.01", "release_kl_mean = 0.000001"))
    done = run_exporter("quantize", "-p", profile, DEMO, "--out", tmp_path / "out")
    assert done.code == 3
    assert "FAIL release_kl_mean" in done.out.replace("\n", " ")


def test_a_flipped_bit_in_the_artifact_is_found(tmp_path):
    arguments = ["quantize", "-p", "16gb", DEMO, "--out", tmp_path, "--json"]
    assert run_exporter(*arguments, "--until", "export").code == 0
    path = next(tmp_path.rglob("*.gguf"))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    path.write_bytes(raw)
    done = run_exporter(*arguments)
    assert done.code == 3
    (artifact,) = done.json["artifacts"]
    assert artifact["digests_equal"] is False
    assert len(artifact["digests"]["different"]) == 1


def test_two_runs_give_the_same_bytes(demo_run, tmp_path):
    done = run_exporter(
        "quantize",
        "-p",
        "16gb",
        DEMO,
        "--out",
        tmp_path,
        "--until",
        "export",
        "--max-memory",
        "1G",
    )
    assert done.code == 0
    name = "tiny-gpt-oss-mxfp4-q8.gguf"
    assert next(tmp_path.rglob(name)).read_bytes() == (demo_run.folder / name).read_bytes()
