"""The parts of a TensorRT folder's proof: profiles.json read, rules by GPU, depth, gates, and when no engine runs."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from exporter.errors import ExporterError, MissingExtra
from exporter.formats import get_format
from exporter.model.reference import ReferenceLogits
from exporter.pipeline import prove_tensorrt as pipeline
from exporter.pipeline.prove import _format_gates
from exporter.validate import tensorrt_prove
from exporter.validate.gates import evaluate
from exporter.validate.onnxruntime import Expected
from exporter.validate.tensorrt_prove import Limits, build_engines, check_rules, read_profiles
from tests.unit.test_onnx_graph import job
from tests.unit.test_tensorrt_folder import written

LIMITS = Limits(60, 10**9)
INPUTS = {"input_ids": {kind: [1, 1] for kind in ("min", "opt", "max")}}
SOUND = {"sms": [80], "graphs": {graph: INPUTS for graph in tensorrt_prove.GRAPHS}}


def profiles(folder, body):
    (folder / "profiles.json").write_bytes(body if isinstance(body, bytes) else json.dumps(body).encode())
    return folder


# profiles.json


def test_profiles_are_read_as_they_were_written(tmp_path):
    written(tmp_path, "sm120", "mxfp4-q8", context=2048)
    sms, shapes = read_profiles(tmp_path)
    assert sms == [120, 121]
    assert shapes["prefill"]["past_key_values.3.value"] == ([1, 2, 0, 64], [1, 2, 1024, 64], [1, 2, 2047, 64])
    assert len(shapes["decode"]) == 3 + 2 * 4


def changed(**entries):
    return {**SOUND, **entries}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b"[]",
        b"null",
        changed(sms=[]),
        changed(sms=None),
        changed(sms=["eighty"]),
        b'{"sms": [1e999], "graphs": {}}',
        {"sms": [80]},
        changed(graphs=[]),
        changed(graphs={"decode": {}}),
        changed(graphs={**SOUND["graphs"], "more": {}}),
        changed(graphs={**SOUND["graphs"], "decode": {"input_ids": [1, 1]}}),
        changed(graphs={**SOUND["graphs"], "decode": {"input_ids": {"min": [1], "opt": [1]}}}),
        changed(graphs={**SOUND["graphs"], "decode": {"input_ids": {"min": ["x"], "opt": [1], "max": [1]}}}),
        b"{" + b" " * (17 << 20) + b"}",
    ],
    ids=lambda body: repr(body)[:40],
)
def test_other_profiles_are_one_line(body, tmp_path):
    with pytest.raises(ExporterError, match=r"profiles\.json: no shapes for engines in it \(") as error:
        read_profiles(profiles(tmp_path, body))
    assert "\n" not in error.value.message
    assert len(error.value.message) < 400
    assert error.value.hint


def test_no_profiles_are_one_line(tmp_path):
    with pytest.raises(ExporterError, match="no shapes for engines"):
        read_profiles(tmp_path)


# The parser's rules


def test_rules_count_for_the_gpus_of_the_folder_alone(tmp_path):
    """bfloat16 is not there on Turing: no fault of a folder for later GPUs."""
    written(tmp_path, "sm120", "mxfp4-bf16")
    assert check_rules(tmp_path) == {"kept": True, "findings": []}
    body = json.loads((tmp_path / "profiles.json").read_text())
    found = check_rules(profiles(tmp_path, {**body, "sms": [75, *body["sms"]]}))
    assert found["kept"] is False
    assert {tuple(f["sms"]) for f in found["findings"]} == {(75,)}
    assert {f["graph"] for f in found["findings"]} == {"decode", "prefill"}
    assert all(set(f) == {"graph", "rule", "where", "problem", "sms"} for f in found["findings"])


# Depth


def test_small_models_are_computed_whole(monkeypatch):
    config = job().config
    assert pipeline.depth(config) == 4
    monkeypatch.setattr(pipeline, "_WHOLE", 10**6)
    assert pipeline.depth(config) == 2  # a sliding layer, a full one
    kinds = ("sliding_attention",) * 3 + ("full_attention",)
    assert pipeline.depth(dataclasses.replace(config, layer_types=kinds)) == 4
    assert pipeline.depth(dataclasses.replace(config, layer_types=kinds[:1] * 4)) == 1


@pytest.mark.parametrize(
    ("length", "prefill", "steps"), [(512, 126, 4), (130, 126, 4), (128, 124, 4), (97, 93, 4), (3, 1, 2), (1, 1, 0)]
)
def test_a_few_tokens_are_decoded_where_the_window_is_full(length, prefill, steps):
    tokens = np.zeros((1, length), np.int64)
    release = ReferenceLogits(tokens, *[np.zeros((length, 1))] * 2, *[np.zeros(length)] * 2)
    expected = Expected(release, np.zeros((2, length, 4)), 128, 4096, release, None)
    assert tensorrt_prove._around_the_window(expected, 4) == (prefill, steps)


# Engines


def test_engines_need_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingExtra, match="building engines needs tensorrt_rtx_cu13"):
        build_engines(tmp_path, 0, LIMITS, None, None)


def test_a_folder_without_sound_profiles_builds_nothing(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(ExporterError, match="no shapes for engines"):
        build_engines(profiles(tmp_path, b"{}"), 0, LIMITS, None, None)


def nvidia_smi(folder, said):
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{said}'\n")
    tool.chmod(0o755)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("", "there is no NVIDIA GPU here"),
        ("NVIDIA L4, 8.9", r"the engines are for SM120, SM121, and NVIDIA L4 is SM89"),
        ("NVIDIA GeForce RTX 5090, 12.0", "torch here has no CUDA"),
        ("NVIDIA H100 80GB HBM3, 9.0", r"the engines are for SM120, SM121, and NVIDIA H100 80GB HBM3 is SM90"),
    ],
)
def test_engines_run_on_a_gpu_that_they_are_for(said, reason, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    if said:
        nvidia_smi(tmp_path, said)
    written(tmp_path, "sm120", "mxfp4-q8")
    with pytest.raises(tensorrt_prove._NotRun, match=reason):
        tensorrt_prove.run_engines(tmp_path, 0, None, tmp_path, LIMITS, None)


def test_engines_that_fail_on_their_own_gpu_fail_a_gate(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    nvidia_smi(tmp_path, "NVIDIA GeForce RTX 5090, 12.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    written(tmp_path, "sm120", "mxfp4-q8")
    found = tensorrt_prove.run_engines(tmp_path, 0, None, tmp_path, Limits(60, 1), None)
    assert "memory" in found["error"]
    (verdict,) = evaluate({"gpu": found}, {"gpu_kl_mean": 0.02})
    assert not verdict.passed


def test_gates_on_what_was_not_run_are_left_out():
    fmt = get_format("tensorrt")
    assert _format_gates(fmt, {"not_run": {}}) == dict(fmt.gates)

    def missing(*keys):
        return set(fmt.gates) - set(_format_gates(fmt, {"not_run": dict.fromkeys(keys, "why")}))

    assert missing("gpu") == {"gpu_kl_mean"}
    assert missing("engines", "gpu") == {"gpu_kl_mean", "engines_built", "engines_expansion", "engines_fused"}
    assert missing("long") == {"long_kl_mean"}
    assert missing("depth") == set()
