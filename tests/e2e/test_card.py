"""exporter card on real artifacts: what it writes, and that what it tells people to run runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import make_artifact, run_exporter

REPO = "me/tiny-gpt-oss-made"
NAME = REPO.rpartition("/")[2]


@pytest.fixture(scope="module")
def onnx(tmp_path_factory):
    """Exported, and neither hashed nor proved."""
    return make_artifact(tmp_path_factory.mktemp("onnx"), "onnx", "exact-q8", "cpu")


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)\n```$", text, re.DOTALL | re.MULTILINE)


def test_the_card_of_the_main_job(demo_run, tmp_path):
    done = run_exporter("card", demo_run.folder, "--repo", REPO, "-o", tmp_path / "card", "--json")
    assert done.code == 0, done.err
    answer = done.json
    assert answer["artifacts"] == [{"path": str(demo_run.folder), "folder": ""}]
    assert (tmp_path / "card" / "README.md").read_text() == answer["text"]
    written = sorted(str(path.relative_to(tmp_path / "card")) for path in (tmp_path / "card").rglob("*.*"))
    assert written == ["README.md", *answer["pictures"]]
    report = run_exporter("compare", demo_run.folder, "--json").json["artifacts"][0]
    assert f"{report['kl_mean']['conversations']:.3g}" in answer["text"]
    assert "WAS NOT PROVED" not in answer["text"]
    assert str(demo_run.out) not in answer["text"]


def test_stdout_is_the_card_and_nothing_else(demo_run):
    """The same bytes whatever order Python's sets have."""
    outputs = [run_exporter("card", demo_run.folder, env={"PYTHONHASHSEED": seed}).out for seed in ("1", "2")]
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("---\n")
    assert outputs[0].endswith("released.\n") or outputs[0].endswith("holds.\n")


def test_two_artifacts_lie_in_folders_of_their_own(demo_run, onnx):
    done = run_exporter("card", demo_run.folder, onnx, "--repo", REPO, "--json")
    assert done.code == 0, done.err
    assert [each["folder"] for each in done.json["artifacts"]] == ["gguf-mxfp4-q8", "onnx-exact-q8-cpu"]
    above = done.json["text"].split("## Which file")[0]
    assert "`onnx-exact-q8-cpu` WAS NOT PROVED" in above
    assert "`gguf-mxfp4-q8` WAS NOT PROVED" not in above


def test_folders_are_named_as_publish_names_them(demo_run, onnx, tmp_path):
    moved = shutil.copytree(demo_run.folder, tmp_path / "a download")
    done = run_exporter("card", moved, onnx, "--json")
    assert done.code == 0, done.err
    assert [each["folder"] for each in done.json["artifacts"]] == ["gguf-mxfp4-q8", "onnx-exact-q8-cpu"]


def test_the_hashes_are_checked_as_the_card_says(demo_run, tmp_path):
    text = run_exporter("card", demo_run.folder, "--repo", REPO).out
    shutil.copytree(demo_run.folder, tmp_path / NAME)
    _, _, check = blocks(text, "sh")[-2].partition(f"hf download {REPO} --local-dir {NAME} && ")
    done = subprocess.run(["sh", "-e", "-c", check], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "manifest.json: OK" in done.stdout
    with (tmp_path / NAME / "tiny-gpt-oss-mxfp4-q8.gguf").open("r+b") as f:
        f.seek(5_000_000)
        f.write(b"\xff")
    done = subprocess.run(["sh", "-e", "-c", check], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0


def test_the_python_lines_for_onnxruntime_genai_run(onnx, tmp_path):
    text = run_exporter("card", onnx, "--repo", REPO).out
    (script,) = blocks(text, "python")
    (tmp_path / NAME).symlink_to(onnx, target_is_directory=True)
    short = script.replace("max_length=8192", "max_length=160")
    assert short != script
    done = subprocess.run([sys.executable, "-c", short], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_llama_cpp_knows_the_flags(demo_run):
    """Those of the library that the proof runs in; llama-server itself is not in the wheel."""
    import xllamacpp

    text = run_exporter("card", demo_run.folder, "--repo", REPO).out
    (line,) = [line for block in blocks(text, "sh") for line in block.splitlines() if line.startswith("llama-server")]
    library = next(Path(xllamacpp.__file__).parent.glob("*.so")).read_bytes()
    flags = [*re.findall(r" (-[a-z-]+)", line), *re.findall(r"`(--[a-z-]+) ?\d*`", text)]
    assert {"--hf-file", "-c", "-fa", "--jinja", "--n-cpu-moe"} <= set(flags)
    assert "-c 32768" in line
    for flag in set(flags) - {"-hf"}:  # that one is so short that it is no string of its own
        assert b"\0" + flag.encode() + b"\0" in library


def test_hf_knows_the_options():
    hf = Path(sys.executable).with_name("hf")
    told = subprocess.run([hf, "download", "--help"], capture_output=True, text=True, check=True).stdout
    assert "--include" in told
    assert "--local-dir" in told


def test_one_artifact_twice_is_refused(demo_run):
    done = run_exporter("card", demo_run.folder, demo_run.folder)
    assert done.code == 2
    assert "two of the artifacts would lie in" in done.err


@pytest.mark.parametrize("name", ["nothing", "empty", "damaged"])
def test_what_is_no_artifact(name, tmp_path):
    if name != "nothing":
        (tmp_path / name).mkdir()
    if name == "damaged":
        (tmp_path / name / "manifest.json").write_text('{"exporter": ')
    done = run_exporter("card", tmp_path / name)
    assert done.code == 2
    assert "is no artifact of exporter's" in done.err
    assert done.err.count("\n") == 2


def test_the_proof_of_other_numbers_is_refused(demo_run, tmp_path):
    folder = shutil.copytree(demo_run.folder, tmp_path / "copy")
    text = (folder / "report.json").read_text()
    (folder / "report.json").write_text(re.sub(r'"digest": "[0-9a-f]{64}"', f'"digest": "{"0" * 64}"', text))
    done = run_exporter("card", folder)
    assert done.code == 1
    assert "is the proof of other numbers" in done.err


def test_what_is_in_the_way_stays(demo_run, tmp_path):
    (tmp_path / "card" / "README.md").mkdir(parents=True)
    done = run_exporter("card", demo_run.folder, "-o", tmp_path / "card")
    assert done.code == 1
    assert "README.md" in done.err
    assert (tmp_path / "card" / "README.md").is_dir()
