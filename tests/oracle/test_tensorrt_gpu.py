"""What runs engines on a GPU, with ONNX Runtime in the engines' place: the same graphs, inputs and outputs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from exporter.checkpoint import open_checkpoint
from exporter.formats.tensorrt.shapes import shapes
from exporter.model.reference import reference_logits
from exporter.numerics import decode
from exporter.validate import tensorrt, text
from exporter.validate.metrics import Positions
from exporter.validate.tensorrt_gpu_worker import Request, compared
from tests.conftest import DEMO, run_exporter

LENGTH, FIRST, STEPS = 160, 120, 16


class InOnnxRuntime:
    device = "cpu"

    def __init__(self, graph: Path) -> None:
        options = ort.SessionOptions()
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        self.session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self.calls: list[int] = []

    def cache(self) -> dict[str, Any]:
        inputs = {i.name: i.shape for i in self.session.get_inputs() if i.name.startswith("past_key_values.")}
        return {name: torch.empty((1, shape[1], 0, shape[3]), dtype=torch.float16) for name, shape in inputs.items()}

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        assert set(feeds) == {i.name for i in self.session.get_inputs()}
        self.calls.append(feeds["input_ids"].shape[1])
        names = [o.name for o in self.session.get_outputs()]
        found = self.session.run(names, {name: value.numpy() for name, value in feeds.items()})
        return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu")
    asked = (
        "quantize",
        "-p",
        "48gb",
        DEMO,
        "-f",
        "tensorrt",
        "-t",
        "sm80",
        "--out",
        out,
        "--until",
        "export",
        "--json",
    )
    return Path(run_exporter(*asked, "--json").json["artifacts"][0]["path"])


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    tokens = text.windows(DEMO / "tokenizer.json", text.standard_library(), 2, 192).tokens
    with open_checkpoint(DEMO) as checkpoint:

        def read(name, start, stop):
            return decode.values(checkpoint.read(name, start, stop))

        (made,) = reference_logits(checkpoint.config, read, tokens, [checkpoint.config.rope])
    path = tmp_path_factory.mktemp("expected") / "expected.npz"
    made.save(path)
    return path


def test_windows_in_chunks_and_single_tokens_are_compared(folder, expected):
    prefill, single = (InOnnxRuntime(folder / f"{graph}.onnx") for graph in ("prefill", "decode"))
    request = Request("", "", str(expected), "", sm=80, chunk=64, length=LENGTH, first=FIRST, steps=STEPS)
    arrays = compared(prefill, single, request, lambda *done: None)
    windows, cached = (Positions.of(arrays, name) for name in ("windows", "cached"))
    assert prefill.calls == [64, 64, 32, 64, 64, 32, 64, 56]
    assert single.calls == [1] * STEPS
    assert len(windows.kl) == 2 * LENGTH
    assert len(cached.kl) == STEPS
    assert windows.kl.mean() < 1e-3
    assert cached.kl.mean() < 1e-3


@pytest.mark.parametrize("context", [16384, 32768])
def test_decode_is_built_for_long_contexts(context, folder):
    """For 32,768 keys TensorRT-RTX 1.7 has no kernel that takes one token alone."""
    with open_checkpoint(DEMO) as checkpoint:
        config = checkpoint.config
    limits = {"time_limit": 120, "memory_limit": 4 << 30}
    wanted = shapes("decode", config, context)
    built = tensorrt.build(folder / "decode.onnx", wanted, 89, **limits)
    assert built["built"], built["error"]
    assert built["fused_attention"] == config.num_hidden_layers
    alone = {name: each if "past" in name else shapes("decode", config, 16384)[name] for name, each in wanted.items()}
    alone["attention_mask"] = ([1, 1], [1, 1025], [1, context])
    assert tensorrt.build(folder / "decode.onnx", alone, 89, **limits)["built"] is (context == 16384)


def test_a_wrong_engine_is_seen(folder, expected):
    prefill = InOnnxRuntime(folder / "prefill.onnx")

    class Late(InOnnxRuntime):
        """Forgets the last of what is in the cache."""

        def run(self, feeds):
            out = super().run(feeds)
            return {n: v.roll(1, dims=2) if n.startswith("present.") else v for n, v in out.items()}

    request = Request("", "", str(expected), "", sm=80, chunk=64, length=LENGTH, first=FIRST, steps=STEPS)
    arrays = compared(prefill, Late(folder / "decode.onnx"), request, lambda *done: None)
    assert np.nanmean(Positions.of(arrays, "cached").kl) > 0.02
