"""The workers of ONNX Runtime and onnxruntime-genai: speed alone, and everything that can go wrong in them."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from exporter.errors import ExporterError
from exporter.validate import child, genai, genai_worker, onnx_worker, onnxruntime, text
from exporter.validate.onnx_kernels import CPU
from exporter.validate.onnx_session import QMOE_GEMM
from tests.conftest import DEMO, make_artifact

onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("cpu"), "onnx", "exact-bf16", "cpu")


def test_bench(folder: Path) -> None:
    tokens = text.windows(DEMO / "tokenizer.json", text.standard_library(), 2, 64).tokens
    answer = onnxruntime.bench(folder / "model.onnx", tokens, threads=1, prompt=8, generate=4, repeats=2)
    speed = answer["speed"]
    assert (speed["prefill_length"], speed["decode_length"], len(speed["decode_runs"])) == (64, 4, 2)
    assert answer["memory"]["peak_rss_bytes"] > 0
    chat = onnxruntime.bench_genai(folder, tokens[:, :8], threads=1, context=129, generate=4, repeats=2)
    assert chat["greedy_ids"] == speed["greedy_ids"]


def test_a_damaged_folder(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "x"
    shutil.copytree(folder, broken)
    os.truncate(broken / "model.onnx.data", 100_000)
    request = onnx_worker.Request(str(broken / "model.onnx"), 1, CPU, speed=[[1, 2, 3]])
    with pytest.raises(ExporterError, match=r"onnxruntime .* cannot load .*model\.onnx: .*External initializer"):
        onnxruntime._run(request, 60, None)
    (broken / "genai_config.json").write_text("{")
    with pytest.raises(ExporterError, match=r"onnxruntime-genai .* cannot load"):
        genai.run_genai(genai_worker.Request(str(broken), 1, 257), 60, None)


def test_a_graph_of_another_kind(folder: Path, tmp_path: Path) -> None:
    node = onnx.helper.make_node("Identity", ["x"], ["logits"])
    values = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 8]) for n in ("x", "logits")]
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 22)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    request = onnx_worker.Request(str(tmp_path / "model.onnx"), 1, CPU)
    with pytest.raises(ExporterError, match="is not a decoder graph with a KV cache"):
        onnxruntime._run(request, 60, None)


def test_a_text_of_another_vocabulary(folder: Path) -> None:
    request = onnx_worker.Request(str(folder / "model.onnx"), 1, CPU, speed=[[1, 5000]])
    with pytest.raises(ExporterError, match="has token 5000, the graph a vocabulary of 2048"):
        onnxruntime._run(request, 60, None)


def test_the_kernels_variable_from_outside_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(QMOE_GEMM, "fp32")
    request = onnx_worker.Request(str(folder / "model.onnx"), 1, CPU)
    with pytest.raises(ExporterError, match=f"{QMOE_GEMM} is set"):
        onnxruntime._run(request, 60, None)
    with pytest.raises(ExporterError, match=f"{QMOE_GEMM} is set"):
        genai.run_genai(genai_worker.Request(str(folder), 1, 257), 60, None)


def test_a_killed_child_is_named(folder: Path) -> None:
    killed = r"onnxruntime was killed by SIGKILL while running model\.onnx: Error: last words"
    code = "import os, sys; sys.stderr.write('Error: last words'); sys.stderr.flush(); os.kill(os.getpid(), 9)"
    request = onnx_worker.Request(str(folder / "model.onnx"), 1, CPU)
    with pytest.raises(ExporterError, match=killed):
        child.run_worker(
            request, "", 60, runtime="onnxruntime", subject="model.onnx", command=(sys.executable, "-c", code)
        )
