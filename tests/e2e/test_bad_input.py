"""Bad input to the real command: one clear line, a hint, the right exit code, nothing left behind."""

import json
import os
import resource
import shutil
import subprocess
import sys

import pytest

from tests import variants
from tests.conftest import DEMO, run_exporter
from tests.variants import DAMAGES, damage, edited


def quantize(model, out, *more, **options):
    return run_exporter("quantize", "--profile", "16gb", model, "--out", out, "--until", "export", *more, **options)


def one_clear_line(done, code, *words):
    """One error line with `words`, at most one hint, no traceback."""
    assert done.code == code, done.err
    lines = done.err.splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) <= 2
    assert len(lines[0]) < 600
    for word in words:
        assert word in done.err
    return True


def nothing_final(out):
    return not [p for p in out.rglob("*.gguf") if not p.parent.name.endswith(".partial")]


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_checkpoint(kind, tmp_path):
    folder = damage(variants.copy(tmp_path / "model"), kind)
    done = quantize(folder, tmp_path / "out")
    assert one_clear_line(done, 4)
    assert "hint: " in done.err
    assert nothing_final(tmp_path / "out")


def poison(name, index, value):
    def edit(tensors):
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[index] = value

    return edit


L1 = "model.layers.1."
CONTENT = {
    "NaN in a norm": (poison(L1 + "input_layernorm.weight", 5, float("nan")), L1 + "input_layernorm.weight"),
    "infinity in a bias": (poison(L1 + "self_attn.q_proj.bias", 0, float("inf")), L1 + "self_attn.q_proj.bias"),
    "NaN in attention": (poison(L1 + "self_attn.o_proj.weight", 99, float("nan")), L1 + "self_attn.o_proj.weight"),
    "NaN in the router": (poison(L1 + "mlp.router.weight", 3, float("nan")), L1 + "mlp.router.weight"),
    "scale 255": (poison(L1 + "mlp.experts.down_proj_scales", 77, 255), L1 + "mlp.experts.down_proj.weight"),
}


@pytest.mark.parametrize("case", CONTENT)
def test_numbers_that_are_none(case, tmp_path):
    edit, tensor = CONTENT[case]
    folder = edited(tmp_path / "model", edit)
    assert one_clear_line(quantize(folder, tmp_path / "out"), 4, tensor, "exporter doctor")
    assert nothing_final(tmp_path / "out")
    doctor = run_exporter("doctor", folder, "--json")
    assert doctor.code == 4
    assert tensor.rpartition(".")[0].split(".")[-1] in json.dumps(doctor.json["findings"])


CONFIGS = {
    "another activation limit": ({"swiglu_limit": 5.0}, "swiglu_limit"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "layers that do not alternate": ({"layer_types": ["full_attention"] * 4}, "alternate"),
    "another rope": ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_llama_cpp_would_compute_differently(case, tmp_path):
    changes, word = CONFIGS[case]
    folder = edited(tmp_path / "model", lambda tensors: None, **changes)
    assert one_clear_line(quantize(folder, tmp_path / "out"), 4, word)


def edit_tokenizer(edit):
    def apply(folder):
        path = folder / "tokenizer.json"
        value = json.loads(path.read_text())
        edit(value)
        path.write_text(json.dumps(value))

    return apply


def fewer_ids(value):
    value["model"]["vocab"] = {t: i for t, i in value["model"]["vocab"].items() if i < 1000}


def other_regex(value):
    value["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\s+"


def id_outside(value):
    value["added_tokens"][-1]["id"] = 5000


TOKENIZERS = {
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "not JSON": (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json"),
    "fewer ids than the vocabulary": (edit_tokenizer(fewer_ids), "ids have no token"),
    "another regex": (edit_tokenizer(other_regex), "o200k"),
    "an id outside the vocabulary": (edit_tokenizer(id_outside), "outside the vocabulary"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_bad_tokenizer(case, tmp_path):
    spoil, word = TOKENIZERS[case]
    folder = variants.copy(tmp_path / "model")
    spoil(folder)
    assert one_clear_line(quantize(folder, tmp_path / "out"), 4, word)
    assert not (tmp_path / "out").exists()


USAGE = {
    "no such command": (["quantise"], "Did you mean"),
    "no such profile": (["plan", "-p", "16g", "20b"], 'Did you mean "16gb"?'),
    "no such format": (["plan", "-p", "16gb", "-f", "ggfu", "20b"], 'Did you mean "gguf"?'),
    "no such recipe": (["plan", "-p", "16gb", "--recipe", "mxfp4-q9", "20b"], "Did you mean"),
    "no such folder": (["inspect", "./nowhere"], "no folder ./nowhere"),
    "no such option": (["plan", "--profle", "16gb"], "--profile"),
    "not a size": (["quantize", "-p", "16gb", "--max-memory", "lots", "20b"], "is not a size"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage(case):
    arguments, word = USAGE[case]
    assert one_clear_line(run_exporter(*arguments), 2, word)


def test_too_little_memory(tmp_path):
    assert one_clear_line(quantize(DEMO, tmp_path / "out", "--max-memory", "200M"), 4, "--max-memory")


def test_what_does_not_fit_is_refused_before_any_work():
    done = run_exporter("plan", "--profile", "16gb", "120b")
    assert done.code == 4
    assert "take a larger --profile" in done.err


def test_output_of_other_numbers_is_not_replaced_unasked(tmp_path):
    model, out = variants.copy(tmp_path / "model"), tmp_path / "out"
    assert quantize(model, out).code == 0
    shutil.rmtree(model)
    edited(model, poison("model.norm.weight", 0, 1.5))
    assert one_clear_line(quantize(model, out), 4, "--overwrite")
    before = next(out.rglob("*.gguf")).read_bytes()
    assert quantize(model, out, "--overwrite").code == 0
    assert next(out.rglob("*.gguf")).read_bytes() != before
    assert not list(out.rglob("*.old"))


def test_a_file_that_may_not_grow(tmp_path):
    """A quota or a file system's limit, met while files are laid out."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # noqa: E731
    command = [sys.executable, "-m", "exporter", "quantize", "-p", "16gb", str(DEMO), "--until", "export"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], preexec_fn=limit, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "error: the file is larger than" in done.stderr
    assert "Traceback" not in done.stderr
    assert nothing_final(tmp_path)
    assert quantize(DEMO, tmp_path).code == 0


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 6 MB: enough for the store, not for the artifact."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", mount], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("needs the right to mount a file system")
    yield mount
    subprocess.run(["umount", mount], check=True)


def test_full_disk_is_refused_before_work(small_disk):
    assert one_clear_line(quantize(DEMO, small_disk / "out"), 4, "free, this needs")


def test_disk_that_fills_up_meanwhile(small_disk, tmp_path):
    """Someone else takes the space after the check; the same command goes on once there is room again."""
    hog = small_disk / "hog"
    script = """
import os, sys
from exporter.pipeline import before
before.shutil.disk_usage = lambda path: type("U", (), {"free": 10**12})
from exporter.cli import main
main(sys.argv[1:])
"""
    hog.write_bytes(bytes(3 << 20))
    out = small_disk / "out"
    command = [
        sys.executable,
        "-c",
        script,
        "quantize",
        "-p",
        "16gb",
        str(DEMO),
        "--until",
        "export",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "the disk is full" in done.stderr
    assert "run the same command" in done.stderr
    assert nothing_final(out)
    hog.unlink()
    subprocess.run(["mount", "-o", "remount,size=40m", small_disk], check=True)
    assert quantize(DEMO, out).code == 0


def test_errors_are_one_json_object_when_asked():
    done = run_exporter("plan", "-p", "16gb", "./nowhere", "--json")
    assert done.code == 2
    assert done.json["exit_code"] == 2
    assert "nowhere" in done.json["message"]
