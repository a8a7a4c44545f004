"""The model card: what the Hub reads of it, what a person is told, and what it refuses to be made of."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
import yaml

from exporter.errors import UsageError
from exporter.pipeline.card import Entry, make_card
from exporter.publish.card import MARK
from tests.card_sample import REPO, entry, manifest, report
from tests.report_sample import failed


def head(text):
    return yaml.safe_load(text.split("---\n")[1])


def card(*entries, repo=REPO, **asked):
    return make_card(repo, entries, **asked).text


def section(text, title):
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text):
    """Cells of the first table below "Which file", without its head."""
    lines = [line for line in section(text, "Which file for which device").splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


# The head


def test_the_head_is_what_the_hub_reads():
    from huggingface_hub import ModelCard

    text = card(entry())
    assert head(text) == {
        "license": "apache-2.0",
        "base_model": ["openai/gpt-oss-20b"],
        "base_model_relation": "quantized",
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "quantized_by": "exporter",
        "tags": ["gguf", "mxfp4", "int8", "gpt_oss", "conversational"],
    }
    assert text.split("---\n")[2].startswith(f"{MARK}\n\n# gpt-oss-20b-quantized\n")
    read = ModelCard(text)
    assert read.data.base_model == ["openai/gpt-oss-20b"]
    assert read.data.to_dict()["base_model_relation"] == "quantized"
    assert read.text.lstrip().startswith(MARK)


@pytest.mark.parametrize(
    ("fmt", "target", "library", "tag"),
    [
        ("gguf", "", "gguf", "gguf"),
        ("onnx", "cpu", "onnx", "onnx"),
        ("onnx", "webgpu", "transformers.js", "transformers.js"),
        ("tensorrt", "sm80", "onnx", "tensorrt"),
        ("mxfp4", "", "transformers", "mxfp4"),
        ("gptq", "gptqmodel", "transformers", "gptq"),
        ("compressed-tensors", "", "transformers", "compressed-tensors"),
    ],
)
def test_library_and_tags(fmt, target, library, tag):
    found = head(card(entry(fmt, target=target, prefix="one")))
    assert found["library_name"] == library
    assert tag in found["tags"]


def test_integers_and_their_method_are_tags():
    tensors = {"t": {"digest": "d", "scheme": "int4-g32", "method": "gptq"}}
    assert head(card(entry("onnx", target="cpu", tensors=tensors)))["tags"] == [
        "onnx", "int4", "gptq", "gpt_oss", "conversational",
    ]  # fmt: skip


def test_a_fine_tune_has_no_license_that_nobody_gave_it():
    source = {"repo": "someone/fine-tune", "revision": "a" * 40, "files": {}}
    text = card(entry(source=source))
    assert "license" not in head(text)
    assert head(text)["base_model"] == ["someone/fine-tune"]
    assert "The license of the model that it is made of holds." in text
    assert head(card(entry(source=source), license="mit"))["license"] == "mit"


def test_a_folder_has_no_base_model_and_says_so():
    source = {"repo": None, "revision": None, "files": {}}
    text = card(entry(source=source))
    assert not {"license", "base_model", "base_model_relation"} & head(text).keys()
    assert "It was made of a folder" in text
    told = card(entry(source=source), base_model="openai/gpt-oss-120b")
    assert head(told)["base_model"] == ["openai/gpt-oss-120b"]
    assert head(told)["license"] == "apache-2.0"
    assert "It was made of a folder" not in told


def test_a_release_beside_a_fine_tune_is_not_under_the_release_s_license():
    other = entry("mxfp4", source={"repo": "someone/fine-tune", "revision": "", "files": {}}, prefix="b")
    text = card(entry(prefix="a"), other)
    assert head(text)["base_model"] == ["openai/gpt-oss-20b", "someone/fine-tune"]
    assert "license" not in head(text)


# What nobody may miss


def test_what_was_not_proved_is_said_at_the_top():
    text = card(Entry("", manifest(), None))
    above = text.split("## Which file")[0]
    assert "**`gguf-mxfp4-q8` WAS NOT PROVED.**" in above
    assert "**NOT PROVED**" in rows(text)[0][0]
    assert "no figure above was measured" in section(text, "The proof")
    assert "Each file was opened again" not in text


def test_a_failed_gate_is_said_at_the_top():
    made = manifest()
    bad = failed()
    bad["subject"] |= {"digest": made["digest"], "class": "near"}
    text = card(Entry("", made, bad))
    assert "**`gguf-mxfp4-q8` FAILED ITS PROOF.**" in text.split("## Which file")[0]
    assert "**✗ a gate FAILED**" in rows(text)[0][0]
    assert "| **✗ FAILED** |" in section(text, "The proof")


@pytest.mark.parametrize("status", ["passed", "gate failed"])
def test_a_verdict_without_its_report(status):
    gates = [{"name": "ppl_ratio", "limit": 1.02, "passed": status == "passed"}]
    made = manifest(proof={"status": status, "class": "near", "gates": gates})
    text = card(Entry("", made, None))
    assert ("FAILED ITS PROOF" in text) == (status == "gate failed")
    assert "WAS NOT PROVED" not in text
    assert "no value is known" in section(text, "The proof")
    assert "`ppl_ratio` | 1.02" in section(text, "The proof")
    assert "report.html" not in text


def test_a_report_that_passed_beside_a_manifest_that_did_not_is_a_failure():
    made = manifest(proof={"status": "gate failed", "gates": []})
    assert "FAILED ITS PROOF" in card(Entry("", made, report(made)))


def test_a_proved_one_has_no_warning():
    assert "⚠" not in card(entry())


# Which file for which device


def test_the_row_of_an_artifact():
    take, planned, size, rounded, kl, top1, rate, memory = rows(card(entry()))[0]
    assert take.startswith("[`gpt-oss-20b-mxfp4-q8.gguf`](<gpt-oss-20b-mxfp4-q8.gguf>)")
    assert "llama.cpp, Ollama, LM Studio" in take
    assert "proof passed" in take
    assert "32,768&nbsp;tokens" in planned
    assert size == "12.1&nbsp;GB"
    assert rounded == "16-bit numbers to 8 bits: near-lossless"
    assert kl == "0.001&nbsp;±&nbsp;0.00015"
    assert top1 == "98.12%"
    assert re.fullmatch(r"[\d.,]+", rate)
    assert "14&nbsp;GB, predicted" in memory


def three():
    """By size: int4 is farther than q8 though larger; bf16 is the nearest."""
    found = []
    for name, nbytes, kl, loss in (
        ("q8", 12, 0.002, "near"),
        ("bf16", 14, 0.0005, "exact"),
        ("int4", 13, 0.02, "lossy"),
    ):
        made = manifest(recipe=name, files={f"{name}.gguf": {"bytes": nbytes * 10**9, "sha256": ""}})
        found.append(Entry(f"gguf-{name}", made, report(made, loss, kl)))
    return found


def test_several_are_listed_by_size_and_the_best_are_marked():
    text = card(*three())
    found = rows(text)
    assert [name for row in found for name in ("q8.gguf", "int4.gguf", "bf16.gguf") if f"/{name}`" in row[0]] == [
        "q8.gguf", "int4.gguf", "bf16.gguf",
    ]  # fmt: skip
    assert ["◆" in row[0] for row in found] == [True, False, True]
    assert "than gguf-q8, gguf-bf16." in text
    assert "![Size against KL](plots/size.svg)" in text
    assert section(text, "The proof").count("<details>") == 3
    assert section(text, "How to run it").count("### ") == 3


def test_how_to_run_many_is_folded():
    more = entry("mxfp4", prefix="mxfp4-mxfp4-bf16")
    text = section(card(*three(), more), "How to run it")
    assert "### " not in text
    assert "<summary>mxfp4-mxfp4-bf16: transformers, vLLM, TensorRT-LLM</summary>" in text


def test_one_that_failed_is_never_the_best():
    entries = three()
    bad = {**entries[0].report, "status": "gate failed"}
    text = card(Entry(entries[0].prefix, entries[0].manifest, bad), *entries[1:])
    assert "◆" not in rows(text)[0][0]


def test_speeds_of_two_machines_are_told_apart():
    first, second, _ = three()
    other = {**second.report, "hardware": {"cpu": "Another CPU", "cores": 64, "gpus": []}}
    text = card(first, Entry(second.prefix, second.manifest, other))
    assert [row[6][-3:] for row in rows(text)] == ["(A)", "(B)"]
    assert "B, a CPU (Another CPU, 64 cores)" in text
    assert "Not compared: gguf-bf16, speed" in text


def test_a_folder_is_linked_by_its_address_on_the_hub():
    found = [entry("onnx", target="cpu", prefix="onnx-a"), entry("onnx", target="cuda", prefix="onnx-b")]
    assert f"[`onnx-a/`](<https://huggingface.co/{REPO}/tree/main/onnx-a>)" in card(*found)
    assert "[`onnx-a/`](<onnx-a>)" in card(*found, repo="")


# How to run it


@pytest.mark.parametrize(
    ("fmt", "target", "lines"),
    [
        (
            "gguf",
            "",
            [
                f"llama-server -hf {REPO} --hf-file gpt-oss-20b-mxfp4-q8.gguf -c 32768 -fa on --jinja",
                f"`ollama run hf.co/{REPO}:gpt-oss-20b-mxfp4-q8.gguf`",
                "PARAMETER num_ctx 32768",
                f"lms get https://huggingface.co/{REPO}",
            ],
        ),
        ("onnx", "cpu", ["pip install onnxruntime-genai\n", 'og.Model("gpt-oss-20b-quantized")', "max_length=32768"]),
        ("onnx", "cuda", ["pip install onnxruntime-genai-cuda\n"]),
        ("mxfp4", "", [f"vllm serve {REPO} --max-model-len 32768", f"trtllm-serve {REPO} --backend pytorch"]),
        ("gptq", "gptqmodel", [f'GPTQModel.load("{REPO}", dtype=torch.float16)']),
        ("compressed-tensors", "", ["python scripts/load_folder.py gpt-oss-20b-quantized"]),
    ],
)
def test_commands(fmt, target, lines):
    text = section(card(entry(fmt, target=target)), "How to run it")
    for line in lines:
        assert line in text


def test_commands_of_an_artifact_in_a_folder():
    text = section(card(entry(prefix="gguf-q8")), "How to run it")
    assert "--hf-file gguf-q8/gpt-oss-20b-mxfp4-q8.gguf" in text
    assert f"hf download {REPO} --include 'gguf-q8/*' --local-dir gpt-oss-20b-quantized" in text
    assert "FROM ./gpt-oss-20b-quantized/gguf-q8/gpt-oss-20b-mxfp4-q8.gguf" in text
    assert "ollama run hf.co" not in text
    assert "vllm serve gpt-oss-20b-quantized/m" in card(entry("mxfp4", prefix="m"))
    trt = card(entry("tensorrt", target="sm120", prefix="trt"))
    assert "build_engines.py gpt-oss-20b-quantized/trt --sm 120" in trt
    assert "compute capability 12.0" in trt


def test_a_file_in_parts_is_merged_for_ollama():
    names = [f"big-0000{i}-of-00002.gguf" for i in (1, 2)]
    files = {name: {"bytes": 40 * 10**9, "sha256": ""} for name in reversed(names)}
    text = section(card(entry(files=files)), "How to run it")
    assert f"--hf-file {names[0]} " in text
    assert f"llama-gguf-split --merge gpt-oss-20b-quantized/{names[0]} gpt-oss-20b-quantized/big.gguf" in text
    assert "FROM ./gpt-oss-20b-quantized/big.gguf" in text
    assert "ollama run hf.co" not in text


def test_readers_of_the_other_kind_of_gptq_are_warned():
    assert "compute nonsense from this folder" in card(entry("gptq", target="by-name"))
    assert "GPTQModel.load" not in card(entry("gptq", target="by-name"))


def test_a_browser_s_files_name_their_type():
    files = {"onnx/model_q4f16.onnx": {"bytes": 1}, "onnx/model_q4f16.onnx_data": {"bytes": 10**9}}
    text = card(entry("onnx", target="webgpu", files=files))
    assert f'pipeline("text-generation", "{REPO}", {{ dtype: "q4f16", device: "webgpu" }})' in text
    local = card(entry("onnx", target="webgpu", files=files, prefix="web"))
    assert 'env.localModelPath = "./"' in local
    assert 'pipeline("text-generation", "gpt-oss-20b-quantized/web"' in local


def test_a_context_that_nothing_says_is_modest_and_said_to_be():
    text = card(Entry("", manifest(), None))
    assert "-c 8192" in text
    assert "a modest context" in text


# The proof, and where it comes from


def test_the_proof_says_where_it_ran_and_what_did_not():
    made = manifest()
    found = report(made)
    text = section(card(Entry("", made, found)), "The proof")
    assert f"Hardware: {found['target']['statement']}." in text
    assert "- **a GPU**: no engine was executed: there is no NVIDIA GPU here" in text
    for name in ("conversations", "plain text", "long text"):
        assert f"| {name} | " in text
    assert "[report.html](<report.html>)" in text


def test_where_it_comes_from():
    made = manifest(calibration={"text": "standard library of Python 3.11", "sha256": "cd" * 32})
    text = section(card(Entry("", made, report(made))), "Where it comes from")
    assert "[openai/gpt-oss-20b](<https://huggingface.co/openai/gpt-oss-20b>) at `6cee5e81" in text
    assert "recipe: `mxfp4-q8`, Released MXFP4" in text
    assert f"calibration text, SHA-256: `{'cd' * 32}`" in text
    assert "```sh\nexporter quantize openai/gpt-oss-20b --profile 16gb --format gguf\n```" in text
    assert "planned and proved for profile: 16gb" in text


@pytest.mark.parametrize("command", ["exporter quantize x; rm -rf ~", "exporter quantize $(id)", "rm -rf x"])
def test_a_command_that_does_anything_else_is_not_shown(command):
    assert command not in card(entry(command=command))


def test_pictures_are_drawings_that_load_nothing():
    made = make_card(REPO, three())
    of_each = {f"plots/gguf-{name}-{kind}.svg" for name in ("q8", "bf16", "int4") for kind in ("kl", "position")}
    assert made.pictures.keys() == {"plots/size.svg", *of_each}
    for path, raw in made.pictures.items():
        assert f"]({path})" in made.text
        names = {element.tag.rpartition("}")[2] for element in ET.fromstring(raw).iter()}
        assert names <= {"svg", "style", "title", "rect", "line", "path", "text", "tspan", "circle"}
        assert b"prefers-color-scheme:dark" in raw
        assert b"var(--paper)" in raw


def test_where_nothing_differs_nothing_is_drawn():
    made = manifest("mxfp4", "mxfp4-bf16")
    same = report(made, "exact", 0.0)
    for column in same["accuracy"].values():
        column["all"]["kl_mean"] = 0.0
    drawn = make_card(REPO, [Entry("", made, same)])
    assert drawn.pictures == {}
    assert "![" not in drawn.text


def test_the_same_facts_give_the_same_bytes():
    assert make_card(REPO, three()) == make_card(REPO, three())
    reordered = [Entry(e.prefix, dict(reversed(e.manifest.items())), dict(reversed(e.report.items()))) for e in three()]
    assert make_card(REPO, reordered).text == make_card(REPO, three()).text


# What is refused


@pytest.mark.parametrize(
    ("entries", "asked", "said"),
    [
        ([], {}, "one artifact at least"),
        ([entry()], {"repo": "no-user"}, "--repo"),
        ([entry()], {"repo": "a/b/c"}, "--repo"),
        ([entry()], {"license": "MIT License\nx: y"}, "--license"),
        ([entry()], {"base_model": "./folder"}, "--base-model"),
        ([entry(), entry(prefix="a")], {}, "stands alone"),
        ([entry(prefix="a"), entry(prefix="a")], {}, "no two lie in one folder"),
        ([entry(prefix="../up")], {}, "no name for a folder"),
        ([entry(prefix="plots")], {}, "no name for a folder"),
        ([entry(prefix="readme.md")], {}, "no name for a folder"),
        ([entry("tensorrt", target="sm80")], {}, "README.md of its own"),
    ],
)
def test_what_no_repository_can_be(entries, asked, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        make_card(**{"repo": REPO, "entries": entries, **asked})
