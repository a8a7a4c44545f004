"""Scores that go into the report of an artifact beside its verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exporter.pipeline.report import add_tasks
from tests.report_sample import full


def scored(task: str, score: float) -> dict[str, Any]:
    return {"task": task, "harness": "lm-eval", "score": score, "n": 7, "stderr": None, "published": None}


def test_scores_join_those_of_other_tasks_and_the_verdict_stays(tmp_path: Path) -> None:
    report = full()
    report["tasks"] = [scored("gsm8k", 0.25), scored("gpqa", 0.5)]
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert add_tasks(tmp_path, [scored("gsm8k", 0.75)])
    written = json.loads((tmp_path / "report.json").read_text())
    assert {each["task"]: each["score"] for each in written["tasks"]} == {"gpqa": 0.5, "gsm8k": 0.75}
    assert {key: written[key] for key in written if key != "tasks"} == {k: report[k] for k in report if k != "tasks"}
    assert "75.0" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("content", [None, "no JSON", "[]", '{"tasks": 3}', '{"tasks": [{}]}'])
def test_a_folder_without_a_report_is_left_alone(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    assert not add_tasks(tmp_path, [scored("gsm8k", 0.75)])
    assert [p.name for p in tmp_path.iterdir()] == ([] if content is None else ["report.json"])
