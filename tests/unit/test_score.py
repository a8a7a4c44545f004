"""What a score is said to show, and what is read of the files that a harness leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import ExporterError, UsageError
from exporter.pipeline.score import entry, read_scores
from exporter.validate import harness, published
from exporter.validate.harness import HARNESSES, Score

LM_EVAL = HARNESSES["lm-eval"]


def said(score: float, n: int, task: str = "gpqa", **changes: Any) -> dict[str, Any]:
    settings = {"model": "gpt-oss-20b", "effort": "low", "api": "chat", **changes}
    name = "gpt-oss-evals" if task == "gpqa" else "lm-eval"
    return entry(Score(task, "score", score, n, None), f"{name} 1", name, **settings)


def test_a_score_near_the_published_one_passes_and_says_what_it_cannot_show() -> None:
    """GPQA once: 56.8 published, and anything above 48.5 is no evidence of a loss."""
    found = said(0.50, 198)
    assert (found["published"], found["published_effort"]) == (0.568, "low")
    assert found["threshold"] == pytest.approx(0.4853, abs=1e-4)
    assert found["verdict"] == "not below 48.5 %; a run of 198 can show a loss of 12.5 points or more"
    assert said(0.48, 198)["verdict"].startswith("below 48.5 %: worse than published")
    assert said(0.53, 1584)["verdict"].startswith("below 53.9 %")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model": None}, "no released model of this size"),
        ({"task": "mmlu_generative", "api": "completions"}, "no published score for this way of asking"),
        ({"task": "hellaswag"}, "no published score for this way of asking"),
    ],
)
def test_what_is_not_the_published_evaluation_is_not_compared_with_it(changes: dict[str, Any], why: str) -> None:
    found = said(0.1, 1000, **changes)
    assert (found["published"], found["threshold"], found["published_effort"]) == (None, None, None)
    assert found["verdict"].startswith(f"not compared ({why})")


def test_a_choice_by_likelihood_is_never_set_beside_a_written_answer() -> None:
    found = Score("gpqa_diamond_cot_zeroshot", "acc,none", 0.9, 198, None, by_likelihood=True)
    made = entry(found, "lm-eval 1", "lm-eval", "gpt-oss-20b", "high", "chat")
    assert (made["published"], made["note"]) == (None, published.LIKELIHOOD)


def test_a_handful_of_questions_shows_nothing() -> None:
    assert said(0.5, 3)["verdict"].endswith("a run of 3 can show nothing")


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("hellaswag", True),
        ("arc_challenge", True),
        ("mmlu", True),
        ("mmlu_abstract_algebra", True),
        ("gsm8k", False),
        ("mmlu_generative", False),
        ("mmlu_pro", False),
        ("gpqa_diamond_cot_zeroshot", False),
        ("aime25", False),
    ],
)
def test_how_a_task_is_asked_is_told_by_its_name(task: str, expected: bool) -> None:
    assert published.by_likelihood(task) is expected


def test_published_scores_are_the_models_own() -> None:
    for scores in published.SCORES.values():
        assert set(scores) == {"gpt-oss-20b", "gpt-oss-120b"}
    assert published.published("lm-eval", "aime25", "gpt-oss-120b", "high") == pytest.approx(0.925)
    assert published.published("lm-eval", "aime25", "gpt-oss-20b", "medium") == pytest.approx(0.721)
    assert published.published("gpt-oss-evals", "aime24", "gpt-oss-20b", "low") is None


# Files of harnesses


def ask(task: str = "gsm8k") -> harness.Ask:
    return harness.Ask([task], "http://127.0.0.1:1/v1", "m", True, "low", 4096, 2048, 60)


def left(folder: Path, results: dict[str, Any], samples: list[dict[str, Any]], task: str = "gsm8k") -> Path:
    """Files as lm-eval 0.4.13 leaves them."""
    below = folder / "m"
    below.mkdir()
    counts = {task: {"original": 1319, "effective": 4}}
    report = {"results": {task: results}, "n-samples": counts, "configs": {task: {"output_type": "generate_until"}}}
    (below / "results_2026-01-01T00-00-00.json").write_text(json.dumps(report))
    (below / f"samples_{task}_2026-01-01T00-00-00.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    return folder


def test_of_several_extractions_the_flexible_one_counts(tmp_path: Path) -> None:
    results = {
        "alias": "gsm8k",
        "exact_match,strict-match": 0.25,
        "exact_match_stderr,strict-match": 0.25,
        "exact_match,flexible-extract": 0.75,
        "exact_match_stderr,flexible-extract": 0.25,
    }
    samples = [
        {"doc_id": i, "doc_hash": f"{i:064x}", "filter": part, "exact_match": float(i < right)}
        for part, right in (("strict-match", 1), ("flexible-extract", 3))
        for i in range(4)
    ]
    (found,) = harness.scores(LM_EVAL, ask(), left(tmp_path, results, samples), "")
    assert (found.metric, found.score, found.n, found.stderr) == ("exact_match,flexible-extract", 0.75, 4, 0.25)
    assert list(found.questions.values()) == [1.0, 1.0, 1.0, 0.0]
    assert not found.by_likelihood


def test_a_group_has_the_questions_of_its_tasks(tmp_path: Path) -> None:
    left(tmp_path, {}, [{"doc_id": i, "doc_hash": "a", "acc": float(i == 0)} for i in range(4)], "mmlu_law")
    (path,) = tmp_path.glob("*/results_*.json")
    report = json.loads(path.read_text())
    report["results"] = {"mmlu": {"acc,none": 0.25}, "mmlu_law": {"acc,none": 0.25}}
    report["group_subtasks"] = {"mmlu": ["mmlu_other"], "mmlu_other": ["mmlu_law"], "mmlu_law": []}
    report["configs"]["mmlu_law"]["output_type"] = "multiple_choice"
    path.write_text(json.dumps(report))
    group, single = harness.scores(LM_EVAL, ask("mmlu"), tmp_path, "")
    assert (group.task, group.score, group.n, group.by_likelihood) == ("mmlu", 0.25, 4, True)
    assert (single.task, single.n, single.questions) == ("mmlu_law", 4, group.questions)


def test_an_error_that_the_harness_does_not_give_is_computed(tmp_path: Path) -> None:
    samples = [{"doc_id": i, "doc_hash": "a", "exact_match": i % 2} for i in range(4)]
    results = {"exact_match,none": 0.5, "exact_match_stderr,none": "N/A"}
    (found,) = harness.scores(LM_EVAL, ask(), left(tmp_path, results, samples), "")
    assert found.stderr == pytest.approx((0.25 / 3) ** 0.5)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"results": {}}',
        '{"results": {"a": {"word_perplexity,none": 9.0, "acc,none": NaN}}}',
        "[" * 9999,
    ],
    ids=lambda each: each[:20],
)
def test_damaged_results_are_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "results_x.json").write_text(content)
    with pytest.raises(ExporterError, match=r"cannot be read|left no scores") as found:
        harness.scores(LM_EVAL, ask(), tmp_path, "")
    assert "\n" not in found.value.message


def test_what_gpt_oss_evals_says_leads_to_its_scores(tmp_path: Path) -> None:
    report = {"score": 0.75, "metrics": {"score:std": 0.433, "chars": 5.0}, "convos": [[]] * 4}
    path = tmp_path / "gpqa_m-low_temp1.0_20260101_000000_allresults.json"
    path.write_text(json.dumps(report))
    printed = f"Writing report to x.html\nWriting all results to {path}\n[{{}}]\n"
    (found,) = harness.scores(HARNESSES["gpt-oss-evals"], ask("gpqa"), tmp_path, printed)
    assert (found.task, found.score, found.n) == ("gpqa", 0.75, 4)
    assert found.stderr == pytest.approx(0.2165)
    with pytest.raises(ExporterError, match="left no scores"):
        harness.scores(HARNESSES["gpt-oss-evals"], ask("gpqa"), tmp_path, "no such line")


# Another run's scores


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"schema": 2, "questions": {}}',
        '{"schema": 1, "questions": {"a": [1]}}',
        '{"schema": 1, "questions": {"a": {"1": "x"}}}',
        "[" * 100_000,
    ],
    ids=lambda each: each[:20],
)
def test_what_is_no_file_of_scores_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(UsageError, match="cannot be read"):
        read_scores(tmp_path / "s.json")
    with pytest.raises(UsageError, match="cannot be read"):
        read_scores(tmp_path / "none.json")
