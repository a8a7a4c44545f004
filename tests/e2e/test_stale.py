"""What an earlier run left is used only where it is still right."""

import json
import os
import shutil
import subprocess
import sys

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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_another_checkpoint_of_the_same_name_and_times_is_another(tmp_path):
    """Container images and archives give every file one fixed time."""
    models = []
    for side, value in (("a", 1.0), ("b", 3.0)):
        folder = tmp_path / side / "m"
        folder.parent.mkdir()

        def edit(tensors, value=value):
            tensors["model.norm.weight"] = tensors["model.norm.weight"].clone() * value

        variants.edited(folder, edit)
        for path in folder.iterdir():
            os.utime(path, (1, 1))
        models.append(folder)
    out = tmp_path / "out"
    assert quantize(models[0], out).code == 0
    done = quantize(models[1], out)
    assert done.code == 4
    assert "holds another artifact" in done.err


def test_a_checkpoint_that_changes_while_it_is_read(tmp_path):
    model = variants.copy(tmp_path / "model")
    shard = next(model.glob("*.safetensors"))
    code = f"""
import sys
from exporter.pipeline import artifact
real = artifact.hash_files
def changed(paths, workers, progress):
    with open({str(shard)!r}, "r+b") as f:
        f.seek(-1, 2)
        f.write(b"!")
    return real(paths, workers, progress)
artifact.hash_files = changed
from exporter.cli import main
main(sys.argv[1:])
"""
    command = [sys.executable, "-c", code, "quantize", "-p", "16gb", str(model), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "changed while it was read" in done.stderr
    assert not list((tmp_path / "out").rglob("SHA256SUMS"))


@pytest.mark.parametrize("damage", ["removed", "cut"])
def test_an_artifact_without_its_file_is_made_again(damage, whole, tmp_path):
    assert quantize(DEMO, tmp_path).code == 0
    path = the_file(tmp_path)
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:3000])
    assert quantize(DEMO, tmp_path).code == 0
    assert the_file(tmp_path).read_bytes() == whole


@pytest.mark.slow
def test_an_edited_manifest_is_seen(tmp_path):
    assert quantize(DEMO, tmp_path, until="validate").code == 0
    manifest = made(tmp_path) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"hf-mxfp4"', '"original"'))
    done = quantize(DEMO, tmp_path, until="validate")
    assert done.code == 1
    assert "manifest.json is not the one in SHA256SUMS" in done.err


def test_a_verdict_does_not_outlive_its_artifact(tmp_path):
    assert quantize(DEMO, tmp_path, until="validate").code == 0
    path = the_file(tmp_path)
    raw = bytearray(path.read_bytes())
    raw[4:8] = b"\1\0\0\0"  # another version: it cannot be judged at all
    path.write_bytes(raw)
    assert quantize(DEMO, tmp_path, until="validate").code == 1
    assert not (made(tmp_path) / "report.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("key", ["truncation", "padding"])
def test_what_training_left_in_the_tokenizer_does_not_matter(key, tmp_path):
    model = variants.copy(tmp_path / "model")
    value = json.loads((model / "tokenizer.json").read_text())
    value["truncation" if key == "truncation" else "padding"] = {
        "truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 4096}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 2039, "pad_type_id": 0, "pad_token": "<|endoftext|>",
        },
    }[key]  # fmt: skip
    (model / "tokenizer.json").write_text(json.dumps(value))
    done = quantize(model, tmp_path / "out", until="validate")
    assert done.code == 0, done.out + done.err


def test_two_values_of_theta(tmp_path):
    model = variants.edited(tmp_path / "model", lambda tensors: None, rope_theta=10000)
    done = quantize(model, tmp_path / "out")
    assert done.code == 4
    assert "rope_theta" in done.err


def test_output_into_the_checkpoint_is_refused(tmp_path):
    model = variants.copy(tmp_path / "model")
    done = quantize(model, tmp_path)
    assert done.code == 2
    assert "is the checkpoint itself" in done.err


@pytest.mark.parametrize("target", ["../../../victim", "a/b", "a\\u0000b", ".", ""])
def test_a_target_is_a_plain_name(target, tmp_path):
    from exporter.pipeline.profiles import source_text

    profile = tmp_path / "p.toml"
    profile.write_text(
        source_text("16gb").replace('recipe = "mxfp4-q8"', f'recipe = "mxfp4-q8"\ntarget = "{target}"', 1)
    )
    done = run_exporter("quantize", "-p", profile, DEMO, "--out", tmp_path / "out", "--until", "quantize")
    assert done.code == (2 if target else 0)
    assert "not a plain name" in done.err or not target


@pytest.mark.parametrize("stream", ["0<&-", "1>&-", "2>&-"])
def test_a_closed_stream_does_not_matter(stream, tmp_path):
    command = f"{sys.executable} -m exporter quantize -p 16gb {DEMO} --until export --out {tmp_path} {stream}"
    assert subprocess.run(command, shell=True, capture_output=True, check=False).returncode == 0
    assert the_file(tmp_path).exists()
