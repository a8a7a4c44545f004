"""ONNX artifacts of the demo checkpoint in ONNX Runtime and onnxruntime-genai, against the reference.

Its experts are held exactly, so with float32 activations nothing but the last bits may differ, and every
fault planted in the files stands out.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.errors import ExporterError, Refused
from exporter.formats.onnx.external import read_initializers
from exporter.model.layer import Layer
from exporter.model.reference import ReferenceLogits, Routes, reference_logits
from exporter.model.rope import rotation_table
from exporter.numerics import decode
from exporter.validate import gates, genai, genai_worker, metrics, onnxruntime, text
from exporter.validate.onnx_kernels import CPU
from exporter.validate.onnx_session import QMOE_GEMM, Decoding, Graph, chosen_experts
from tests.conftest import DEMO, make_artifact

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxruntime_genai")

WINDOWS, LENGTH, LONG, TRAINED = 2, 256, 400, 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("cpu"), "onnx", "exact-bf16", "cpu")


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[Checkpoint]:
    torch.set_num_threads(1)
    with open_checkpoint(DEMO) as opened:
        yield opened


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint) -> onnxruntime.Expected:
    config, sample = checkpoint.config, text.standard_library()
    routes = Routes(config, WINDOWS * LENGTH)

    def logits(windows: int, length: int, routed: Any = None) -> ReferenceLogits:
        def read(name: str, start: int, stop: int) -> Any:
            return decode.values(checkpoint.read(name, start, stop))

        tokens = text.windows(DEMO / "tokenizer.json", sample, windows, length).tokens
        return reference_logits(config, read, tokens, [config.rope], top_k=config.vocab_size, routed=routed)[0]

    release = logits(WINDOWS, LENGTH, routes)
    # The weights in the files are the release's own, so are what our forward makes of them.
    return onnxruntime.Expected(release, routes.experts, config.sliding_window, TRAINED, release, logits(1, LONG))


MESSAGES = [{"role": "user", "content": "Hi <b>&"}]
CHAT = genai.Chat(MESSAGES, "<|start|>user<|message|>Hi <b>&<|end|>")


def prove(folder: Path, expected: onnxruntime.Expected, **changed: Any) -> dict[str, Any]:
    settings = {
        "provider": CPU,
        "text": text.standard_library(),
        "tokenizer_file": DEMO / "tokenizer.json",
        "chat": CHAT,
        "threads": 1,
        "time_limit": 120,
    }
    graph = changed.pop("graph", folder / "model.onnx")
    return onnxruntime.prove_onnx(folder, graph, expected, **{**settings, **changed})


STAGES: list[str] = []


@pytest.fixture(scope="module")
def report(folder: Path, expected: onnxruntime.Expected) -> dict[str, Any]:
    return prove(folder, expected, on_progress=lambda *done: STAGES.append(done[0]))


# The proof


def test_with_float32_activations_it_is_the_reference(report: dict[str, Any]) -> None:
    for figures in (report["export"], report["arithmetic"], report["cached"]["export"], report["chunked"]["export"]):
        assert figures["kl_max"] < 1e-9
        assert figures["top1"] == 1
    assert report["export"]["positions"] == WINDOWS * LENGTH
    assert report["long"]["export"]["kl_max"] < 1e-9
    assert report["router"]["export"]["flips"] == 0
    assert report["cached"]["logit_difference"] < 1e-3


def test_as_shipped_it_rounds_activations(report: dict[str, Any]) -> None:
    """And what that costs is in figures of its own, flips of the router apart."""
    assert report["runtime"]["accuracy_level"] == [4]
    assert 1e-6 < report["release"]["kl_mean"] < 5e-3
    router = report["router"]["release"]
    assert router["flips"] == round(router["share"] * report["router"]["choices"])
    assert 0 < router["share"] < 0.05
    assert router["kl_mean_with_flips"] > router["kl_mean_without_flips"]
    assert report["cached"]["release"]["logit_difference"] > report["cached"]["logit_difference"]


def test_what_is_measured_and_where(report: dict[str, Any], folder: Path) -> None:
    json.dumps(report, allow_nan=False)
    assert report["cached"]["crosses_window"] is True
    assert (report["cached"]["prefill"], report["cached"]["steps"]) == (96, 64)
    assert report["long"]["export"]["positions"] == LONG - TRAINED
    assert report["long"]["export"]["before"]["positions"] == TRAINED
    speed, memory = report["speed"], report["memory"]
    assert speed["prefill_length"] == LENGTH
    assert speed["decode_length"] == 32
    assert len(speed["greedy_ids"]) == 33
    assert min(speed["load_seconds"], speed["prefill_tokens_per_second"], speed["decode_tokens_per_second"]) > 0
    weights = (folder / "model.onnx.data").stat().st_size
    assert memory["file_bytes"] == weights + (folder / "model.onnx").stat().st_size
    # The comparison's logits are not in it.
    assert weights < memory["peak_rss_bytes"] < weights + (256 << 20)
    assert report["runtime"]["provider"] == CPU
    assert report["not_run"] == {}
    stages = list(dict.fromkeys(STAGES))
    assert stages[:4] == ["load", "speed", "compare", "long text"]
    assert stages[-1] == "genai: compare"


def test_genai_runs_the_folder(report: dict[str, Any]) -> None:
    found = report["genai"]
    assert found["tokenizer_equal"] is True
    assert found["tokenizer"]["ids"] > 5000
    assert found["chat_equal"] is True
    assert found["greedy"]["text"] == report["speed"]["greedy_text"]
    assert found["greedy"]["first_difference"] is None
    assert found["cached"]["positions"] == 64
    # The same kernels as in the plain graph, on a cache that keeps the window only.
    assert found["difference"] < 1e-5
    assert found["speed"]["decode_tokens_per_second"] > 0


def test_every_gate_of_the_runtime_finds_its_figure(report: dict[str, Any]) -> None:
    limits = {"cached_kl_mean": 1e-3, "cached_difference": 1e-3, "long_kl_mean": 5e-3, "router_flips": 0.05}
    limits |= {
        "genai_kl_mean": 5e-3,
        "genai_difference": 1e-5,
        "arithmetic_kl_mean": 1e-6,
        "genai_tokenizer_equal": True,
        "genai_chat_equal": True,
    }
    for verdict in gates.evaluate(report, limits):
        assert verdict.passed, verdict


def test_genais_encode_stops_at_a_nul(folder: Path) -> None:
    """Why such texts are left out of the comparison of ids."""
    request = genai_worker.Request(str(folder), 1, 257, provider="cpu", pieces=["a\0b", "a"])
    ids = genai.run_genai(request, 60, None)["ids"]
    assert ids[0] == ids[1]


# Faults planted in the files, each of which must show


def fault(folder: Path, to: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(folder, to)
    change(to)
    return to


def attribute(name: str, value: Any, graph: str = "model.onnx") -> Callable[[Path], None]:
    """An attribute of the first attention."""

    def change(folder: Path) -> None:
        model = onnx.load(folder / graph, load_external_data=False)
        node = next(n for n in model.graph.node if n.op_type == "GroupQueryAttention")
        (found,) = (a for a in node.attribute if a.name == name)
        found.i = value
        onnx.save(model, folder / graph)

    return change


def without_sinks(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.input[11] = ""
    onnx.save(model, folder / "model.onnx")


TYPES = {"uint8": np.uint8, "float": np.float32, "float16": np.float16}


def rewritten(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """The bytes of an initializer of the data file."""

    def change_file(folder: Path) -> None:
        entry = read_initializers(folder / "model.onnx", folder)[name]
        with open(entry.path, "r+b") as f:
            f.seek(entry.offset)
            array = np.frombuffer(f.read(entry.nbytes), TYPES[entry.dtype]).reshape(*entry.shape)
            f.seek(entry.offset)
            f.write(np.ascontiguousarray(change(array.copy())).tobytes())

    return change_file


def swapped(rows: Any) -> Any:
    """Gate and up rows [E, 2 * I, ...], which take turns, exchanged."""
    return rows.reshape(rows.shape[0], -1, 2, *rows.shape[2:])[:, :, ::-1].reshape(rows.shape)


def one_doubled(scales: Any) -> Any:
    scales[3, 17, 2] *= 2
    return scales


def rounded_yarn(folder: Path) -> None:
    with open_checkpoint(DEMO) as checkpoint:
        config = checkpoint.config
    rope = dataclasses.replace(config.rope, truncate=True)
    for name, wave in (("cos_cache", np.cos), ("sin_cache", np.sin)):
        table = rotation_table(wave, rope, config.head_dim, config.max_position_embeddings)
        rewritten(name, lambda old, new=table: new.astype(old.dtype))(folder)


EXPERTS = "model.layers.1.mlp.experts"
FAULTS: dict[str, Callable[[Path], None]] = {
    "window one longer": attribute("local_window_size", 129),
    "window one shorter": attribute("local_window_size", 127),
    "first layer full": attribute("local_window_size", -1),
    "rotation interleaved": attribute("rotary_interleaved", 1),
    "sinks dropped": without_sinks,
    "gate and up swapped": rewritten(f"{EXPERTS}.gate_up_proj.weight_codes", swapped),
    "one scale doubled": rewritten(f"{EXPERTS}.down_proj.weight_scales", one_doubled),
    "YaRN rounded": rounded_yarn,
}


def kl_of(graph: Path, expected: onnxruntime.Expected) -> float:
    """Mean KL of the first window, with float32 activations."""
    loaded = Graph(graph, threads=1, provider=CPU, activations="float32")
    return float(metrics.compare(expected.release, 0, Decoding(loaded).append(expected.release.tokens[0])).kl.mean())


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_shows(
    name: str, folder: Path, expected: onnxruntime.Expected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(QMOE_GEMM, "fp32")
    assert kl_of(fault(folder, tmp_path / "x", FAULTS[name]) / "model.onnx", expected) > 1e-7  # the floor is 1e-12


def test_a_fault_in_the_graph_for_genai_alone_shows(
    folder: Path, expected: onnxruntime.Expected, report: dict[str, Any], tmp_path: Path
) -> None:
    wrong = fault(folder, tmp_path / "x", attribute("local_window_size", 127, "model_genai.onnx"))
    found = prove(wrong, dataclasses.replace(expected, long=None))
    assert found["export"]["kl_max"] < 1e-9
    assert found["genai"]["difference"] > 1e-4
    assert report["genai"]["difference"] < 1e-5


def test_what_would_be_computed_wrong_in_genai_alone_is_not_run(
    folder: Path, expected: onnxruntime.Expected, tmp_path: Path
) -> None:
    def as_fp4(to: Path) -> None:
        model = onnx.load(to / "model_genai.onnx", load_external_data=False)
        for node in model.graph.node:
            if node.op_type == "QMoE":
                node.attribute.append(onnx.helper.make_attribute("quant_type", "fp4"))
        onnx.save(model, to / "model_genai.onnx")

    with pytest.raises(Refused, match=r"model_genai\.onnx: node .*QMoE.*quant_type 'fp4' on CPU"):
        prove(fault(folder, tmp_path / "x", as_fp4), expected)


def test_another_choice_of_experts_is_counted(
    folder: Path, expected: onnxruntime.Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(QMOE_GEMM, "fp32")
    decoding = Decoding(Graph(folder / "model.onnx", threads=1, provider=CPU, activations="float32", inspect=True))
    logits = decoding.append(expected.release.tokens[0])
    positions = metrics.compare(expected.release, 0, logits)
    found, wanted = decoding.routes(expected.routes.shape[2]), expected.routes[:, :LENGTH]
    assert onnxruntime.flips(wanted, found, positions)["flips"] == 0
    changed = wanted.copy()
    changed[2, 5] = changed[2, 5][::-1]  # no longer ascending: another set, as far as anyone can tell
    changed[3, 5, 0] = changed[3, 7, 0] = 99
    counted = onnxruntime.flips(changed, found, positions)
    assert (counted["flips"], counted["positions"]) == (3, 2)
    assert counted["kl_mean_with_flips"] == pytest.approx(positions.kl[[5, 7]].mean())


def test_routes_are_the_references_own(checkpoint: Checkpoint, expected: onnxruntime.Expected) -> None:
    """The first layer's, one token at a time from its router's float64 logits."""
    routes = expected.routes
    assert routes.shape == (4, WINDOWS * LENGTH, 4)
    assert (np.diff(routes.astype(int), axis=2) > 0).all()
    seen: list[Any] = []

    def observe(names: tuple[str, ...], expert: int | None, rows: Any) -> None:
        if names[0].endswith("mlp.router.weight"):
            seen.append(rows.double().numpy())

    def read(name: str, start: int, stop: int) -> Any:
        return decode.values(checkpoint.read(name, start, stop))

    config, tokens = checkpoint.config, expected.release.tokens
    x = torch.from_numpy(read("model.embed_tokens.weight", 0, config.vocab_size)[tokens])[None]
    Layer(config, 0, read, "cpu", observe).forward(x, [config.rope])
    stem = "model.layers.0.mlp.router"
    weight, bias = (read(f"{stem}.{part}", 0, config.num_local_experts).astype(float) for part in ("weight", "bias"))
    logits = seen[0] @ weight.T + bias
    wanted = [sorted(sorted(range(16), key=lambda e: -row[e])[:4]) for row in logits]
    assert (routes[0] == wanted).all()
    assert (chosen_experts(logits, 4) == wanted).all()


# The device


def test_a_folder_for_webgpu_runs_on_the_cpu_and_says_what_it_could_not(
    expected: onnxruntime.Expected, tmp_path: Path
) -> None:
    folder = make_artifact(tmp_path, "onnx", "exact-bf16", "webgpu")
    (graph,) = folder.glob("onnx/*.onnx")
    short = dataclasses.replace(expected, long=None)
    report = prove(folder, short, graph=graph, chat="no template")
    assert report["export"]["kl_mean"] < 1e-3  # float16 arithmetic
    assert report["cached"]["logit_difference"] < 0.1
    assert list(report["not_run"]) == ["long", "genai.chat_equal"]
    assert report["memory"]["file_bytes"] == sum(p.stat().st_size for p in folder.glob("onnx/*"))
    # As it is configured, its own provider is asked for, which this build lacks.
    request = genai_worker.Request(str(folder), 1, 257)
    with pytest.raises(ExporterError, match=r"onnxruntime-genai .* cannot load .*not supported in this build"):
        genai.run_genai(request, 60, None)
    missing: dict[str, str] = {}
    positions = metrics.Positions(*[np.zeros(1)] * 6)
    assert genai.in_genai(request, None, "no template", genai.Plain(positions, []), missing, 60, None) == {}
    assert "not supported in this build" in missing["genai"]


def test_what_only_cuda_computes_is_proved_by_our_forward_and_says_so(tmp_path: Path) -> None:
    folder = make_artifact(tmp_path, "onnx", "mxfp4-bf16", "cuda", until="validate")
    report = json.loads((folder / "report.json").read_text())
    assert report["status"] == "passed"
    assert report["runtime"]["name"] == "exporter reference"
    assert report["runtime"]["executed_on_target"] is False
    assert "no CUDAExecutionProvider here" in report["not_run"]["onnxruntime"]
    assert "speed" not in report
    assert not {g["name"] for g in report["gates"]} & {"cached_kl_mean", "router_flips", "genai_kl_mean"}
