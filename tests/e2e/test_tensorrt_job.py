"""TensorRT artifacts by the real command: proved without a GPU, with engines and without, and every way to fail."""

import hashlib
import json
import os
import subprocess
import sys

import onnx
import pytest

from exporter.formats import get_format
from tests import variants
from tests.conftest import DEMO, Done, run_exporter
from tests.e2e.test_bad_input import one_clear_line

pytest.importorskip("onnxruntime")

ENGINES = {"engines_built", "engines_expansion", "engines_fused"}
NO_GPU = {"PATH": ""}  # where nvidia-smi is looked for
# Quick: one window, and no text beyond the length that the rope was made for.
PROFILE = """
title = "quick"
model = "openai/gpt-oss-20b"
[hardware]
device = "gpu"
memory = "8GiB"
reserve = "1GiB"
context = 1024
ubatch = 512
runtime = "0.2GiB"
{artifacts}
[validate]
windows = 1
length = 132
[gates]
digests_equal = true
head_equal = true
tokenizer_equal = true
export_kl_mean = 0.005
release_kl_mean = 0.01
"""
ARTIFACT = '[[artifact]]\nformat = "{}"\nrecipe = "{}"\ntarget = "{}"\n'
INT4 = """
title = "4-bit integers, rounded to the nearest"
[gates]
export_kl_mean = 0.5
release_kl_mean = 0.5
cached_kl_mean = 0.5
router_flips = 0.5
[[rule]]
match = ["*.mlp.experts.*_proj.weight", "*.self_attn.*_proj.weight"]
method = "rtn"
scheme = "int4-g32"
[[rule]]
match = "model.embed_tokens.weight"
method = "rtn"
scheme = "int8-g32"
[[rule]]
match = "*"
method = "keep"
"""
# Programs that change one thing before the command runs.
MAIN = "from exporter.cli import main\nmain(sys.argv[1:])\n"
WITHOUT_TENSORRT = "import sys\nsys.modules['tensorrt_rtx'] = None\n"
ANOTHER_TENSORRT = """
import sys
from importlib import metadata
version = metadata.version
metadata.version = lambda name: "1.8.0.5" if name == "tensorrt_rtx_cu13" else version(name)
"""
NO_MEMORY = "import sys\nfrom exporter.pipeline import prove_tensorrt\nprove_tensorrt._SHARE = 1e-3\n"
TOO_LARGE = "import sys\nfrom exporter.pipeline import prove_tensorrt\nprove_tensorrt._WHOLE = 0\n"
FLOAT32_ON_TURING = """
from exporter.formats import tensorrt
from exporter.formats.tensorrt.targets import Target
tensorrt.TARGETS["sm75"] = Target("sm75", 75, "float")
"""


def run_changed(program, *arguments):
    command = [sys.executable, "-c", program + MAIN, *map(str, arguments)]
    environment = {**os.environ, **NO_GPU}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The demo for 4,096 tokens."""
    folder = variants.copy(tmp_path_factory.mktemp("short") / "model")
    variants.edit_json(folder / "config.json", lambda config: config.update(max_position_embeddings=4096))
    return folder


def request(model, root, *artifacts, until="validate"):
    """Arguments of `quantize` for a profile of these artifacts."""
    profile = root / "quick.toml"
    profile.write_text(PROFILE.format(artifacts="".join(ARTIFACT.format(*each) for each in artifacts)))
    return ["quantize", model, "-p", profile, "--out", root / "out", "--until", until, "--json"]


def gate_names(artifact, passed):
    return {g["name"] for g in artifact["gates"] if g["passed"] is passed}


def report_of(artifact):
    with open(f"{artifact['path']}/report.json") as f:
        return json.load(f)


# Proved


@pytest.fixture(scope="module")
def proved(tmp_path_factory):
    """(answer, report, folder) of the 16 GB profile's artifact for RTX 50."""
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path_factory.mktemp("proved")
    more = ("--format", "tensorrt", "--target", "sm120", "--json")
    done = run_exporter("quantize", "--profile", "16gb", DEMO, *more, "--out", out, env=NO_GPU, timeout=300)
    assert done.code == 0, done.err + done.out
    (artifact,) = done.json["artifacts"]
    folder = out / "tiny-gpt-oss" / "16gb" / "tensorrt-mxfp4-embed8-sm120"
    assert artifact["path"] == str(folder)
    return artifact, report_of(artifact), folder


def test_every_gate_is_measured_and_passed(proved):
    artifact, report, _ = proved
    assert artifact["status"] == report["status"] == "passed"
    assert artifact["digests"] == {"tensors": 79, "equal": 79, "different": []}
    assert set(get_format("tensorrt").gates) - {"gpu_kl_mean"} <= gate_names(report, True)
    assert gate_names(report, False) == set()


def test_the_graphs_compute_the_model(proved):
    _, report, _ = proved
    assert report["arithmetic"]["kl_mean"] < 1e-10
    assert report["arithmetic"]["top1"] == 1
    assert 1e-6 < report["release"]["kl_mean"] < 5e-3  # 8-bit embeddings, and float16
    assert report["cached"]["crosses_window"] is True
    assert report["cached"]["logit_difference"] < 1e-4
    assert report["long"]["release"]["positions"] == 256
    assert report["optimizer"]["export"]["relative_difference"] < 1e-5
    assert report["optimizer"]["release"]["relative_difference"] < 0.005
    assert report["rules"] == {"kept": True, "findings": []}
    assert report["depth"] == {"layers": 4, "of": 4}


def test_engines_are_built_for_every_gpu_of_the_target(proved):
    _, report, _ = proved
    engines = report["engines"]
    assert [(b["graph"], b["sm"]) for b in engines["builds"]] == [
        (graph, sm) for graph in ("decode", "prefill") for sm in (120, 121)
    ]
    assert (engines["built"], engines["expansion"], engines["fused"]) == (True, 0, True)
    for build in engines["builds"]:
        assert build["fused_attention"] == 4
        assert build["constants"]["fp4_e2m1"] == 4 * 16 * 3 * 192 * 192 // 2
        assert build["packed_bytes"] < build["engine_bytes"] < 1.2 * build["packed_bytes"]
    assert engines["peak_rss_bytes"] > 100e6


def test_an_engine_holds_the_bytes_that_were_planned(proved):
    _, report, _ = proved
    tables = 131072 * 64 * 4  # cosines and sines
    planned = report["predicted_memory"]["weights"] + tables
    for build in report["engines"]["builds"]:
        assert sum(build["constants"].values()) == pytest.approx(planned, rel=0.01)


def test_what_did_not_run_is_said(proved):
    _, report, _ = proved
    assert report["not_run"]["gpu"] == "no engine was executed: there is no NVIDIA GPU here"
    assert set(report["not_run"]) == {"gpu", "generation.length_difference"}
    assert (report["runtime"]["executed_on_gpu"], report["runtime"]["executed_on_target"]) == (False, False)
    assert not {"speed", "gpu"} & set(report)


def test_the_folder_has_what_a_person_needs(proved):
    _, _, folder = proved
    profiles = json.loads((folder / "profiles.json").read_text())
    assert (profiles["sms"], profiles["context"]) == ([120, 121], 8192)
    text = (folder / "README.md").read_text()
    assert "For 8,192 tokens in all" in text
    assert text.count("tensorrt_rtx --onnx=") == 2
    assert '"executed_on_gpu": true' in text
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    assert {"decode.onnx", "prefill.onnx", "weights.data", "profiles.json", "tokenizer.json"} <= set(sums)
    for name in ("decode.onnx", "weights.data"):
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == sums[name]


def is_of_the_first_layers(report):
    assert report["depth"] == {"layers": 2, "of": 4}
    assert report["not_run"]["depth"].startswith("graphs and engines of 2 of 4 layers; KL and top-1 are of our own")
    assert report["arithmetic"]["kl_mean"] < 1e-10
    assert (report["cached"]["prefill"], report["cached"]["steps"]) == (126, 4)
    assert report["cached"]["crosses_window"] is True
    assert report["router"]["choices"] == 2 * report["arithmetic"]["positions"]
    # All layers, in our own forward: the weights are the release's.
    assert report["export"]["kl_max"] < 1e-9
    assert report["export"]["positions"] == 132
    return True


@pytest.mark.slow
def test_a_model_that_is_too_large_is_proved_by_its_first_layers(model, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    done = run_changed(TOO_LARGE, *request(model, tmp_path, ("tensorrt", "mxfp4-bf16", "sm120")))
    assert done.code == 0, done.err
    report = report_of(done.json["artifacts"][0])
    assert is_of_the_first_layers(report)
    assert report["cached"]["logit_difference"] < 1e-4
    engines = report["engines"]
    assert (engines["layers"], engines["vocabulary"], engines["built"], engines["fused"]) == (2, 2048, True, True)
    assert {b["fused_attention"] for b in engines["builds"]} == {2}
    assert set(get_format("tensorrt").gates) - {"gpu_kl_mean", "long_kl_mean"} <= gate_names(report, True)


# Without TensorRT-RTX, with another, and where engines do not build


@pytest.fixture(scope="module")
def unbuilt(model, tmp_path_factory):
    """(arguments, answer) of a job where TensorRT-RTX is not installed."""
    arguments = request(model, tmp_path_factory.mktemp("unbuilt"), ("tensorrt", "mxfp4-bf16", "sm120"))
    done = run_changed(WITHOUT_TENSORRT, *arguments)
    assert done.code == 0, done.err
    return arguments, done.json["artifacts"][0]


@pytest.mark.slow
def test_without_tensorrt_the_rest_is_proved_and_it_says_so(unbuilt):
    artifact = unbuilt[1]
    report = report_of(artifact)
    assert artifact["status"] == report["status"] == "passed"
    assert not {"engines", "gpu"} & set(report)
    wanted = "no engine was built: building engines needs tensorrt_rtx_cu13, which is not installed"
    assert report["not_run"]["engines"] == f"{wanted} (pip install 'exporter[tensorrt]')"
    assert report["not_run"]["gpu"] == "no engine was executed: none was built"
    assert report["not_run"]["long"].startswith("the model takes no more than the 4,096 tokens")
    gates = gate_names(report, True)
    assert not gates & ENGINES
    assert {"parser_rules_kept", "arithmetic_kl_mean", "optimizer_difference", "cached_difference"} <= gates


def test_a_window_that_is_wrong_in_decoding_alone_fails_its_gate(unbuilt):
    """Where only a few tokens are decoded, in the first layers, as of a model that is too large to run whole."""
    arguments, artifact = unbuilt
    path = f"{artifact['path']}/decode.onnx"
    model = onnx.load(path, load_external_data=False)
    (window,) = (t for t in model.graph.initializer if t.name == "int64_128")
    window.raw_data = (127).to_bytes(8, "little")
    with open(path, "wb") as f:
        f.write(model.SerializeToString())
    done = run_changed(WITHOUT_TENSORRT + TOO_LARGE, *arguments)
    assert done.code == 3, done.err
    report = report_of(artifact)
    assert is_of_the_first_layers(report)
    assert gate_names(report, False) == {"head_equal", "cached_difference"}


def test_a_machine_without_the_memory_for_it_leaves_the_graphs_out(model, tmp_path):
    no_room = "prove_tensorrt._COPIES = 10**9\n"
    done = run_changed(
        WITHOUT_TENSORRT + TOO_LARGE + no_room, *request(model, tmp_path, ("tensorrt", "mxfp4-bf16", "sm120"))
    )
    assert done.code == 0, done.err
    report = report_of(done.json["artifacts"][0])
    assert not {"arithmetic", "cached", "optimizer"} & set(report)
    assert "of memory for a layer's experts" in report["not_run"]["arithmetic"]
    assert report["not_run"]["depth"].startswith("engines of 2 of 4 layers")
    assert report["export"]["kl_max"] < 1e-9
    assert {"parser_rules_kept", "export_kl_mean", "digests_equal"} <= gate_names(report, True)


@pytest.mark.slow
def test_without_tensorrt_the_parsers_rules_decide(model, tmp_path):
    """A graph that no builder would take for Turing: experts chosen in float32."""
    arguments = request(model, tmp_path, ("tensorrt", "f32", "sm75"))
    done = run_changed(WITHOUT_TENSORRT + TOO_LARGE + FLOAT32_ON_TURING, *arguments)
    assert done.code == 3, done.err
    (artifact,) = done.json["artifacts"]
    report = report_of(artifact)
    assert artifact["status"] == "gate failed"
    assert gate_names(report, False) == {"parser_rules_kept"}
    found = report["rules"]["findings"]
    assert {f["graph"] for f in found} == {"decode", "prefill"}
    assert {tuple(f["sms"]) for f in found} == {(75,)}
    assert any("router/Gemm" in f["where"] for f in found)


def test_another_tensorrt_is_refused_before_any_work(model, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    done = run_changed(ANOTHER_TENSORRT, *request(model, tmp_path, ("tensorrt", "mxfp4-bf16", "sm120")))
    words = ("TensorRT-RTX 1.8.0.5 is installed; exporter reads the engines of 1.7", "pip install 'tensorrt_rtx_cu13")
    assert one_clear_line(done, 4, *words)
    assert not (tmp_path / "out").exists()
    # It is a proof's alone to ask for.
    arguments = request(model, tmp_path, ("tensorrt", "mxfp4-bf16", "sm120"), until="export")
    assert run_changed(ANOTHER_TENSORRT, *arguments).code == 0


@pytest.mark.slow
def test_engines_that_do_not_build_fail_their_gates_alone(model, tmp_path):
    """Two artifacts, and a limit of memory that no build keeps."""
    pytest.importorskip("tensorrt_rtx")
    arguments = request(model, tmp_path, ("tensorrt", "mxfp4-bf16", "sm120"), ("mxfp4", "mxfp4-bf16", ""))
    done = run_changed(TOO_LARGE + NO_MEMORY, *arguments)
    assert done.code == 3, done.err
    tensorrt, folder = done.json["artifacts"]
    assert (tensorrt["status"], folder["status"]) == ("gate failed", "passed")
    report = report_of(tensorrt)
    assert gate_names(report, False) == ENGINES
    assert {"arithmetic_kl_mean", "parser_rules_kept", "digests_equal"} <= gate_names(report, True)
    engines = report["engines"]
    assert (engines["built"], engines["expansion"], engines["fused"]) == (False, None, False)
    for build in engines["builds"]:
        assert f"{build['graph']}.onnx for SM{build['sm']} used more than" in build["error"]


# Asked for


def test_the_plan_fits_the_released_model():
    done = run_exporter("plan", "--profile", "16gb", "--format", "tensorrt", "openai/gpt-oss-20b", "--json")
    assert done.code == 0, done.err
    found = {a["target"]: a for a in done.json["artifacts"]}
    assert list(found) == ["sm120", "sm80"]
    for target, artifact in found.items():
        assert artifact["fit"]["fits"] is True
        assert next(v["device"] for v in artifact["hardware"] if not v["refusal"]) == target.upper()
    assert done.json["on_request"] == []
    table = run_exporter("plan", "--profile", "16gb", "--format", "tensorrt", "openai/gpt-oss-20b").out
    assert "made for SM120 and later" in table
    assert "GeForce RTX 50" in table


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (("--target", "sm12"), 2, 'Did you mean "sm120"?'),
        (("--target", "sm80", "--recipe", "mxfp4-q8"), 4, "FP4 begins with SM120"),
        (("--target", "sm120", "--recipe", "gptq-int4"), 0, ""),
    ],
)
def test_what_cannot_be_made_is_one_line(more, code, words):
    done = run_exporter("plan", "--profile", "16gb", DEMO, "--format", "tensorrt", *more)
    assert one_clear_line(done, code, words) if code else done.code == 0


@pytest.mark.slow
def test_int4_for_ampere_and_later(model, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "int4.toml").write_text(INT4)
    done = run_exporter(*request(model, tmp_path, ("tensorrt", tmp_path / "int4.toml", "sm80")), timeout=300)
    assert done.code == 0, done.err + done.out
    report = report_of(done.json["artifacts"][0])
    assert (report["engines"]["built"], report["engines"]["expansion"], report["engines"]["fused"]) == (True, 0, True)
    assert [b["sm"] for b in report["engines"]["builds"]] == [80, 86, 89, 120, 121] * 2
    assert all(b["constants"]["int4"] > 0 and not b["expanded"] for b in report["engines"]["builds"])
