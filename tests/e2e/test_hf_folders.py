"""Hugging Face folders through the main job: proved, split, damaged, killed."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys

import pytest
from safetensors import safe_open

from exporter.pipeline.manifest import provenance
from exporter.pipeline.profiles import source_text
from exporter.pipeline.progress import Progress
from exporter.pipeline.prove import as_laid_out, check_digests
from exporter.pipeline.request import RunRequest
from exporter.pipeline.run import Run
from tests.conftest import DEMO, run_exporter
from tests.e2e.test_kill import COUNTED
from tests.oracle.test_hf_folders import RECIPES

# Each with its recipe: the released layout holds what was released, and none of it changes.
RECIPE_OF = {"gptq": "int4", "compressed-tensors": "int4", "mxfp4": "mxfp4-bf16"}
FORMATS = tuple(RECIPE_OF)


def profile(folder, fmt, target="", split="45G"):
    """A profile of one artifact, with limits that INT4 by rounding meets."""
    recipe = RECIPE_OF[fmt]
    if recipe in RECIPES:
        (folder / f"{recipe}.toml").write_text(RECIPES[recipe])
        recipe = str(folder / f"{recipe}.toml")
    text = source_text("16gb").split("[gates]")[0].replace('"mxfp4-q8"', json.dumps(recipe))
    text = text.replace('"gguf"', f'"{fmt}"\ntarget = "{target}"').replace('"45G"', f'"{split}"')
    path = folder / f"{fmt}.toml"
    path.write_text(
        text + "[gates]\ndigests_equal = true\nhead_equal = true\ntokenizer_equal = true\nrelease_kl_mean = 0.05\n"
    )
    return path


def quantize(path, out, *more):
    return run_exporter("quantize", "-p", path, DEMO, "--out", out, "--json", *more)


def job(path, out):
    """The same job in this process, exported."""
    run = Run(RunRequest(str(DEMO), str(path), out=out, until="export"), Progress())
    (result,) = run.run().artifacts
    return run, result


def judged(path, out):
    """Of an artifact that is there: the gates that look at its bytes alone."""
    run, result = job(path, out)
    expected = {
        name: t["digest"] for name, t in json.loads((result.path / "manifest.json").read_text())["tensors"].items()
    }
    artifact = result.plan
    layouts = artifact.format.layout(run.maker.job(artifact, provenance(run.model, artifact, expected)))
    digests = check_digests(result.path, artifact.format, artifact.steps, expected, 1, Progress())
    return {
        "digests_equal": not digests["different"],
        "head_equal": all(as_laid_out(result.path / each.filename, each) for each in layouts),
    }


@pytest.fixture(scope="module", params=FORMATS)
def proved(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("proved")
    done = quantize(profile(root, request.param), root / "out")
    assert done.code == 0, done.err
    return root, request.param, done.json["artifacts"][0]


def folder_of(root, fmt):
    return root / "out" / "tiny-gpt-oss" / fmt / f"{fmt}-{RECIPE_OF[fmt]}"


def test_the_folder_is_proved_by_our_own_forward(proved):
    root, fmt, artifact = proved
    assert artifact["status"] == "passed"
    assert artifact["digests"] == {"tensors": 79, "equal": 79, "different": []}
    assert artifact["runtime"]["name"] == "exporter reference"
    assert "speed" not in artifact
    assert "runtime" not in artifact["metrics"]
    lost = artifact["metrics"]["kl_mean"]
    assert lost == artifact["metrics"]["export"]["kl_mean"]
    assert abs(lost) < 1e-12 if fmt == "mxfp4" else 0.01 < lost < 0.05
    folder = folder_of(root, fmt)
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "special_tokens_map.json"):
        assert (folder / name).read_bytes() == (DEMO / name).read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    with safe_open(folder / "model.safetensors", "np") as tensors:
        facts = tensors.metadata()
    assert facts["exporter.digest"] == manifest["digest"]
    digests = dict(line.split(" ") for line in facts["exporter.tensor_digests"].splitlines())
    assert digests == {name: t["digest"] for name, t in manifest["tensors"].items()}


def test_it_says_what_was_not_run(proved):
    root, fmt, _ = proved
    if fmt == "gptq":
        done = run_exporter("quantize", "-p", root / f"{fmt}.toml", DEMO, "--out", root / "out")
        assert done.code == 0
        assert "not run" in done.out
        assert "llama.cpp" not in done.out
    report = json.loads((folder_of(root, fmt) / "report.json").read_text())
    assert not {"speed", "memory", "runtime_difference"} & set(report)


def test_splits_hold_the_same_tensors(proved, tmp_path):
    root, fmt, _ = proved
    _, result = job(profile(tmp_path, fmt, split="1500K"), tmp_path / "out")
    index = json.loads((result.path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    whole, split, total = safetensors(folder_of(root, fmt) / "model.safetensors"), {}, 0
    for name in files:
        for key, value in safetensors(result.path / name).items():
            assert index["weight_map"][key] == name
            split[key] = value
            total += value[1]
    assert split == whole
    assert index["metadata"]["total_size"] == total
    located = result.plan.format.locate(result.path, result.plan.steps)
    assert {place.path.name for place in located.values()} == set(files)


def safetensors(path):
    """(type, size, digest of the bytes) by name."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__")
    found = {}
    for name, entry in header.items():
        first, last = (start + at for at in entry["data_offsets"])
        found[name] = (entry["dtype"], last - first, hashlib.sha256(raw[first:last]).hexdigest())
    return found


DAMAGES = {
    "gptq": {"qweight": "digests_equal", "scales": "digests_equal", "qzeros": "head_equal", "g_idx": "head_equal"},
    "compressed-tensors": {
        "weight_packed": "digests_equal",
        "weight_scale": "digests_equal",
        "weight_shape": "head_equal",
    },
    "mxfp4": {"blocks": "digests_equal", "scales": "digests_equal", "bias": "digests_equal"},
}


def stored_name(fmt, what):
    if fmt == "mxfp4":
        return f"model.layers.2.mlp.experts.gate_up_proj_{what}"
    return f"model.layers.2.mlp.experts.7.up_proj.{what}"


def test_a_flipped_bit_is_found_wherever_it_is(proved, tmp_path):
    root, fmt, _ = proved
    shutil.copytree(root / "out", tmp_path / "out")
    file = folder_of(tmp_path, fmt) / "model.safetensors"
    whole = file.read_bytes()
    assert judged(root / f"{fmt}.toml", tmp_path / "out") == {"digests_equal": True, "head_equal": True}
    n = int.from_bytes(whole[:8], "little")
    for what, gate in DAMAGES[fmt].items():
        raw = bytearray(whole)
        entry = json.loads(raw[8 : 8 + n])[stored_name(fmt, what)]
        raw[8 + n + entry["data_offsets"][0] + 5] ^= 1
        file.write_bytes(raw)
        assert [name for name, good in judged(root / f"{fmt}.toml", tmp_path / "out").items() if not good] == [gate]


@pytest.mark.slow
def test_an_edited_config_is_found(proved, tmp_path):
    root, fmt, _ = proved
    shutil.copytree(root / "out", tmp_path / "out")
    config = folder_of(tmp_path, fmt) / "config.json"
    edited = config.read_text().replace('"group_size": 32', '"group_size": 64')
    config.write_text(edited.replace('"quant_method": "mxfp4"', '"quant_method": "mxfp8"'))
    assert judged(root / f"{fmt}.toml", tmp_path / "out") == {"digests_equal": True, "head_equal": False}
    if fmt == "gptq":
        done = quantize(root / f"{fmt}.toml", tmp_path / "out")
        assert done.code == 3
        gates = done.json["artifacts"][0]["gates"]
        assert [g["name"] for g in gates if not g["passed"]] == ["head_equal"]


@pytest.mark.parametrize(("fmt", "share"), [("gptq", 0.3), ("gptq", 0.9), ("mxfp4", 0.6)])
def test_killed_and_resumed_gives_the_same_bytes(fmt, share, tmp_path):
    """Gate and up rows share bytes of a page here: what one leaf wrote must survive the death of the other."""
    path = profile(tmp_path, fmt)

    def killed_at(event, out):
        arguments = ["quantize", "-p", str(path), str(DEMO), "--out", str(out), "--until", "export"]
        command = [sys.executable, "-c", COUNTED, str(event), str(tmp_path / "events"), *arguments]
        return subprocess.run(command, capture_output=True, check=False).returncode

    assert killed_at(0, tmp_path / "whole") == 0
    events = int((tmp_path / "events").read_text())
    assert killed_at(int(events * share), tmp_path / "out") == -signal.SIGKILL
    done = quantize(path, tmp_path / "out", "--until", "export")
    assert done.code == 0, done.err
    whole = tmp_path / "whole" / "tiny-gpt-oss" / fmt / f"{fmt}-{RECIPE_OF[fmt]}"
    for each in whole.iterdir():
        assert (folder_of(tmp_path, fmt) / each.name).read_bytes() == each.read_bytes(), each.name


def test_an_unknown_target_is_refused_before_any_work(tmp_path):
    done = quantize(profile(tmp_path, "gptq", target="gptq-model"), tmp_path / "out")
    assert done.code == 2
    assert 'Did you mean "gptqmodel"' in done.json["message"]
