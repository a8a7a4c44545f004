"""Scores that OpenAI published for the released models, and what is known to go wrong when they are measured again.

Source: gpt-oss model card (arXiv 2508.10925), table of evaluations; without tools where it has both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Effort = Literal["low", "medium", "high"]
EFFORTS: tuple[Effort, ...] = ("low", "medium", "high")
SOURCE = "OpenAI model card, arXiv 2508.10925"

# evaluation -> model -> per cent at low, medium and high effort.
SCORES: Mapping[str, Mapping[str, tuple[float, float, float]]] = {
    "AIME 2024": {"gpt-oss-120b": (56.3, 80.4, 95.8), "gpt-oss-20b": (42.1, 80.0, 92.1)},
    "AIME 2025": {"gpt-oss-120b": (50.4, 80.0, 92.5), "gpt-oss-20b": (37.1, 72.1, 91.7)},
    "GPQA Diamond": {"gpt-oss-120b": (67.1, 73.1, 80.1), "gpt-oss-20b": (56.8, 66.0, 71.5)},
    "HLE": {"gpt-oss-120b": (5.2, 8.6, 14.9), "gpt-oss-20b": (4.2, 7.0, 10.9)},
    "MMLU": {"gpt-oss-120b": (85.9, 88.0, 90.0), "gpt-oss-20b": (80.4, 84.0, 85.3)},
    "SWE-bench Verified": {"gpt-oss-120b": (47.9, 52.6, 62.4), "gpt-oss-20b": (37.4, 53.2, 60.7)},
    "Tau-bench retail": {"gpt-oss-120b": (49.4, 62.0, 67.8), "gpt-oss-20b": (35.0, 47.3, 54.8)},
    "HealthBench": {"gpt-oss-120b": (53.0, 55.9, 57.6), "gpt-oss-20b": (40.4, 41.8, 42.5)},
    "HealthBench Hard": {"gpt-oss-120b": (22.8, 26.9, 30.0), "gpt-oss-20b": (9.0, 12.9, 10.8)},
}

# (harness, task) -> evaluation, where questions and way of asking are near enough to set the scores side by side:
# the model answers in words after reasoning. Choosing by log-probability is another thing (see `LIKELIHOOD`).
_EVALUATION = {
    ("gpt-oss-evals", "gpqa"): "GPQA Diamond",
    ("gpt-oss-evals", "aime25"): "AIME 2025",
    ("gpt-oss-evals", "healthbench"): "HealthBench",
    ("gpt-oss-evals", "healthbench_hard"): "HealthBench Hard",
    ("lm-eval", "aime24"): "AIME 2024",
    ("lm-eval", "aime25"): "AIME 2025",
    ("lm-eval", "gpqa_diamond_cot_zeroshot"): "GPQA Diamond",
    ("lm-eval", "mmlu_generative"): "MMLU",
}

LIKELIHOOD = (
    "the answer is chosen by log-probability, which a model that reasons first is not made for: a figure to "
    "compare two artifacts by, not the model's quality"
)
_BUDGET = "reasoning needs room: with fewer than {0:,} tokens (--max-tokens) answers are cut off and counted wrong"
_TRAPS = {
    "gsm8k": f"read the flexible-extract score; {_BUDGET.format(8192)}",
    "aime": f"a question is 3.3 points; {_BUDGET.format(32768)} at high effort",
    "gpqa": f"two GPUs with the same weights differ by about a point; {_BUDGET.format(32768)} at high effort",
    "healthbench": "graded by a model of OpenAI's over the network",
}
_BYLIKELIHOOD = ("arc", "boolq", "hellaswag", "lambada", "mmlu", "openbookqa", "piqa", "truthfulqa_mc", "winogrande")
_IN_WORDS = ("generative", "cot", "gen", "pro")


def by_likelihood(task: str) -> bool:
    """Whether a task of lm-eval chooses by log-probability, as far as its name says."""
    words = task.replace("-", "_").split("_")
    return task.startswith(_BYLIKELIHOOD) and not set(words) & set(_IN_WORDS)


def trap(task: str) -> str | None:
    """What is known to make this task's score misleading."""
    return next((text for name, text in _TRAPS.items() if task.startswith(name)), None)


def published(harness: str, task: str, model: str | None, effort: Effort) -> float | None:
    """The published share (0 to 1) of a released model ("gpt-oss-20b") at this effort; None where there is none."""
    scores = SCORES.get(_EVALUATION.get((harness, task), ""), {}).get(model or "")
    return scores[EFFORTS.index(effort)] / 100 if scores else None
