"""The matrix on the demo checkpoint, by the command: made and proved, found finished, judged together, published."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from exporter.errors import Refused
from exporter.pipeline.approval import approved, check, make_approved
from exporter.pipeline.cells import Settings, finished, planned, request_of, run_cell
from exporter.pipeline.profiles import source_text
from exporter.pipeline.progress import Progress
from exporter.pipeline.run import Run
from exporter.pipeline.seal import REPORTS
from tests.approving import resealed, uploaded
from tests.conftest import DEMO, run_exporter
from tests.loopback_hub import LoopbackHub

GGUF, MXFP4 = "tiny-gpt-oss/small/gguf-mxfp4-q8", "tiny-gpt-oss/small/mxfp4-mxfp4-bf16"
GGUF_FILE = "tiny-gpt-oss-mxfp4-q8.gguf"


def small_profile(folder, artifacts, name="small"):
    """A profile of these (format, recipe, target), proved on a short text."""
    text = source_text("cpu")
    made = "".join(f'[[artifact]]\nformat = "{f}"\nrecipe = "{r}"\ntarget = "{t}"\n\n' for f, r, t in artifacts)
    rest = (
        text[text.index("[validate]") :].replace("windows = 4", "windows = 2").replace("length = 512", "length = 256")
    )
    path = folder / f"{name}.toml"
    path.write_text(text[: text.index("[[artifact]]")] + made + rest)
    return path


@dataclass(frozen=True)
class Matrix:
    """`exporter matrix --run` of two cells of the demo, and what it answered."""

    profile: Path
    out: Path
    done: object

    def command(self, *arguments, out=None, profile=None, **more):
        where = ("--model", DEMO, "--profile", profile or self.profile)
        places = () if "--check" in arguments or out is False else ("--out", out or self.out)
        return run_exporter("matrix", *where, *places, *arguments, "--json", **more)

    def copy(self, root):
        """Its output folder to be changed at will; inodes are new, so source files are hashed again."""
        return Matrix(self.profile, shutil.copytree(self.out, root / "out"), self.done)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("matrix")
    matrix = Matrix(small_profile(root, [("gguf", "mxfp4-q8", ""), ("mxfp4", "mxfp4-bf16", "")]), root / "out", None)
    done = matrix.command("--run")
    assert done.code == 0, done.err
    return Matrix(matrix.profile, matrix.out, done)


def statuses(done):
    return {row["cell"]: (row["status"], row["done_before"]) for row in done.json["cells"]}


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hashes(folder):
    """SHA-256 of every file but the measured ones."""
    return {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith("report.")
    }


# Here


def test_all_cells_are_made_and_proved(made):
    assert statuses(made.done) == {GGUF: ("passed", False), MXFP4: ("passed", False)}
    for row in made.done.json["cells"]:
        assert row["path"] == str(made.out / row["cell"])
        assert row["metrics"]["kl_mean"] < 0.01
        assert all(gate["passed"] for gate in row["gates"])
    assert f"{GGUF}: passed" in made.done.err


def test_a_cell_is_what_the_main_job_makes(made, tmp_path):
    """The same bytes in the same place: the matrix is the main job, one artifact at a time."""
    done = run_exporter(
        *("quantize", "-p", made.profile, DEMO, "--format", "gguf", "--out", tmp_path, "--until", "export")
    )
    assert done.code == 0, done.err
    mine = next((tmp_path / GGUF).glob("*.gguf"))
    assert mine.read_bytes() == (made.out / GGUF / mine.name).read_bytes()


def test_what_is_finished_is_not_done_again(made, tmp_path):
    copy = made.copy(tmp_path)
    before = stamps(copy.out / "tiny-gpt-oss" / "small")
    done = copy.command("--run")
    assert done.code == 0, done.err
    assert statuses(done) == {GGUF: ("passed", True), MXFP4: ("passed", True)}
    assert stamps(copy.out / "tiny-gpt-oss" / "small") == before


def opened(matrix, profile=None):
    """The main job of the GGUF, with nothing done."""
    (each,) = planned([str(DEMO)], [str(profile or matrix.profile)], ["gguf"])
    return Run(request_of(each.cell, Settings(out=matrix.out)), Progress())


def shorter(folder):
    path = next(folder.glob("*.gguf"))
    path.write_bytes(path.read_bytes()[:-1])


def of_report(**changes):
    def change(folder):
        report = json.loads((folder / "report.json").read_text())
        (folder / "report.json").write_text(json.dumps(report | changes))

    return change


NOT_FINISHED = {
    "a file of another size": shorter,
    "no seal": lambda folder: (folder / "SHA256SUMS").unlink(),
    "no report": lambda folder: (folder / "report.json").unlink(),
    "a deep report": lambda folder: (folder / "report.json").write_text("[" * 200_000),
    "no folder": shutil.rmtree,
    "a report of another version": of_report(made={"exporter": "0.0.9"}),
    "a report of a gate that failed": of_report(status="gate failed"),
    "a report of other numbers": of_report(subject={"digest": "0" * 64}),
    "a report of another profile": of_report(profile={"name": "small", "sha256": "0" * 64}),
    "a report on another text": of_report(text={"source": "mine", "sha256": "0" * 64}),
}


@pytest.mark.parametrize("fault", NOT_FINISHED)
def test_what_is_not_finished(made, tmp_path, fault):
    copy = made.copy(tmp_path)
    assert finished(opened(copy)) is not None
    NOT_FINISHED[fault](copy.out / GGUF)
    assert finished(opened(copy)) is None


def test_another_profile_of_the_same_name_is_another_proof(made, tmp_path):
    profile = tmp_path / "small.toml"
    profile.write_text(made.profile.read_text().replace("export_kl_mean = 0.005", "export_kl_mean = 0.0051"))
    assert finished(opened(made, profile)) is None


def test_one_cell_that_fails_does_not_stop_the_others(made, tmp_path):
    copy = made.copy(tmp_path)
    (copy.out / GGUF / "manifest.json").write_text("{")
    done = copy.command("--run")
    assert done.code == 1
    rows = {row["cell"]: row for row in done.json["cells"]}
    assert rows[MXFP4]["status"] == "passed"
    assert rows[GGUF]["status"] == "error"
    assert "is not an artifact of ours" in rows[GGUF]["error"]["message"]
    assert rows[GGUF]["error"]["hint"]
    assert f"{GGUF}: error" in done.err


def test_a_proof_again_that_breaks_off_leaves_none(made, tmp_path):
    """The gate would take an older one for its own."""
    copy = made.copy(tmp_path)
    (each,) = planned([str(DEMO)], [str(copy.profile)], ["gguf"])
    gone = replace(each.cell, model=str(tmp_path / "nowhere"))
    assert run_cell(gone, Settings(out=copy.out, again=True), Progress()).status == "error"
    (found,) = check([each], proofs(copy, tmp_path / "proofs", [GGUF]))
    assert found.verdict == "missing"


def test_a_message_is_one_line(made, tmp_path):
    """A path may hold anything, and a workflow's log reads lines that begin with ::."""
    done = made.command("--run", GGUF, out=tmp_path / "a\n::error::b" / "c" / ("d" * 300))
    assert done.code == 1
    assert len(done.err.splitlines()) == 1
    assert "\n::error::b" in done.json["cells"][0]["error"]["message"]


def test_ctrl_c_ends_the_whole_and_the_same_command_goes_on(made, tmp_path):
    """In another output folder, with the same bytes as in one go. For stricter gates, which the artifact fails."""
    out, strict = tmp_path / "out", tmp_path / "small.toml"
    strict.write_text(made.profile.read_text().replace("release_kl_mean = 0.01", "release_kl_mean = 0.000001"))
    command = [sys.executable, "-m", "exporter", "matrix", "--model", str(DEMO), "--profile", str(strict)]
    command += ["--run", "--out", str(out), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        while not any(out.rglob("export.jsonl")):
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        answer, err = child.communicate(timeout=120)
    assert child.returncode == 130, err
    assert json.loads(answer)["exit_code"] == 130
    assert not (out / GGUF / "report.json").exists()
    done = made.command("--run", GGUF, out=out, profile=strict)
    assert done.code == 3, done.err
    assert statuses(done) == {GGUF: ("gate failed", False)}
    assert sha256(out / GGUF / GGUF_FILE) == sha256(made.out / GGUF / GGUF_FILE)
    done = made.command(GGUF, "--check", uploaded([out / GGUF], tmp_path / "proofs"), profile=strict)
    assert done.code == 3
    (row,) = done.json["cells"]
    assert row["status"] == "gate failed"
    assert any(each.startswith("release_kl_mean") and "(limit 1e-06)" in each for each in row["problems"])


# The gate


def proofs(made, folder, cells=(GGUF, MXFP4)):
    return uploaded([made.out / cell for cell in cells], folder)


def test_the_gate_passes_what_passed(made, tmp_path):
    summary = tmp_path / "summary.md"
    done = made.command("--check", proofs(made, tmp_path / "proofs"), "--summary", summary)
    assert done.code == 0, done.out
    assert done.json["status"] == "passed"
    assert "2 of 2 cells passed" in summary.read_text()
    assert f"| {GGUF} | ok | near |" in summary.read_text()


# The Hub


@pytest.fixture
def hub(tmp_path):
    with LoopbackHub() as server:
        yield server


def online(hub, tmp_path):
    return {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "hf_loopback",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
    }


def test_approved_cells_are_published_from_another_machine(made, hub, tmp_path):
    """Nothing but the proofs came along: the files are made again, and what is published is what was proved."""
    folder = proofs(made, tmp_path / "approved")
    out = tmp_path / "elsewhere"
    asked = ("--publish", "--namespace", "me", "--approved", folder, "--yes")
    done = made.command(*asked, out=out, env=online(hub, tmp_path))
    assert done.code == 0, done.err
    assert [row["repo"] for row in done.json["published"]] == ["me/tiny-gpt-oss-GGUF", "me/tiny-gpt-oss-MXFP4"]
    for cell, repo, prefix in ((GGUF, "GGUF", "small-gguf-mxfp4-q8/"), (MXFP4, "MXFP4", "")):
        there = hub.repos[f"me/tiny-gpt-oss-{repo}"]
        names = set(there.commits[there.refs["main"]])
        for path in (each for each in (made.out / cell).rglob("*") if each.is_file()):
            name = path.relative_to(made.out / cell)
            assert (out / cell / name).read_bytes() == path.read_bytes()
            assert f"{prefix}{name.as_posix()}" in names
    again = made.command(*asked, out=out, env=online(hub, tmp_path))
    assert again.code == 0, again.err
    assert [row["commit"] for row in again.json["published"]] == [row["commit"] for row in done.json["published"]]


def test_what_was_not_approved_is_not_published(made, hub, tmp_path):
    folder = proofs(made, tmp_path / "approved")
    shutil.rmtree(folder / "proof-1")
    asked = ("--publish", MXFP4, "--namespace", "me", "--approved", folder, "--yes")
    done = made.command(*asked, out=tmp_path / "elsewhere", env=online(hub, tmp_path))
    assert done.code == 4
    assert f"{MXFP4} is not approved: missing" in done.err
    assert not (tmp_path / "elsewhere").exists()
    assert hub.requests == []


DIFFERENT = {
    "other bytes": (lambda m: m["files"][GGUF_FILE].update(sha256="0" * 64), f"{GGUF_FILE} is not the file that was"),
    "other source": (lambda m: m["source"]["files"].update({"config.json": "0" * 64}), '"source" differs'),
    "other command": (lambda m: m.update(command="exporter quantize me/mine"), '"command" differs'),
    "other tensors": (lambda m: m["tensors"]["model.norm.weight"].update(method="gptq"), '"tensors" differs'),
    "more": (lambda m: m.update(licence="mine"), '"licence" differs'),
}


@pytest.mark.parametrize("fault", DIFFERENT)
def test_what_is_not_what_was_proved_is_not_published(made, tmp_path, fault):
    """Whoever writes all lists anew passes the gate, and not the machine that has the files."""
    change, said = DIFFERENT[fault]
    folder = proofs(made, tmp_path / "approved", [GGUF])
    resealed(change)(folder)
    cells = planned([str(DEMO)], [str(made.profile)], ["gguf"])
    (proved,) = approved(cells, folder).values()
    copy = made.copy(tmp_path)
    with pytest.raises(Refused, match=said):
        make_approved(cells[0], proved, Settings(out=copy.out), Progress())
    assert hashes(copy.out / GGUF) == hashes(made.out / GGUF)


def test_pages_that_came_along_are_not_published(made, tmp_path):
    """They say what report.json does, or nothing: they are made of it again."""
    folder = proofs(made, tmp_path / "approved", [GGUF])
    (folder / "proof-0" / "report.html").write_text("<script>")
    cells = planned([str(DEMO)], [str(made.profile)], ["gguf"])
    (proved,) = approved(cells, folder).values()
    copy = made.copy(tmp_path)
    for name in REPORTS:
        (copy.out / GGUF / name).unlink()
    made_here = make_approved(cells[0], proved, Settings(out=copy.out), Progress())
    assert {path.name: path.read_bytes() for path in made_here.iterdir()} == {
        path.name: path.read_bytes() for path in (made.out / GGUF).iterdir()
    }


def test_publishing_asks_first(made, hub, tmp_path):
    folder = proofs(made, tmp_path / "approved")
    done = made.command("--publish", "--namespace", "me", "--approved", folder, env=online(hub, tmp_path))
    assert done.code == 2
    assert "--yes" in done.err
    assert hub.requests == []


# Two runs

CALIBRATED = """
title = "INT4 experts of a short calibration"
[calibration]
windows = 2
length = 64
[gates]
export_kl_mean = 1.0
export_top1 = 0.1
release_kl_mean = 1.0
release_top1 = 0.1
release_kl_p999 = 10.0
release_flips = 1.0
conversations_kl_mean = 1.0
ppl_ratio = 3.0
nearest_is_released = false
[[rule]]
match = "model.layers.0.mlp.experts.*_proj.weight"
method = "gptq"
scheme = "int4-g64"
[[rule]]
match = "*.mlp.experts.*_proj.weight"
method = "rtn"
scheme = "int4-g64"
[[rule]]
match = ["*.self_attn.*_proj.weight", "lm_head.weight"]
method = "rtn"
scheme = "int8-g32"
[[rule]]
match = "*"
method = "keep"
"""


def calibrated_profile(folder):
    recipe = folder / "calibrated.toml"
    recipe.write_text(CALIBRATED)
    return small_profile(folder, [("onnx", str(recipe), "cpu")])


def test_two_runs_of_a_calibrated_cell_give_the_same_files(tmp_path):
    (each,) = planned([str(DEMO)], [str(calibrated_profile(tmp_path))])
    found = []
    for name in ("first", "second"):
        request = replace(request_of(each.cell, Settings(out=tmp_path / name)), until="export")
        (made,) = Run(request, Progress()).run().artifacts
        found.append(hashes(made.path))
    assert found[0] == found[1]
    assert {"model.onnx", "genai_config.json", "manifest.json"} <= set(found[0])


@pytest.mark.slow
def test_two_proofs_of_a_calibrated_cell_give_the_same_bytes(tmp_path):
    """In two output folders with two caches: also what the proof wrote into the manifest."""
    profile, found = calibrated_profile(tmp_path), []
    for name in ("first", "second"):
        out, cache = tmp_path / name, {"EXPORTER_CACHE": str(tmp_path / f"cache-{name}")}
        done = run_exporter("matrix", "--run", "--model", DEMO, "--profile", profile, "--out", out, "--json", env=cache)
        assert done.code in (0, 3), done.err
        assert [row["status"] for row in done.json["cells"]] != ["error"]
        found.append(hashes(out / "tiny-gpt-oss" / "small"))
    assert found[0] == found[1]
    assert "onnx-calibrated-cpu/provenance.json" in found[0]
