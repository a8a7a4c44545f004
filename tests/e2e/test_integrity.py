"""exporter sign and exporter verify on a folder: what the commands say, and what they end with."""

import json
import shutil

import pytest

from tests.conftest import run_exporter
from tests.sealed import make_key, resealed


@pytest.fixture
def folder(demo_run, tmp_path):
    return shutil.copytree(demo_run.folder, tmp_path / "sealed")


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_seal_without_the_checkpoint(folder):
    done = run_exporter("verify", folder, "--json")
    assert (done.code, done.json["status"]) == (0, "sealed"), done.err
    (row,) = done.json["artifacts"]
    assert list(row["files"]) == ["tiny-gpt-oss-mxfp4-q8.gguf"]
    assert row["proof"] == {"status": "passed", "gates": 11, "failed": []}
    assert row["signature"] == "none"
    done = run_exporter("verify", folder)
    assert done.code == 0
    assert "its file (5.93 MB) as sealed; gates: passed, all 11; not signed" in done.out
    assert "nothing here says who made it" in done.out
    flip(folder / "tiny-gpt-oss-mxfp4-q8.gguf", 4_000_000)
    done = run_exporter("verify", folder)
    assert done.code == 1
    assert "is not the file that SHA256SUMS names: its bytes changed" in done.err
    (folder / "manifest.json").unlink()  # what is left is still no stranger's
    done = run_exporter("verify", folder)
    assert done.code == 1
    assert len(done.err.splitlines()) == 2


def test_signed_by_one_and_checked_by_another(folder, tmp_path):
    private, public = make_key(tmp_path, "maker")
    done = run_exporter("sign", folder, "--key", private)
    assert (done.code, done.out) == (0, f"{folder}/model.sig: 7 files signed\n"), done.err
    done = run_exporter("verify", folder, "--public-key", public)
    assert done.code == 0, done.err
    assert "signature good" in done.out
    assert f"signed by the owner of {public}" in done.out
    # A forger who changes a file and every list of it is stopped by nothing else.
    flip(folder / "tiny-gpt-oss-mxfp4-q8.gguf", 4_000_000)
    (folder / "model.sig").rename(tmp_path / "model.sig")
    resealed(folder)
    assert run_exporter("verify", folder).code == 0
    (tmp_path / "model.sig").rename(folder / "model.sig")
    done = run_exporter("verify", folder, "--public-key", public)
    assert done.code == 1
    assert "is not the file that was signed: its bytes changed" in done.err


def test_whole_and_of_nobody_one_trusts(folder, tmp_path):
    other, damaged = shutil.copytree(folder, tmp_path / "a" / "whole"), shutil.copytree(folder, tmp_path / "a" / "not")
    _, public = make_key(tmp_path, "maker")
    done = run_exporter("verify", other, "--public-key", public, "--json")
    assert (done.code, done.json["status"], done.json["artifacts"][0]["status"]) == (4, "untrusted", "untrusted")
    done = run_exporter("verify", other, "--public-key", public)
    assert done.code == 4
    assert "as sealed, but NOT to be trusted" in done.out
    # Damage is worse, and is what is told.
    flip(damaged / "tiny-gpt-oss-mxfp4-q8.gguf", 4_000_000)
    done = run_exporter("verify", tmp_path / "a", "--public-key", public, "--json")
    assert (done.code, done.json["status"]) == (1, "damaged")
    assert [row["status"] for row in done.json["artifacts"]] == ["damaged", "untrusted"]


def test_nothing_is_signed_where_one_of_the_folders_is_none(folder, tmp_path):
    private, _ = make_key(tmp_path, "maker")
    done = run_exporter("sign", folder, tmp_path / "none", "--key", private)
    assert done.code == 2
    assert f"no folder {tmp_path / 'none'}" in done.err
    assert not (folder / "model.sig").exists()


def test_the_root_is_no_folder_by_name(folder):
    done = run_exporter("verify", folder, "--folder", "absent")
    assert done.code == 2
    assert "leave --folder out: its artifact is at the root" in done.err


def test_a_verdict_that_failed_is_no_success(folder):
    report = json.loads((folder / "report.json").read_text())
    report["gates"][0]["passed"], report["status"] = False, "gate failed"
    (folder / "report.json").write_text(json.dumps(report))
    resealed(folder)
    done = run_exporter("verify", folder)
    assert done.code == 3
    assert f"gates: FAILED, {report['gates'][0]['name']}" in done.out
