"""The real lm-eval against the endpoint: its log-probabilities are those that llama.cpp gives without any server.

lm-eval lives in an environment of its own; EXPORTER_LM_EVAL_PYTHON names its interpreter (docs/tasks.md).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from exporter.pipeline.progress import Progress
from exporter.pipeline.score import Ask, score
from exporter.validate.llama_cpp import Context, Model
from tests.conftest import run_exporter
from tests.served import log_softmax, make

PYTHON = os.environ.get("EXPORTER_LM_EVAL_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="EXPORTER_LM_EVAL_PYTHON names no interpreter that has lm-eval"),
]
WORDS = (" return x", " import os", " class A:", " raise ValueError")
COUNT = 12
CHOICE = """
task: demo_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
WRITE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs: {{until: ["\\n"], max_gen_toks: 12, temperature: 0.0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def question(i: int) -> str:
    """Not ending with a space, which lm-eval would move to what follows."""
    return f"def f{i}(x):\n    if x > {i}:"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("lm-eval"), ("gguf", "mxfp4-q8", ""))["gguf"]


@pytest.fixture(autouse=True)
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("HF_HUB_OFFLINE", "1"), ("HF_DATASETS_OFFLINE", "1"), ("HF_HOME", str(tmp_path / "hf"))):
        monkeypatch.setenv(name, value)


def lay(folder: Path, name: str, yaml: str, rows: list[dict[str, Any]]) -> Path:
    """A task of our own, its questions beside it."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(yaml.format(name=name, data=data))
    return folder


def ask(artifact: Path, task: str, tasks: Path, **settings: Any) -> dict[str, Any]:
    made = Ask(artifact, [task], python=PYTHON, task_dir=tasks, context=512, threads=1, seconds=300, **settings)
    return score(made, Progress())


def likelihoods(artifact: Path) -> list[list[float]]:
    """Of each choice after each question, in nats, by llama.cpp alone."""
    (path,) = artifact.glob("*.gguf")
    found = []
    with Model(path) as model, Context(model, 256, 128, 1) as context:
        for i in range(COUNT):
            before = len(model.tokenize(question(i)))
            for choice in WORDS:
                tokens = model.tokenize(question(i) + choice)
                context.clear()
                log_p = log_softmax(context.decode(tokens, all_logits=True))
                found.append(sum(float(log_p[at - 1, tokens[at]]) for at in range(before, len(tokens))))
    return [found[i : i + len(WORDS)] for i in range(0, len(found), len(WORDS))]


def test_choices_are_those_of_the_runtimes_logits(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"question": question(i), "choices": WORDS, "answer": i % 4} for i in range(COUNT)]
    tasks = lay(tmp_path / "tasks", "demo_choice", CHOICE, rows)
    samples: list[dict[str, Any]] = []
    popen = subprocess.Popen

    class Watched(popen):  # type: ignore[misc, type-arg]
        """The same, and what lm-eval wrote is read before its folder goes."""

        def poll(self) -> int | None:
            code = super().poll()
            if code == 0 and "lm_eval" in self.args:
                words = list(map(str, self.args))
                folder = Path(words[words.index("--output_path") + 1])
                lines = [line for f in folder.rglob("samples_*.jsonl") for line in f.read_text().splitlines()]
                samples[:] = map(json.loads, lines)
            return code

    monkeypatch.setattr(subprocess, "Popen", Watched)
    report = ask(artifact, "demo_choice", tasks, api="completions")
    expected = likelihoods(artifact)
    theirs = {s["doc_id"]: [float(r[0]) for r in s["filtered_resps"]] for s in samples}
    assert [theirs[i] for i in range(COUNT)] == [pytest.approx(row, abs=2e-3) for row in expected]
    right = [float(max(range(4), key=row.__getitem__) == i % 4) for i, row in enumerate(expected)]
    (task,) = report["tasks"]
    assert (task["n"], task["score"]) == (COUNT, pytest.approx(sum(right) / COUNT))
    assert 0 < sum(right) < COUNT
    assert list(report["questions"]["demo_choice"].values()) == right
    assert "log-probability" in task["note"]
    assert (task["published"], task["detects"]) == (None, pytest.approx(0.5075, abs=1e-4))


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_written_answers(artifact: Path, tmp_path: Path, api: str) -> None:
    """What it writes, greedily, is asked for in the first half, something else in the second: half is right."""
    opened = "<|start|>system<|message|>Reasoning: low<|end|><|start|>user<|message|>{}<|end|>"
    opened += "<|start|>assistant<|channel|>final<|message|>"
    (path,) = artifact.glob("*.gguf")
    rows = []
    with Model(path) as model, Context(model, 256, 128, 1) as context:
        for i in range(COUNT):
            context.clear()
            asked = opened.format(question(i)) if api == "chat" else question(i)
            token = int(context.prefill(model.tokenize(asked))[0].argmax())
            written: list[int] = []
            while len(written) < 12 and not model.text([token]).startswith("<|"):
                written.append(token)
                token = int(context.decode([token], all_logits=False)[0].argmax())
            answer = model.text(written).split("\n")[0]
            rows.append({"question": question(i), "answer": answer if i < COUNT / 2 else answer + " no"})
    tasks = lay(tmp_path / "tasks", "demo_write", WRITE, rows)
    out = tmp_path / "scores.json"
    report = ask(artifact, "demo_write", tasks, api=api, max_tokens=12, effort="low", out=out)
    (task,) = report["tasks"]
    assert (task["score"], task["n"], task["api"]) == (0.5, COUNT, api)
    assert list(report["questions"]["demo_write"].values()) == [1.0] * (COUNT // 2) + [0.0] * (COUNT // 2)
    again = ask(artifact, "demo_write", tasks, api=api, max_tokens=12, effort="low", against=out)
    pair = again["tasks"][0]["paired"]
    assert (pair["n"], pair["difference"], pair["lost"], pair["won"], pair["p"]) == (COUNT, 0.0, 0, 0, 1.0)


def test_the_command_says_what_the_score_shows(artifact: Path, tmp_path: Path) -> None:
    tasks = lay(tmp_path / "tasks", "demo_write", WRITE, [{"question": question(i), "answer": "?"} for i in range(5)])
    words = ("score", artifact, "--task", "demo_write", "--task-dir", tasks, "--python", PYTHON, "--threads", "1")
    done = run_exporter(*words, "--limit", 4, "-c", 256, "--max-tokens", 8)
    assert done.code == 0, done.err
    assert "demo_write" in done.out
    assert "a run of 4 can show a loss of 87.9 points or more" in done.out


def test_a_task_that_is_not_there_is_one_line(artifact: Path) -> None:
    done = run_exporter("score", artifact, "--task", "no_such_task", "--python", PYTHON, "--threads", "1")
    assert done.code == 1
    assert done.err.startswith("error: lm-eval exited with 1 on no_such_task: ")
    assert len(done.err.splitlines()) == 2
