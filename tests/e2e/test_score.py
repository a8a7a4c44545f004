"""exporter score: harnesses that are not there, fail, hang or leave nothing; each is one clear line.

The real lm-eval is in tests/oracle/test_lm_eval.py; here small programs stand in its place and misbehave.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import DEMO, Done, run_exporter
from tests.served import make


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("score"), ("gguf", "mxfp4-q8", ""))["gguf"]


def score(artifact: Path, folder: Path, program: str, *arguments: Any) -> Done:
    """With `program` in the place of lm-eval."""
    package = folder / "modules" / "lm_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text("import json, os, sys, time\n" + program)
    environment = {"PYTHONPATH": str(package.parent)}
    words = ("score", artifact, "--task", "any", "-c", 128, "--threads", 1, *arguments)
    return run_exporter(*words, env=environment)


ANSWERS = """
import urllib.request
arguments = dict(a.split("=", 1) for a in sys.argv[sys.argv.index("--model_args") + 1].split(","))
body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
asked = urllib.request.Request(arguments["base_url"], json.dumps(body).encode(), {"Content-Type": "application/json"})
content = json.load(urllib.request.urlopen(asked))["choices"][0]["message"]["content"]
folder = sys.argv[sys.argv.index("--output_path") + 1]
results = {"results": {"any": {"acc,none": float(len(content) > 0)}}, "n-samples": {"any": {"effective": 7}}}
open(os.path.join(folder, "results_1.json"), "w").write(json.dumps(results))
"""


def test_the_scores_are_what_the_harness_found(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    done = score(artifact, tmp_path, ANSWERS, "--json", "-o", out)
    assert done.code == 0, done.err
    (task,) = done.json["tasks"]
    assert (task["task"], task["score"], task["n"], task["harness"]) == ("any", 1.0, 7, "lm-eval from its sources")
    assert json.loads(out.read_text())["tasks"] == done.json["tasks"]
    assert done.json["runtime"].startswith("llama.cpp")


@pytest.mark.parametrize(
    ("program", "arguments", "line"),
    [
        ("raise ValueError('no such thing')", (), "lm-eval exited with 1 on any: ValueError: no such thing"),
        ("os.abort()", (), "lm-eval exited with -6 on any"),
        ("pass", (), "lm-eval left no scores"),
        ("time.sleep(600)", ("--seconds", 2), "lm-eval was not done after 2 s"),
    ],
    ids=["error", "crash", "nothing", "hang"],
)
def test_a_harness_that_fails_is_one_line(
    artifact: Path, tmp_path: Path, program: str, arguments: tuple[Any, ...], line: str
) -> None:
    done = score(artifact, tmp_path, program, *arguments)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"error: {line}")
    assert len(done.err.splitlines()) == 2


def test_what_a_harness_started_ends_with_it(artifact: Path, tmp_path: Path) -> None:
    program = "import subprocess\np = subprocess.Popen(['sleep', '600'])\n"
    program += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid))\n"
    done = score(artifact, tmp_path, program + "time.sleep(600)", "--seconds", 3)
    assert done.code == 1
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_runtime_that_dies_under_the_harness_is_named(artifact: Path, tmp_path: Path) -> None:
    program = """
import signal, psutil
me = psutil.Process()
(worker,) = [c for c in me.parent().children() if c.pid != me.pid]
os.kill(worker.pid, signal.SIGKILL)
time.sleep(600)
"""
    done = score(artifact, tmp_path, program)
    assert done.code == 1
    assert done.err.startswith("error: llama.cpp 0.6.0-dev was killed by SIGKILL while serving")


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        ((), 4, "lm-eval is not installed in"),
        (("--harness", "gpt-oss-evals"), 4, "gpt-oss-evals is not installed in"),
        (("--python", "no/such/python"), 2, "no/such/python cannot be run"),
        (("--task", "a b"), 2, "--task names tasks of the harness"),
        (("--task", "hellaswag,gsm8k"), 2, "some of these tasks choose by log-probability"),
        (("--task-dir", "no-such-folder"), 2, "no-such-folder is no folder"),
        (("--out", "no-such-folder/x.json"), 2, "no-such-folder does not exist"),
        (("--against", DEMO / "config.json"), 2, "cannot be read"),
        (("--harness", "gpt-oss-evals", "--api", "completions"), 2, "gpt-oss-evals asks by chat"),
    ],
    ids=lambda each: str(each)[:40],
)
def test_what_cannot_run_is_said_at_once(arguments: tuple[Any, ...], code: int, line: str) -> None:
    """Before anything is loaded: the artifact is not even there."""
    given = arguments if "--task" in arguments else ("--task", "gsm8k", *arguments)
    environment = {name: "" for name in ("PYTHONPATH",) if name in os.environ}
    done = run_exporter("score", "no-artifact", *given, env=environment)
    assert (done.code, done.out) == (code, "")
    assert line in done.err.splitlines()[0]
    assert len(done.err.splitlines()) == 2


def test_the_cure_of_a_missing_harness_is_a_command() -> None:
    done = run_exporter("score", "no-artifact", "--task", "gsm8k", "--python", sys.executable)
    assert "pip install 'lm_eval[api]==" in done.err
