"""Statistics of scores, against values from tables and from plain counting."""

from __future__ import annotations

import math

import numpy as np
import pytest

from exporter.errors import UsageError
from exporter.validate import statistics


@pytest.mark.parametrize(
    ("n", "below", "loss"),
    [(198, 8.27, 12.49), (1584, 2.92, 4.42), (30, 21.24, 32.10), (4096, 1.82, 2.75), (4395, 1.75, 2.65)],
    ids=["gpqa", "gpqa x 8", "aime25", "mmlu 4096", "mlperf"],
)
def test_what_a_benchmark_can_show(n: int, below: float, loss: float) -> None:
    """In points, with sigma 50 as TensorRT-LLM's README has it."""
    assert 100 * (0.8 - statistics.threshold(0.8, n)) == pytest.approx(below, abs=0.006)
    assert 100 * statistics.detectable(n) == pytest.approx(loss, abs=0.006)


def test_the_test_errs_as_often_as_it_says() -> None:
    """Drawn: a sound artifact is called bad in 5 %, one that lost theta passes in 20 % of runs."""
    n, runs, rng = 400, 20_000, np.random.default_rng(1)
    theta = statistics.detectable(n)
    reference = rng.binomial(n, 0.5, runs) / n
    limit = reference - (0.5 - statistics.threshold(0.5, n))
    assert (rng.binomial(n, 0.5, runs) / n < limit).mean() == pytest.approx(0.05, abs=0.01)
    assert (rng.binomial(n, 0.5 - theta, runs) / n >= limit).mean() == pytest.approx(0.2, abs=0.02)


def test_questions_needed_is_the_inverse() -> None:
    n = statistics.questions_needed(0.01)
    assert statistics.detectable(n) <= 0.01 < statistics.detectable(n - 1)


@pytest.mark.parametrize(
    ("b", "c", "p"),
    [(0, 0, 1.0), (5, 5, 1.0), (0, 5, 0.0625), (1, 9, 0.021484375), (9, 1, 0.021484375), (3, 4, 1.0), (0, 20, 2**-19)],
)
def test_mcnemar_is_the_exact_binomial(b: int, c: int, p: float) -> None:
    assert statistics.mcnemar(b, c) == pytest.approx(p, rel=1e-12)


@pytest.mark.parametrize(("b", "c"), [(480, 521), (500, 501), (400, 700), (1, 1100), (5000, 5400)])
def test_mcnemar_of_many_is_that_of_whole_numbers(b: int, c: int) -> None:
    n = b + c
    whole = 2 * sum(math.comb(n, k) for k in range(min(b, c) + 1))
    assert statistics.mcnemar(b, c) == pytest.approx(min(1.0, whole / 2**n), rel=1e-9)


def test_errors_of_a_mean() -> None:
    scores = [1.0] * 60 + [0.0] * 40
    error = statistics.standard_error(scores)
    assert error == pytest.approx(math.sqrt(0.6 * 0.4 / 99))
    interval = statistics.bootstrap(scores)
    assert interval is not None
    assert interval[0] == pytest.approx(0.6 - 1.96 * error, abs=0.02)
    assert interval[1] == pytest.approx(0.6 + 1.96 * error, abs=0.02)
    assert statistics.bootstrap(scores) == interval
    assert statistics.standard_error([1.0]) is statistics.bootstrap([1.0]) is None


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(0, 12, 0.0, 0.2425), (12, 12, 0.7575, 1.0), (81, 263, 0.2553, 0.3662), (1, 29, 0.0061, 0.1718)],
)
def test_interval_of_a_share(right: int, n: int, low: float, high: float) -> None:
    """The last two are examples of Newcombe 1998 (Statistics in Medicine 17, p. 857), table I, method 3."""
    scores = [1.0] * right + [0.0] * (n - right)
    assert statistics.interval(scores) == pytest.approx((low, high), abs=5e-5)


def test_interval_of_parts_is_the_bootstrap_s() -> None:
    assert statistics.interval([0.5, 0.25, 1.0]) == statistics.bootstrap([0.5, 0.25, 1.0])
    assert statistics.interval([]) is None


def test_pairs_show_what_two_means_cannot() -> None:
    first = {str(i): float(i % 2) for i in range(200)}
    second = {**first, **{str(i): 0.0 for i in range(1, 21, 2)}}  # 10 of 200 lost, none won
    found = statistics.paired(first, second)
    assert (found.n, found.lost, found.won) == (200, 10, 0)
    assert found.difference == pytest.approx(-0.05)
    assert found.p == pytest.approx(2 / 2**10)
    assert found.interval is not None
    assert found.interval[1] < 0
    assert sum(second.values()) / 200 > statistics.threshold(0.5, 200)


def test_pairs_of_parts_have_no_counts() -> None:
    found = statistics.paired({"a": 0.5, "b": 1.0}, {"a": 0.25, "b": 1.0})
    assert (found.difference, found.lost, found.won, found.p) == (-0.125, None, None, None)
    assert found.json()["p"] is None


@pytest.mark.parametrize("other", [{}, {"a": 1.0}, {"a": 1.0, "b": 0.0, "c": 1.0}, {"a": 1.0, "c": 1.0}])
def test_other_questions_are_refused(other: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="not the same questions"):
        statistics.paired({"a": 1.0, "b": 0.0}, other)
