"""The float32 form beside an export of the same checkpoint by optimum-onnx: the same names, the same logits.

optimum-onnx pins a transformers older than ours and has an environment of its own, which takes minutes to make:
`pytest -m slow`. EXPORTER_OPTIMUM names a Python that has optimum-onnx and accelerate already.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import DEMO, make_artifact

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.slow

PACKAGES = ("optimum-onnx==0.1.0", "transformers<4.58", "accelerate", "torch==2.13.0", "onnx", "onnxruntime")
INSTALL, EXPORT = 1800, 600  # seconds
LENGTH, PREFILL = 192, 96  # tokens: beyond the window of 128, which the ones after PREFILL cross one by one
CLOSE = 5e-5  # between two float32 computations; logits are some tens


def run(*command: str | Path, timeout: float) -> str:
    """What a command says; the test is skipped or failed by whoever reads it."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL, check=False
    )
    return "" if done.returncode == 0 else (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with optimum-onnx."""
    if named := os.environ.get("EXPORTER_OPTIMUM"):
        return Path(named)
    home = tmp_path_factory.mktemp("optimum") / "venv"
    made = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    for command in ((sys.executable, "-m", "venv", home), (made, "-m", "pip", "install", "-q", *PACKAGES)):
        if problem := run(*command, timeout=INSTALL):
            pytest.skip(f"no environment with optimum-onnx: {problem.splitlines()[-1]}")
    return made


@pytest.fixture(scope="module")
def theirs(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("theirs") / "folder"
    task = ("--task", "text-generation-with-past")
    problem = run(
        python, "-m", "optimum.commands.optimum_cli", "export", "onnx", "-m", DEMO, *task, out, timeout=EXPORT
    )
    assert not problem, problem[-2000:]
    return session(out / "model.onnx")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo as our ONNX folder, every number in float32."""
    return make_artifact(tmp_path_factory.mktemp("ours"), "onnx", "f32", "cpu")


@pytest.fixture(scope="module")
def ours(folder: Path) -> Any:
    return session(folder / "model.onnx")


def session(graph: Path) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def described(values: list[Any]) -> dict[str, tuple[Any, ...]]:
    """Type, rank and fixed sizes of inputs or outputs by name."""
    return {v.name: (v.type, *(d if isinstance(d, int) else None for d in v.shape)) for v in values}


def logits(session: Any, tokens: np.ndarray[Any, Any], pieces: list[int]) -> np.ndarray[Any, Any]:
    """float32 [T, V] of tokens int64 [T] that go in as pieces, through the cache."""
    inputs = {i.name: i for i in session.get_inputs()}
    outputs = [o.name for o in session.get_outputs()]
    cache = {n: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for n, i in inputs.items() if "past_key" in n}
    found, at = [], 0
    for count in pieces:
        ids = tokens[None, at : at + count]
        feeds = {"input_ids": ids, "attention_mask": np.ones((1, at + count), np.int64), **cache}
        if "position_ids" in inputs:
            feeds["position_ids"] = np.arange(at, at + count)[None]
        out = dict(zip(outputs, session.run(None, feeds), strict=True))
        cache = {name: out[name.replace("past_key_values", "present")] for name in cache}
        found.append(out["logits"][0])
        at += count
    return np.concatenate(found)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray[Any, Any]:
    vocabulary = 2000  # of the demo's 2048: no special ones
    return np.random.default_rng(0).integers(0, vocabulary, LENGTH)


@pytest.fixture(scope="module")
def expected(theirs: Any, tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return logits(theirs, tokens, [LENGTH])


def test_inputs_and_outputs_go_by_the_same_names(ours: Any, theirs: Any) -> None:
    wanted = described(theirs.get_inputs())
    wanted.pop("position_ids", None)  # the attention operator counts by itself
    assert described(ours.get_inputs()) == wanted
    assert described(ours.get_outputs()) == described(theirs.get_outputs())


@pytest.mark.parametrize("pieces", [[LENGTH], [PREFILL] + [1] * (LENGTH - PREFILL)], ids=["prefill", "cached"])
def test_logits_are_equal(ours: Any, theirs: Any, tokens: Any, expected: Any, pieces: list[int]) -> None:
    assert np.abs(expected).max() > 1
    found = logits(ours, tokens, pieces)
    assert np.abs(found - expected).max() < CLOSE
    assert np.abs(logits(theirs, tokens, pieces) - found).max() < CLOSE


@pytest.mark.parametrize(("kind", "attribute", "wrong"), [
    ("GroupQueryAttention", "local_window_size", 127),
    ("MoE", "activation_alpha", 1.0),
])  # fmt: skip
def test_a_fault_is_far_off(folder: Path, tokens: Any, expected: Any, kind: str, attribute: str, wrong: Any) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    changed = 0
    for node in model.graph.node:
        for a in node.attribute:
            value = onnx.helper.get_attribute_value(a)
            if node.op_type == kind and a.name == attribute and value > 0:
                a.CopyFrom(onnx.helper.make_attribute(attribute, wrong))
                changed += 1
    assert changed
    (folder / "faulty.onnx").write_bytes(model.SerializeToString())
    apart = np.abs(logits(session(folder / "faulty.onnx"), tokens, [LENGTH]) - expected)
    assert apart.max() > 20 * CLOSE
