"""Which cells there are, where each runs, what each is published as: known before any weight is read."""

import json
import shutil
from dataclasses import replace

import pytest
from click.testing import CliRunner

from exporter.cli import cli
from exporter.errors import ExporterError, Refused, UsageError
from exporter.pipeline.cells import Cell, CellResult, Settings, cells, described, planned, request_of
from exporter.pipeline.matrix import HOSTED, chosen, exit_code, include, jobs, runner_of
from exporter.pipeline.profiles import source_text
from tests.conftest import DEMO

GPU16, GPU80 = ("self-hosted", "gpu", "16gb"), ("self-hosted", "gpu", "80gb")


@pytest.fixture(scope="module")
def demo():
    return planned([str(DEMO)])


@pytest.fixture(scope="module")
def released():
    return planned()


def profile_file(folder, name="mine", memory="15.9GiB", device="gpu", artifacts=(("gguf", "mxfp4-q8", ""),)):
    """A profile of other artifacts, on other hardware."""
    text = source_text("16gb").replace('"15.9GiB"', f'"{memory}"').replace('"gpu"', f'"{device}"')
    made = "".join(f'[[artifact]]\nformat = "{f}"\nrecipe = "{r}"\ntarget = "{t}"\n\n' for f, r, t in artifacts)
    path = folder / f"{name}.toml"
    path.write_text(text[: text.index("[[artifact]]")] + made + text[text.index("[validate]") :])
    return path


# Which there are


def test_every_artifact_of_every_profile_is_a_cell(demo):
    names = [each.cell.name for each in demo]
    assert len(names) == len(set(names)) == 23
    assert names[0] == "tiny-gpt-oss/16gb/gguf-mxfp4-q8"
    assert "tiny-gpt-oss/24gb/onnx-mxfp4-q8-cuda" in names


def test_without_a_model_each_profile_has_its_own(released):
    models = {each.cell.profile: each.cell.model for each in released}
    assert models["16gb"] == "openai/gpt-oss-20b"
    assert models["80gb"] == "openai/gpt-oss-120b"


def test_what_does_not_fit_is_left_out_and_said():
    said = []
    found = cells(["openai/gpt-oss-120b"], left_out=lambda cell, reason: said.append((cell.name, reason)))
    assert {cell.profile for cell in found} == {"80gb"}
    assert len(found) + len(said) == 23
    assert dict(said)["gpt-oss-120b/16gb/gguf-mxfp4-q8"].endswith("at a context of 32,768; 16gb has 16.3 GB")


def test_a_context_beyond_the_model_is_left_out(tmp_path):
    folder = shutil.copytree(DEMO, tmp_path / "short")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 65536}))
    said = []
    found = cells([str(folder)], formats=["gguf"], left_out=lambda cell, reason: said.append(reason))
    assert {cell.profile for cell in found} == {"16gb", "cpu"}
    assert all("beyond the model's 65,536" in reason for reason in said)


def test_listing_reads_no_weights(tmp_path, demo):
    """Of shards that hold only their headers, the rest a hole, the cells are the same."""
    folder = shutil.copytree(DEMO, tmp_path / "tiny-gpt-oss")
    for shard in folder.glob("*.safetensors"):
        raw = shard.read_bytes()
        head = 8 + int.from_bytes(raw[:8], "little")
        with open(shard, "r+b") as f:
            f.truncate(head)
            f.truncate(len(raw))
    assert [c.name for c in cells([str(folder)])] == [each.cell.name for each in demo]


def test_profiles_formats_and_targets_take_some():
    assert {c.format for c in cells([str(DEMO)], formats=["onnx"])} == {"onnx"}
    assert [c.name for c in cells([str(DEMO)], ["16gb"], targets=["webgpu"])] == [
        "tiny-gpt-oss/16gb/onnx-gptq-int4-g64-webgpu"
    ]


def test_a_profile_in_a_file_names_its_cells_by_its_name(tmp_path):
    path = profile_file(tmp_path)
    (cell,) = cells([str(DEMO)], [str(path)])
    assert cell.name == "tiny-gpt-oss/mine/gguf-mxfp4-q8"
    assert request_of(cell, Settings(out=tmp_path)).profile == str(path)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"profiles": ["16bg"]}, 'Did you mean "16gb"'),
        ({"formats": ["ggfu"]}, 'Did you mean "gguf"'),
        ({"targets": ["webgup"]}, 'Did you mean "webgpu"'),
        ({"profiles": ["80gb"], "formats": ["onnx"]}, "no such cell"),
        ({"models": ["openai/gpt-oss-120b"], "profiles": ["cpu"]}, "needs 65.3 GB"),
    ],
)
def test_unknown_names_are_said(asked, said):
    with pytest.raises(UsageError) as caught:
        cells(**asked)
    assert said in caught.value.message


def test_two_models_of_one_name_are_refused(tmp_path):
    twin = shutil.copytree(DEMO, tmp_path / "tiny-gpt-oss")
    with pytest.raises(UsageError, match="both called tiny-gpt-oss"):
        cells([str(DEMO), str(twin)])


def test_a_cell_is_one_artifact(tmp_path):
    path = profile_file(tmp_path, artifacts=(("gguf", "mxfp4-q8", ""), ("gguf", "mxfp4-bf16", "")))
    with pytest.raises(UsageError, match="more than one gguf"):
        cells([str(DEMO)], [str(path)])


# As GitHub reads it


def test_each_runs_on_the_smallest_machine_that_holds_its_profile(demo, released):
    by_name = {each.cell.name: runner_of(each) for each in (*demo, *released)}
    assert by_name["gpt-oss-20b/16gb/gguf-mxfp4-q8"] == GPU16
    assert by_name["gpt-oss-20b/24gb/gguf-mxfp4-bf16"] == GPU80
    assert by_name["gpt-oss-120b/80gb/gguf-mxfp4-bf16"] == GPU80
    assert by_name["tiny-gpt-oss/cpu/gguf-mxfp4-q8"] == HOSTED
    # 20b and its artifact are more than the disk of a hosted runner.
    assert by_name["gpt-oss-20b/cpu/gguf-mxfp4-q8"] == GPU80


def test_hosted_runners_take_all_when_told(released):
    assert {job.runs_on for job in jobs(released, hosted=True)} == {HOSTED}


def test_a_profile_that_no_runner_holds_is_said(tmp_path):
    (each,) = planned([str(DEMO)], [str(profile_file(tmp_path, memory="141GiB"))])
    with pytest.raises(UsageError, match="no runner has the 151 GB of profile mine"):
        runner_of(each)


def test_repositories_are_named_as_people_look_for_them(tmp_path, released):
    repos = {job.cell.name: job.repo for job in jobs(released)}
    assert repos["gpt-oss-20b/16gb/gguf-mxfp4-q8"] == "gpt-oss-20b-GGUF"
    assert repos["gpt-oss-20b/24gb/onnx-mxfp4-q8-cuda"] == "gpt-oss-20b-ONNX"
    assert repos["gpt-oss-120b/80gb/tensorrt-mxfp4-bf16-sm120"] == "gpt-oss-120b-TensorRT"
    asked = (("gptq", "gptq-int4", ""), ("compressed-tensors", "gptq-int8", ""))
    found = jobs(planned([str(DEMO)], [str(profile_file(tmp_path, artifacts=asked))]))
    assert [job.repo for job in found] == ["tiny-gpt-oss-GPTQ-Int4", "tiny-gpt-oss-W8A16"]


def test_what_lies_in_a_root_is_published_once(tmp_path, released):
    same = [job for job in jobs(released) if job.cell.format == "mxfp4"]
    assert [job.repo for job in same] == ["gpt-oss-20b-MXFP4", "", "", "gpt-oss-120b-MXFP4"]
    first = profile_file(tmp_path, "first", artifacts=(("gptq", "gptq-int4", ""),))
    second = profile_file(tmp_path, "second", artifacts=(("gptq", "gptq-int4-g64", ""),))
    other = jobs(planned([str(DEMO)], [str(first), str(second)]))
    assert [job.repo for job in other] == ["tiny-gpt-oss-GPTQ-Int4", "tiny-gpt-oss-GPTQ-Int4-gptq-int4-g64"]


def test_github_takes_256_cells(demo):
    (first, *_) = jobs(demo)
    assert len(include([first] * 256)["include"]) == 256
    with pytest.raises(UsageError, match="257 cells are more than the 256"):
        include([first] * 257)


def test_names_and_patterns_choose(demo):
    names = [each.cell.name for each in chosen(demo, ["*/16gb/onnx-*", "tiny-gpt-oss/cpu/gguf-mxfp4-q8"])]
    assert names == [
        "tiny-gpt-oss/16gb/onnx-gptq-int4-g64-cpu",
        "tiny-gpt-oss/16gb/onnx-gptq-int4-g64-webgpu",
        "tiny-gpt-oss/cpu/gguf-mxfp4-q8",
    ]
    with pytest.raises(UsageError, match='Did you mean "tiny-gpt-oss/cpu/gguf-mxfp4-q8"'):
        chosen(demo, ["tiny-gpt-oss/cpu/gguf-mxfp4"])
    with pytest.raises(Refused, match="needs more than there is"):
        chosen(demo, ["a/16gb/gguf-x"], {"a/16gb/gguf-x": "it needs more than there is"})


def test_brackets_in_a_name_are_no_pattern(tmp_path):
    folder = shutil.copytree(DEMO, tmp_path / "tiny[1]")
    found = planned([str(folder)], ["cpu"], ["gguf"])
    assert chosen(found, ["tiny[1]/cpu/gguf-mxfp4-q8"]) == found


# What became of them


def test_an_error_outranks_a_gate():
    assert exit_code(["passed", "passed"]) == 0
    assert exit_code(["passed", "gate failed"]) == 3
    assert exit_code(["gate failed", "error", "passed"]) == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ExporterError("broken", hint="mend it"), "broken"),
        (OSError(28, "No space left on device", "/out/x"), "/out/x: No space left on device"),
        (MemoryError(), "out of memory"),
        (RuntimeError("torch\nsays more"), "internal error: RuntimeError: torch"),
    ],
)
def test_what_went_wrong_is_kept(error, message):
    assert described(error)["message"] == message
    cell = Cell("a/m", "m", "16gb", "gguf", "mxfp4-q8")
    row = CellResult(cell, "error", error=described(error)).json()
    assert row["cell"] == "m/16gb/gguf-mxfp4-q8"
    assert json.loads(json.dumps(row))["error"]["message"] == message


# The command


def run(*arguments):
    return CliRunner().invoke(cli, ["matrix", *map(str, arguments)], catch_exceptions=True)


def test_the_list_is_one_line_of_json(tmp_path):
    output = tmp_path / "output"
    output.write_text("before=1\n")
    done = run("--model", DEMO, "--runner", "hosted", "--output", output)
    assert done.exit_code == 0
    (line,) = done.stdout.splitlines()
    rows = json.loads(line)["include"]
    assert len(rows) == 23
    assert rows[0] == {
        "cell": "tiny-gpt-oss/16gb/gguf-mxfp4-q8",
        "model": str(DEMO),
        "profile": "16gb",
        "format": "gguf",
        "recipe": "mxfp4-q8",
        "target": "",
        "runs_on": ["ubuntu-latest"],
        "repo": "tiny-gpt-oss-GGUF",
    }
    before, matrix, publish = output.read_text().splitlines()
    assert (before, matrix) == ("before=1", f"matrix={line}")
    assert json.loads(publish.removeprefix("publish="))["include"] == [row for row in rows if row["repo"]]


def test_variables_are_options_too(monkeypatch):
    """As the workflow passes what people typed: no shell reads it."""
    monkeypatch.setenv("EXPORTER_MATRIX_MODELS", f"{DEMO} openai/gpt-oss-20b")
    monkeypatch.setenv("EXPORTER_MATRIX_PROFILES", "cpu 16gb")
    monkeypatch.setenv("EXPORTER_MATRIX_FORMATS", "")
    rows = json.loads(run().stdout)["include"]
    assert {row["cell"].rsplit("/", 1)[0] for row in rows} == {
        "tiny-gpt-oss/16gb",
        "tiny-gpt-oss/cpu",
        "gpt-oss-20b/16gb",
        "gpt-oss-20b/cpu",
    }


def test_a_person_gets_a_table_and_hears_what_is_left_out():
    done = run("--model", "120b", "--table")
    assert "self-hosted gpu 80gb" in done.stdout
    assert "gpt-oss-120b-TensorRT" in done.stdout
    assert "left out: gpt-oss-120b/cpu/gguf-mxfp4-q8" in done.stderr
    assert run("--model", "120b", "--table", "-q").stderr == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--run", "--check", "x"), "--run and --check are two jobs"),
        (("--again",), "--again goes with --run"),
        (("--run", "--summary", "x"), "--summary goes with --check"),
        (("--check", "x", "--out", "y"), "--out goes with --run or --publish"),
        (("--publish", "--namespace", "me"), "--publish needs --namespace USER and --approved FOLDER"),
        (("--publish", "--namespace", "me/x", "--approved", "y"), '--namespace: "me/x" is no name of a user'),
    ],
)
def test_options_of_another_job_are_refused(arguments, said):
    error = run(*arguments).exception
    assert isinstance(error, UsageError)
    assert error.message == said


def test_the_request_is_the_main_job_of_one_artifact(tmp_path):
    cell = Cell("a/m", "m", "24gb", "onnx", "mxfp4-q8", "cuda")
    settings = Settings(out=tmp_path, max_memory=10**9, device="cpu")
    request = request_of(cell, settings)
    assert (request.model, request.profile, request.formats, request.targets) == ("a/m", "24gb", ("onnx",), ("cuda",))
    assert (request.out, request.max_memory, request.device, request.until) == (tmp_path, 10**9, "cpu", "validate")
    assert request_of(replace(cell, target=""), settings).targets == ()
