"""What people see: help, answers, JSON, progress in a terminal."""

import os
import pty
import re
import subprocess
import sys

import pytest

from exporter.cli import COMMANDS
from tests.conftest import DEMO, run_exporter

EVERY = {name: text for section in COMMANDS.values() for name, (_, text) in section.items()}


@pytest.mark.parametrize("name", EVERY)
def test_help_of_every_command(name):
    done = run_exporter(name, "--help")
    assert done.code == 0
    assert EVERY[name] in done.out  # the line in `exporter --help` is the command's own first line
    assert done.err == ""


def test_version():
    import exporter

    assert run_exporter("--version").out == f"exporter {exporter.__version__}\n"


def test_no_command_is_help():
    done = run_exporter()
    assert "Usage: exporter" in done.out + done.err


def test_plan_of_the_released_models_needs_nothing():
    done = run_exporter("plan", "--profile", "80gb", "openai/gpt-oss-120b", "--json", env={"HF_HUB_OFFLINE": "1"})
    assert done.code == 0, done.err
    answer = done.json
    assert answer["parameters"] == 116_829_156_672
    assert answer["artifacts"][0]["fit"]["fits"] is True
    experts = [g for g in answer["artifacts"][0]["groups"] if g["tensors"] == "expert"]
    assert sum(g["bytes"] for g in experts) == 60_914_073_600


def test_dry_run_is_plan_and_writes_nothing(tmp_path):
    plan = run_exporter("plan", "-p", "16gb", DEMO)
    dry = run_exporter("quantize", "-p", "16gb", DEMO, "--dry-run", "--out", tmp_path / "out")
    assert dry.code == 0
    assert dry.out == plan.out
    assert not (tmp_path / "out").exists()


def test_fit_counts_the_cache():
    done = run_exporter("fit", "--profile", "16gb", "--context", "32768", "20b", "--json")
    (row,) = done.json["artifacts"]
    assert row["kv_full"] == 32768 * 24576
    parts = ("weights", "kv_full", "kv_sliding", "logits", "scratch", "runtime")
    assert row["total"] == sum(row[p] for p in parts)
    assert run_exporter("fit", "--profile", "16gb", "--context", "131072", "20b").code == 4


def test_inspect():
    facts = run_exporter("inspect", DEMO, "--json").json
    assert facts["layout"] == "hf-mxfp4"
    assert facts["parameters"] == 8_902_176
    assert facts["predicted_bytes"] == facts["tensor_bytes"] == 7_408_704


def test_doctor_of_a_sound_checkpoint():
    answer = run_exporter("doctor", DEMO, "--json").json
    assert answer["sound"] is True
    assert answer["weights_read"] is True


def test_lists():
    assert {p["name"] for p in run_exporter("profiles", "--json").json["profiles"]} == {
        "16gb",
        "24gb",
        "48gb",
        "80gb",
        "cpu",
    }
    assert run_exporter("formats", "--json").json["gguf"]["schemes"]["mxfp4"] == "MXFP4"
    printed = run_exporter("profiles", "16gb")
    assert printed.out.startswith('title = "16 GB GPU"')


def test_variables_mirror_options():
    done = run_exporter("fit", "20b", "--json", env={"EXPORTER_FIT_PROFILE": "24gb"})
    assert done.json["profile"] == "24gb"


def test_a_closed_pipe_is_no_traceback():
    command = f"{sys.executable} -m exporter plan -p 16gb 20b | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


def in_terminal(*arguments):
    """stdout through a pipe, stderr on a real terminal: (exit code, stdout, what the terminal showed)."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "exporter", *map(str, arguments)]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "140", "LINES": "40"}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:
        pass  # Linux: the other side has closed
    out, _ = child.communicate(timeout=60)
    os.close(ours)
    return child.returncode, out.decode(), re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())


def test_progress_where_a_person_looks(tmp_path):
    code, out, shown = in_terminal("quantize", "-p", "16gb", DEMO, "--until", "export", "--out", tmp_path)
    assert code == 0
    assert out.startswith("gguf-mxfp4-q8  exported")
    for words in ("quantize", "export gguf", "peak", " of 5.86 MB"):
        assert words in shown


def test_no_progress_when_asked_for_quiet_or_json(tmp_path):
    assert in_terminal("quantize", "-p", "16gb", DEMO, "--until", "quantize", "--out", tmp_path, "-q")[2] == ""
    assert in_terminal("quantize", "-p", "16gb", DEMO, "--until", "export", "--out", tmp_path, "--json")[2] == ""
