"""exporter bench: ONNX folders and graphs, GGUF, folders of other tools; what cannot run is said."""

import json
import shutil
from pathlib import Path

import onnx
import onnxruntime
import onnxruntime_genai
import pytest

from exporter.errors import UsageError
from exporter.pipeline.bench import _predicted, find_subject
from exporter.pipeline.profiles import source_text
from exporter.validate import genai, genai_worker, llama_worker, onnx_worker
from exporter.validate import onnxruntime as validate_onnx
from exporter.validate import runtime as validate_runtime
from exporter.validate.child import OverLimit
from exporter.validate.limits import Limit
from exporter.validate.onnx_kernels import CPU
from exporter.validate.speed import Plan
from tests.conftest import DEMO, run_exporter

SHORT = ("--prompt", "48", "--tokens", "8", "--depth", "0", "--repeats", "2", "--threads", "1")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The demo checkpoint as ONNX and as GGUF, not proved."""
    base = tmp_path_factory.mktemp("bench")
    text = source_text("cpu").split("[[artifact]]")[0] + source_text("cpu")[source_text("cpu").index("[validate]") :]
    wanted = [("onnx", "exact-q8", "cpu"), ("gguf", "mxfp4-q8", "")]
    for fmt, recipe, target in wanted:
        text += f'\n[[artifact]]\nformat = "{fmt}"\nrecipe = "{recipe}"\ntarget = "{target}"\n'
    (base / "both.toml").write_text(text)
    done = run_exporter("quantize", "-p", base / "both.toml", DEMO, "--out", base, "--until", "export", "--json")
    assert done.code == 0, done.err
    return {a["format"]: a["path"] for a in done.json["artifacts"]}


@pytest.fixture
def folder(made, tmp_path):
    """A copy of the ONNX folder, to damage."""
    return shutil.copytree(made["onnx"], tmp_path / "copy")


def bench(*arguments):
    return run_exporter("bench", *SHORT, *arguments)


def sound(run):
    """Two runs of each test, in order, and the memory of a process that held the weights."""
    for rates in (run["prefill"], run["decode"], *run["tests"]):
        assert len(rates["runs"]) == 2
        assert 0 < rates["low"] <= rates["median"] <= rates["high"]
    assert [test["test"] for test in run["tests"]] == ["pp48", "tg8"]
    assert run["not_run"] == {}
    assert 0 < run["tests"][1]["latency_ms"]["median"] <= run["tests"][1]["latency_ms"]["p99"]
    assert run["ttft_prompt"] == 48
    assert run["ttft_seconds"] == pytest.approx(48 / run["prefill"]["median"])
    assert 0 < run["load_seconds"] < 60
    assert 10e6 < run["tests"][0]["peak_rss_bytes"] <= run["peak_rss_bytes"] < 2e9


def test_an_onnx_folder_in_both_runtimes(made):
    done = bench(made["onnx"], "--json")
    assert done.code == 0, done.err
    plain, genai = done.json["runs"]
    sound(plain)
    sound(genai)
    assert (plain["runtime"], plain["version"]) == ("onnxruntime", onnxruntime.__version__)
    assert (genai["runtime"], genai["version"]) == ("onnxruntime-genai", onnxruntime_genai.__version__)
    assert plain["provider"] == genai["provider"] == "cpu"
    assert done.json["not_run"] == {}
    asked = {key: done.json[key] for key in ("prompt_tokens", "generated_tokens", "repeats", "threads", "depths")}
    assert asked == {"prompt_tokens": 48, "generated_tokens": 8, "repeats": 2, "threads": 1, "depths": [0]}
    assert done.json["hardware"]["versions"]["onnxruntime"] == onnxruntime.__version__
    assert "predicted_memory" not in done.json


def test_a_gguf_in_llama_cpp(made):
    done = bench(made["gguf"], "--json")
    assert done.code == 0, done.err
    (run,) = done.json["runs"]
    sound(run)
    assert done.json["format"] == "gguf"
    assert run["runtime"] == "llama.cpp"


def test_lists_of_tests_and_those_that_do_not_fit(made, tmp_path):
    """The text, with what the plan of the profile said beside it."""
    path = shutil.copytree(made["gguf"], tmp_path / "copy")
    (path / "report.json").write_text(json.dumps({"predicted_memory": {"total": 12_300_000_000, "context": 32768}}))
    done = bench(path, "--prompt", "16,48,16", "--depth", "0,100,200000", "--tokens", "4")
    assert done.code == 0, done.err
    rows = [line.split() for line in done.out.splitlines() if line.strip().startswith("llama.cpp") and " cpu " in line]
    assert [" ".join(row[3 : row.index("±") - 1]) for row in rows] == ["pp16", "pp48", "tg4", "tg4 @ d100"]
    assert "llama.cpp, tg4 @ d200000: not run: 200,004 tokens are more than the context of 131,072" in done.out
    assert "first token of a prompt of 16 after" in done.out
    assert "Planned for its profile: 12.3 GB at a context of 32,768 tokens." in done.out


def test_few_seconds_leave_tests_out(made):
    done = bench(made["gguf"], "--depth", "0,100000", "--seconds", "1", "--json")
    assert done.code == 0, done.err
    (run,) = done.json["runs"]
    assert "would take about" in run["not_run"]["tg8 @ d100000"]


def in_runtime(made, runtime, limit):
    """A short run of the artifact's weights under a limit."""
    graph, plan = find_subject(Path(made["onnx"])).graph, Plan(prompts=(64,), depths=(0,), generate=4)
    if runtime == "llama.cpp":
        path = find_subject(Path(made["gguf"])).graph
        asked = llama_worker.Request(str(path), {}, "", [], 1, repeats=0, plan=plan)
        return validate_runtime.run_worker(asked, 60, limit=limit)
    if runtime == "onnxruntime":
        asked = onnx_worker.Request(str(graph), 1, CPU, speed=[[5, 6, 7]], repeats=0, plan=plan)
        return validate_onnx._run(asked, 60, None, limit)
    asked = genai_worker.Request(str(graph.parent), 1, 256, repeats=0, plan=plan, text=[5, 6, 7])
    return genai.run_genai(asked, 60, None, limit)


@pytest.mark.parametrize("runtime", ["llama.cpp", "onnxruntime", "onnxruntime-genai"])
def test_a_runtime_under_a_limit(made, runtime):
    files = tuple(path for path in Path(made["onnx"]).glob("*.onnx*"))
    memory = in_runtime(made, runtime, Limit(600 << 20, "", files))["memory"]
    assert memory["limit_bytes"] == 600 << 20
    if memory["limit_by"] != "cgroup":
        pytest.skip("no control group for memory can be made here")
    with pytest.raises(OverLimit, match=rf"needs more than the 0\.03 GB of a toy in {runtime}$"):
        in_runtime(made, runtime, Limit(30_000_000, "the 0.03 GB of a toy"))


@pytest.mark.parametrize("said", ["", "[]", '{"predicted_memory": {"total": "x", "context": 1}}', "[" * 100_000])
def test_a_report_that_is_none(tmp_path, said):
    (tmp_path / "report.json").write_text(said)
    assert _predicted(tmp_path) == {}


def test_a_graph_alone(folder):
    for name in ("genai_config.json", "tokenizer.json", "manifest.json"):
        (folder / name).unlink()
    done = bench(folder / "model.onnx")
    assert done.code == 0, done.err
    assert f"onnxruntime {onnxruntime.__version__}" in done.out
    assert "onnxruntime-genai: not run: " in done.out
    assert "no genai_config.json" in done.out
    assert "Load average before" in done.out


def test_a_folder_for_genai_alone(folder):
    """As other tools make it: one graph, whose cache is a window that cannot start empty."""
    (folder / "model.onnx").unlink()
    (folder / "model_genai.onnx").rename(folder / "decoder.onnx")
    path = folder / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["decoder"]["filename"] = "decoder.onnx"
    path.write_text(json.dumps(config))
    done = bench(folder, "--json")
    assert done.code == 0, done.err
    (run,) = done.json["runs"]
    sound(run)
    assert "cannot run" in done.json["not_run"]["onnxruntime"]


def test_a_graph_that_leaves_the_head_size_open(folder):
    """As the builder of onnxruntime-genai writes it: its configuration says the size."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for value in model.graph.input:
        if value.name.startswith("past_key_values."):
            value.type.tensor_type.shape.dim[3].dim_param = "kv_cache_dim"
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    done = bench(folder, "--json")
    assert done.code == 0, done.err
    assert [run["runtime"] for run in done.json["runs"]] == ["onnxruntime", "onnxruntime-genai"]
    (folder / "genai_config.json").unlink()
    done = bench(folder)
    assert done.code == 1
    assert "model.onnx is not a decoder graph with a KV cache" in done.err


def test_what_would_be_computed_wrong_is_not_measured(folder):
    for name in ("model.onnx", "model_genai.onnx"):
        model = onnx.load(folder / name, load_external_data=False)
        for node in model.graph.node:
            if node.op_type == "QMoE":
                node.attribute.append(onnx.helper.make_attribute("quant_type", "fp4"))
        (folder / name).write_bytes(model.SerializeToString())
    done = bench(folder)
    assert done.code == 4
    assert "error: model.onnx: node /model/layers.0/moe/QMoE (QMoE): quant_type 'fp4' on CPU" in done.err
    assert done.out == ""


def test_weights_that_are_cut_off(folder):
    data = folder / "model.onnx.data"
    with open(data, "r+b") as f:
        f.truncate(data.stat().st_size // 2)
    done = bench(folder)
    assert done.code == 1
    assert done.err.count("\n") == 2, done.err
    assert "model.onnx.data: damaged ONNX artifact" in done.err


@pytest.mark.parametrize(
    ("arguments", "told", "code"),
    [
        (("--provider", "cdua"), 'no provider "cdua". Did you mean "cuda"?', 2),
        (("--provider", "cuda"), "no CUDAExecutionProvider here", 4),
        (("--threads", "none"), "is not a valid", 2),
        (("--prompt", "1"), "1 is not in the range", 2),
        (("--prompt", "64,x"), "'x' is not a valid integer", 2),
        (("--depth", "-1"), "-1 is not in the range", 2),
        (
            ("--prompt", "200000", "--depth", "200000"),
            "200,000 tokens are more than the 131,072 that the model takes",
            2,
        ),
    ],
)
def test_a_wrong_request(made, arguments, told, code):
    if code == 4 and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("it is here")
    done = bench(made["onnx"], *arguments)
    assert done.code == code, done.err
    assert told in done.err


def test_llama_cpp_is_on_the_cpu(made):
    done = bench(made["gguf"], "--provider", "cuda")
    assert done.code == 2
    assert "llama.cpp runs on the CPU" in done.err


def test_what_is_no_artifact(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        find_subject(tmp_path / "none")
    with pytest.raises(UsageError, match=r"no \.onnx and no \.gguf"):
        find_subject(tmp_path)
    (tmp_path / "a.txt").touch()
    with pytest.raises(UsageError, match="is not an artifact"):
        find_subject(tmp_path / "a.txt")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match="several GGUF files"):
        find_subject(tmp_path)
    (tmp_path / "web" / "onnx").mkdir(parents=True)
    for name in ("model.onnx", "model_q4.onnx"):
        (tmp_path / "web" / "onnx" / name).touch()
    with pytest.raises(UsageError, match="several graphs"):
        find_subject(tmp_path / "web")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {"decoder": 3}}', "[" * 100_000, " " * (1 << 21)])
def test_a_configuration_that_is_none(tmp_path, content):
    (tmp_path / "genai_config.json").write_text(content)
    with pytest.raises(UsageError, match="cannot be read"):
        find_subject(tmp_path)


def test_a_configuration_without_a_graph(tmp_path):
    (tmp_path / "genai_config.json").write_text('{"model": {"decoder": {}}}')
    with pytest.raises(UsageError, match="names no graph"):
        find_subject(tmp_path)


def test_where_things_are(tmp_path):
    for name in ("a-00001-of-00002.gguf", "a-00002-of-00002.gguf"):
        (tmp_path / name).touch()
    assert find_subject(tmp_path).graph.name == "a-00001-of-00002.gguf"
    web = tmp_path / "web"
    (web / "onnx").mkdir(parents=True)
    (web / "onnx" / "model_q4f16.onnx").touch()
    decoder = {"filename": "onnx/model_q4f16.onnx", "session_options": {"provider_options": [{"webgpu": {}}]}}
    (web / "genai_config.json").write_text(json.dumps({"model": {"decoder": decoder}}))
    for path in (web, web / "onnx" / "model_q4f16.onnx"):
        subject = find_subject(path)
        assert subject.folder == web
        assert subject.graph == subject.genai == web / "onnx" / "model_q4f16.onnx"
        assert subject.device == "webgpu"
