"""Which device an ONNX artifact is proved on, what its gates are then, and the record of routes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from exporter.checkpoint import Checkpoint
from exporter.errors import ExporterError
from exporter.formats import get_format
from exporter.model.reference import Routes
from exporter.pipeline.prove import _format_gates
from exporter.types import Scheme
from exporter.types.recipe import Step
from exporter.validate.metrics import Positions
from exporter.validate.onnx_session import chosen_experts
from exporter.validate.onnxruntime import file_bytes, flips

prove_onnx = pytest.importorskip("exporter.pipeline.prove_onnx")
onnxruntime = pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")


def steps(checkpoint: Checkpoint, scheme: str) -> list[Step]:
    return [Step(spec, "pass", Scheme.parse(scheme), Scheme.parse(scheme)) for spec in checkpoint.specs[:2]]


def test_a_provider_that_is_here_or_the_cpu(demo_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    integers, fp4 = steps(demo_checkpoint, "int8-g32"), steps(demo_checkpoint, "mxfp4")
    here = ["CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: here)
    for target in ("", "cpu", "webgpu", "cuda"):
        assert prove_onnx.provider_for(target, integers) == "CPUExecutionProvider"
    # On a CPU the operator takes FP4 and computes with it as if it were int4.
    assert prove_onnx.provider_for("cuda", fp4) is None
    here += ["CUDAExecutionProvider", "WebGpuExecutionProvider"]
    assert prove_onnx.provider_for("cuda", fp4) == "CUDAExecutionProvider"
    assert prove_onnx.provider_for("webgpu", integers) == "WebGpuExecutionProvider"
    assert prove_onnx.provider_for("", integers) == "CPUExecutionProvider"


def test_a_formats_own_limits_are_left_out_where_nothing_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = get_format("onnx")
    limits = {"cached_kl_mean": 0.01, "long_kl_mean": 0.01, "genai_kl_mean": 0.01, "genai_chat_equal": True}
    monkeypatch.setattr(fmt, "gates", limits)
    assert _format_gates(fmt, {}) == limits
    assert _format_gates(fmt, {"not_run": {"onnxruntime": "no CUDA"}}) == {}
    assert list(_format_gates(fmt, {"not_run": {"long": "short"}})) == [
        "cached_kl_mean",
        "genai_kl_mean",
        "genai_chat_equal",
    ]
    assert list(_format_gates(fmt, {"not_run": {"genai": "no WebGPU"}})) == ["cached_kl_mean", "long_kl_mean"]
    left = _format_gates(fmt, {"not_run": {"genai.chat_equal": "no template", "target": "no CUDA"}})
    assert list(left) == ["cached_kl_mean", "long_kl_mean", "genai_kl_mean"]


def test_routes_are_kept_and_damage_is_found(demo_checkpoint: Checkpoint, tmp_path: Path) -> None:
    config = dataclasses.replace(demo_checkpoint.config, num_hidden_layers=2)
    routes = Routes(config, 3)
    # Two rope variants of three positions: the first one's are kept.
    chosen = torch.tensor([[9, 2, 4, 0], [1, 3, 2, 5], [7, 6, 5, 4]])
    routes(1, torch.cat((chosen, chosen + 1)))
    routes.save(tmp_path / "r.npz")
    assert Routes.load(tmp_path / "r.npz")[1].tolist() == [[0, 2, 4, 9], [1, 2, 3, 5], [4, 5, 6, 7]]
    np.savez(tmp_path / "other.npz", experts=np.zeros(3))
    for name, content in (("other.npz", None), ("x.npz", b"PK"), ("missing.npz", None)):
        if content:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ExporterError, match=f"{name}: reference logits cannot be read"):
            Routes.load(tmp_path / name)


def test_chosen_experts_are_a_set_of_the_largest() -> None:
    logits = np.array([[0.1, 3.0, -1.0, 2.0], [1.0, 1.0, 1.0, 0.0]], np.float32)
    assert chosen_experts(logits, 2).tolist() == [[1, 3], [0, 1]]


def test_flips_without_any_have_no_mean() -> None:
    kl = np.array([0.5, 0.25])
    positions = Positions(*[kl] * 6)
    routes = np.zeros((3, 2, 1), np.uint16)
    assert flips(routes, routes, positions) == {
        "flips": 0,
        "share": 0.0,
        "positions": 0,
        "kl_mean_without_flips": 0.375,
        "kl_mean_with_flips": None,
    }
    assert flips(routes, routes + np.uint16(1), positions)["kl_mean_without_flips"] is None


def test_bytes_of_a_graph_are_with_its_weights(tmp_path: Path) -> None:
    for name, size in (("model.onnx", 1), ("model.onnx.data", 10), ("model.onnx.data_1", 100), ("model_genai.onnx", 9)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert file_bytes(tmp_path / "model.onnx") == 111
