"""The workers of ONNX Runtime and onnxruntime-genai: speed alone, and everything that can go wrong in them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import ExporterError
from exporter.validate import child, genai, genai_worker, onnx_worker, onnxruntime, text
from exporter.validate.onnx_kernels import CPU
from exporter.validate.onnx_session import QMOE_GEMM
from exporter.validate.speed import Plan
from tests.conftest import DEMO, make_artifact

onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("cpu"), "onnx", "exact-bf16", "cpu")


def test_bench(folder: Path) -> None:
    tokens = text.windows(DEMO / "tokenizer.json", text.standard_library(), 1, 700).tokens
    plan = Plan(prompts=(64, 600), generate=4, depths=(0, 300, 5000), repeats=2, context=4096)
    answer = onnxruntime.bench(folder / "model.onnx", tokens, plan, threads=1)
    chat = onnxruntime.bench_genai(folder, tokens, plan, threads=1)
    for memory, speed in ((answer["memory"], answer["speed"]), (chat["memory"], chat)):
        assert [test["test"] for test in speed["tests"]] == ["pp64", "pp600", "tg4", "tg4 @ d300"]
        assert all(len(test["runs"]) == 2 and test["low"] > 0 for test in speed["tests"])
        assert list(speed["not_run"]) == ["tg4 @ d5000"]
        assert memory["peak_rss_bytes"] >= speed["tests"][-1]["peak_rss_bytes"] > 0


def test_the_same_tokens_in_both(folder: Path) -> None:
    tokens = text.windows(DEMO / "tokenizer.json", text.standard_library(), 2, 64).tokens
    settings: dict[str, Any] = {"generate": 4, "repeats": 2}
    asked = onnx_worker.Request(str(folder / "model.onnx"), 1, CPU, speed=tokens.tolist(), prompt=8, **settings)
    speed = onnxruntime._run(asked, 60, None)["speed"]
    assert (speed["prefill_length"], speed["decode_length"], len(speed["decode_runs"])) == (64, 4, 2)
    assert [test["test"] for test in speed["tests"]] == ["pp64", "tg4 @ d8"]
    chat = genai.run_genai(
        genai_worker.Request(str(folder), 1, 129, prompt=tokens[0, :8].tolist(), **settings), 60, None
    )
    assert chat["greedy_ids"] == speed["greedy_ids"]
    assert [test["test"] for test in chat["tests"]] == ["tg4 @ d8"]


def test_an_answer_that_has_ended_is_fed_on(folder: Path, tmp_path: Path) -> None:
    """Where every token ends the answer, the cache must grow all the same: else a step at a depth is none."""
    ends = tmp_path / "x"
    shutil.copytree(folder, ends)
    config = json.loads((ends / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = list(range(config["model"]["vocab_size"]))
    (ends / "genai_config.json").write_text(json.dumps(config))
    plan = Plan(prompts=(8,), generate=4, depths=(0, 20), repeats=2)
    asked = genai_worker.Request(str(ends), 1, 129, repeats=0, plan=plan, text=[5, 6, 7, 8])
    chat = genai.run_genai(asked, 60, None)
    assert [test["test"] for test in chat["tests"]] == ["pp8", "tg4", "tg4 @ d20"]
    runner = genai_worker._Runner(genai_worker._Model(asked))
    runner.room(20)
    runner.clear()
    runner.prefill([5, 6, 7])
    token = runner.first()
    for _ in range(5):
        token = runner.step(token)
    assert runner.generator.token_count() == 3 + 5


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
