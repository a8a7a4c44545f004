"""What an earlier run left is used only where it is still right."""

import shutil

import pytest

from tests import variants
from tests.conftest import DEMO, run_exporter


def quantize(model, out, *more, until="export"):
    return run_exporter("quantize", "-p", "16gb", model, "--out", out, "--until", until, *more)


def made(out, model="tiny-gpt-oss"):
    return out / model / "16gb" / "gguf-mxfp4-q8"


def the_file(out, model="tiny-gpt-oss"):
    return next(made(out, model).glob("*.gguf"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The artifact's bytes, from a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    assert quantize(DEMO, out).code == 0
    return the_file(out).read_bytes()


@pytest.mark.parametrize("file", ["chat_template.jinja", "generation_config.json"])
def test_a_changed_small_file_is_another_artifact(file, tmp_path):
    model, out = variants.copy(tmp_path / "model"), tmp_path / "out"
    assert quantize(model, out).code == 0
    text = (model / file).read_text()
    (model / file).write_text(text.replace("2038", "2039") if file.endswith("json") else text + " ")
    done = quantize(model, out)
    assert done.code == 4
    assert "holds another artifact" in done.err
    before = the_file(out, "model").read_bytes()
    assert quantize(model, out, "--overwrite").code == 0
    assert the_file(out, "model").read_bytes() != before


@pytest.mark.parametrize("damage", ["removed", "cut", "zeroed"])
def test_a_store_that_rotted_is_mended(damage, whole, tmp_path):
    assert quantize(DEMO, tmp_path).code == 0
    data = next(tmp_path.rglob("data.bin"))
    if damage == "removed":
        data.unlink()
    elif damage == "cut":
        data.write_bytes(data.read_bytes()[:100_000])
    else:
        data.write_bytes(bytes(data.stat().st_size))
    shutil.rmtree(made(tmp_path))
    assert quantize(DEMO, tmp_path).code == 0
    assert the_file(tmp_path).read_bytes() == whole


@pytest.mark.parametrize("line", [b"\0" * 40 + b"\n", b'{"tensor": "lm_h{"tensor": "x"}\n', b"[]\n", b"\xff\xfe\n"])
def test_a_damaged_journal_costs_only_what_it_said(line, whole, tmp_path):
    assert quantize(DEMO, tmp_path, until="quantize").code == 0
    journal = next(tmp_path.rglob("journal.jsonl"))
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:50], line, *lines[50:]]))
    done = quantize(DEMO, tmp_path)
    assert done.code == 0, done.err
    assert the_file(tmp_path).read_bytes() == whole


def test_a_byte_of_metadata_that_changed_fails_a_gate(tmp_path):
    assert quantize(DEMO, tmp_path, until="validate").code == 0
    path = the_file(tmp_path)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"{%- for m in messages -%}", b"{%- for m in messagez -%}", 1))
    done = quantize(DEMO, tmp_path, "--json", until="validate")
    assert done.code == 3
    assert [g["name"] for g in done.json["artifacts"][0]["gates"] if not g["passed"]] == ["head_equal"]


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    folder = made(tmp_path)
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    for more in ([], ["--overwrite"]):
        done = quantize(DEMO, tmp_path, *more)
        assert done.code == 4
        assert "not an artifact of ours" in done.err
    assert (folder / "thesis.txt").read_text() == "years of work"


def test_stray_files_of_odd_content_are_no_obstacle(tmp_path):
    assert quantize(DEMO, tmp_path, until="validate").code == 0
    (tmp_path / "tiny-gpt-oss" / "source-hashes.json").write_text("[]")
    for path in (tmp_path / "tiny-gpt-oss" / "reference").glob("*.npz"):
        path.write_bytes(b"PK\x03\x04 not a zip")
    shutil.rmtree(made(tmp_path))
    done = quantize(DEMO, tmp_path, until="validate")
    assert done.code == 0, done.err


@pytest.mark.parametrize("device", ["foo", "cuda:99", ""])
def test_a_device_that_is_not_there_is_said_before_any_work(device, tmp_path):
    done = quantize(DEMO, tmp_path, "--device", device, until="validate")
    assert done.code == 2
    assert "device" in done.err
    assert not list(tmp_path.rglob("journal.jsonl"))


def test_a_refused_plan_is_one_json_object():
    for command in (["plan", "-p", "16gb", "120b"], ["fit", "-p", "16gb", "120b"]):
        done = run_exporter(*command, "--json")
        assert done.code == 4
        assert done.json


@pytest.mark.parametrize("key", ["mscale", "attention_factor", "short_factor"])
def test_a_rotation_that_no_runtime_of_ours_computes(key, tmp_path):
    rope = {**variants.demo_config()["rope_scaling"], key: 0.5}
    model = variants.edited(tmp_path / "model", lambda tensors: None, rope_scaling=rope)
    done = quantize(model, tmp_path / "out")
    assert done.code == 4
    assert key in done.err
