"""ONNX artifacts by the real commands: proved, hashed, killed and resumed, and exported from a finished store."""

import hashlib
import json
import signal
import subprocess
import sys

import pytest

from tests.conftest import DEMO, run_exporter
from tests.e2e.test_bad_input import one_clear_line
from tests.e2e.test_kill import COUNTED

RECIPE = """
title = "INT4 experts, one layer of them calibrated"
[calibration]
windows = 2
length = 64
[gates]
export_kl_mean = 0.05
export_top1 = 0.8
release_kl_mean = 0.05
release_top1 = 0.8
ppl_ratio = 1.1
long_kl_mean = 0.07
router_flips = 0.25
genai_kl_mean = 0.05
cached_kl_mean = 0.05
conversations_kl_mean = 0.06
[[rule]]
match = "model.layers.1.mlp.experts.*_proj.weight"
method = "gptq"
scheme = "int4-g32"
[[rule]]
match = "*.mlp.experts.*_proj.weight"
method = "rtn"
scheme = "int4-g32"
[[rule]]
match = ["*.self_attn.*_proj.weight", "lm_head.weight"]
method = "rtn"
scheme = "int8-g32"
[[rule]]
match = "*"
method = "keep"
"""
NO_TORCH = """
import sys
sys.modules["torch"] = None
from exporter.cli import main
main(sys.argv[1:])
"""

UNSEALED = ("SHA256SUMS", "report.json", "report.md", "report.html")


def contents(folder):
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def made_in(out, name):
    return out / "tiny-gpt-oss" / ("24gb" if name.endswith("-cuda") else "16gb") / name


def request(out, *more, profile="16gb"):
    return ["--profile", profile, str(DEMO), "--format", "onnx", "--out", str(out), *map(str, more)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "int4.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def proved(recipe, tmp_path_factory):
    """(out, answer) of the whole job for two kinds of device."""
    out = tmp_path_factory.mktemp("proved")
    more = ("--recipe", recipe, "--target", "cpu", "--target", "webgpu", "--json")
    done = run_exporter("quantize", *request(out, *more), timeout=300)
    assert done.code == 0, done.err + done.out
    return out, done.json


def test_artifacts_of_one_store_are_proved_for_each_target(proved):
    out, answer = proved
    assert [a["target"] for a in answer["artifacts"]] == ["cpu", "webgpu"]
    for each in answer["artifacts"]:
        assert each["status"] == "passed"
        assert each["digests"] == {"tensors": 79, "equal": 79, "different": []}
        assert each["speed"]["decode_tokens_per_second"] > 0
        assert each["memory"]["peak_rss_bytes"] > 0
        assert {"export", "cached", "router", "genai"} <= set(each["metrics"])
    assert len(list(out.rglob("data.bin"))) == 1


def test_every_file_is_hashed_by_its_name_in_the_folder(proved):
    for target, graph in (("cpu", "model.onnx"), ("webgpu", "onnx/model_q4f16.onnx")):
        folder = made_in(proved[0], f"onnx-int4-{target}")
        lines = (folder / "SHA256SUMS").read_text().splitlines()
        sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
        found = contents(folder)
        assert graph in sums
        assert sums == {name: found[name] for name in found if name not in UNSEALED}
        manifest = json.loads((folder / "manifest.json").read_text())
        assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == {
            name: digest for name, digest in sums.items() if name not in ("manifest.json", "provenance.json")
        }


def test_export_needs_neither_torch_nor_the_calibration_text(proved, recipe, tmp_path):
    """From the store of the whole job, the other target: the same numbers, whatever they were calibrated on."""
    out = proved[0]
    more = ("--recipe", recipe, "--target", "webgpu", "--json")
    command = [sys.executable, "-c", NO_TORCH, "export", *request(out, *more)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["artifacts"]
    assert (row["status"], row["target"]) == ("exported", "webgpu")
    manifests = [json.loads((made_in(out, f"onnx-int4-{t}") / "manifest.json").read_text()) for t in ("cpu", "webgpu")]
    assert manifests[0]["digest"] == manifests[1]["digest"]
    assert manifests[0]["calibration"] == manifests[1]["calibration"]
    assert manifests[1]["calibration"]["windows"] == 2


def test_export_names_the_command_that_fills_the_store(tmp_path):
    out = tmp_path / "out"
    more = ("--recipe", "exact-q8", "--target", "cpu")
    done = run_exporter("export", *request(out, *more))
    assert one_clear_line(done, 4, "the store of recipe exact-q8 for tiny-gpt-oss is not complete", "--until quantize")
    words = done.err.split("hint: first: exporter ")[1].split()
    assert run_exporter(*words).code == 0
    assert run_exporter("export", *request(out, *more)).code == 0
    data = next((out / "tiny-gpt-oss" / "store").glob("exact-q8-*")) / "data.bin"
    assert data.stat().st_size < 3_000_000  # experts are not in it
    whole = tmp_path / "whole"
    assert run_exporter("quantize", *request(whole, *more, "--until", "export")).code == 0
    assert contents(made_in(out, "onnx-exact-q8-cpu")) == contents(made_in(whole, "onnx-exact-q8-cpu"))
    journal = data.with_name("journal.jsonl")
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-1]))
    done = run_exporter("export", *request(out, *more, "--overwrite"))
    assert one_clear_line(done, 4, "is not complete", "--until quantize")


# Killed


def killed_at(event, out, tmp_path, target):
    command = [sys.executable, "-c", COUNTED, str(event), str(tmp_path / "events"), "quantize"]
    # One worker: the same event then means the same moment in every run. Bytes that FP4 rows share among them.
    more = ("--recipe", "mxfp4-q8" if target == "cuda" else "exact-bf16", "--target", target)
    more += ("--until", "export", "--max-memory", "320M")
    profile = "24gb" if target == "cuda" else "16gb"
    asked = request(out, *more, profile=profile)
    return subprocess.run([*command, *asked], capture_output=True, check=False).returncode


@pytest.fixture(scope="module", params=["cuda", "cpu"])
def uninterrupted(request, tmp_path_factory):
    """(target, folder's name, contents, number of events on the disk) of a run that nobody disturbed."""
    tmp = tmp_path_factory.mktemp("whole")
    assert killed_at(0, tmp / "out", tmp, request.param) == 0
    name = {"cuda": "onnx-mxfp4-q8-cuda", "cpu": "onnx-exact-bf16-cpu"}[request.param]
    return request.param, name, contents(made_in(tmp / "out", name)), int((tmp / "events").read_text())


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.99])
def test_killed_and_resumed_gives_the_same_bytes(share, uninterrupted, tmp_path):
    target, name, whole, events = uninterrupted
    out = tmp_path / "out"
    assert killed_at(int(share * events), out, tmp_path, target) == -signal.SIGKILL
    assert killed_at(0, out, tmp_path, target) == 0
    assert contents(made_in(out, name)) == whole
    assert not list(out.rglob("*.partial"))


# Asked for


def test_the_plan_says_what_is_made_on_request():
    done = run_exporter("plan", "--profile", "16gb", DEMO, "--json")
    assert [a["format"] for a in done.json["artifacts"]] == ["gguf"]
    assert [a["target"] for a in done.json["on_request"]] == ["cpu", "webgpu", "", "sm120", "sm80"]
    done = run_exporter("plan", "--profile", "16gb", DEMO, "--format", "onnx", "--target", "cpu", "--json")
    assert [(a["format"], a["target"]) for a in done.json["artifacts"]] == [("onnx", "cpu")]
    assert done.json["on_request"] == []


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--format", "onnx", "--target", "webgp"), 'Did you mean "webgpu"?'),
        (("--target", "cpu"), "hint: --format onnx --target cpu"),
        (("--format", "onnx", "--recipe", "mxfp4-q8", "--target", "cpu"), "only CUDA computes with FP4 experts"),
    ],
)
def test_what_cannot_be_made_is_one_line(more, words):
    done = run_exporter("plan", "--profile", "16gb", DEMO, *more)
    assert one_clear_line(done, 4 if "recipe" in str(more) else 2, words)
