"""A gate passes only on a measured, finite value of the right type on the right side."""

from __future__ import annotations

import math
from typing import Any

import pytest

from exporter.errors import UsageError
from exporter.types.gates import GATES, Verdict
from exporter.validate.gates import evaluate


def passed(report: dict[str, Any], **limits: float | bool) -> list[bool]:
    return [v.passed for v in evaluate(report, limits)]


def test_each_sense() -> None:
    report = {"digests_equal": True, "export": {"kl_mean": 0.01, "top1": 0.98}}
    assert passed(report, export_kl_mean=0.01, export_top1=0.98, digests_equal=True) == [True, True, True]
    assert passed(report, export_kl_mean=0.0099, export_top1=0.99, digests_equal=False) == [False, False, False]


def test_verdicts_keep_order_value_and_limit() -> None:
    report = {"tokenizer_equal": False, "release": {"ppl_ratio": 1.2}}
    assert evaluate(report, {"ppl_ratio": 1.5, "tokenizer_equal": True}) == [
        Verdict("ppl_ratio", 1.2, 1.5, True),
        Verdict("tokenizer_equal", False, True, False),
    ]


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, "0", [], {}])
def test_what_was_not_measured_never_passes(name: str, value: Any) -> None:
    report: dict[str, Any] = {}
    *folders, last = GATES[name].metric.split(".")
    place = report
    for folder in folders:
        place = place.setdefault(folder, {})
    place[last] = value
    limits: list[float | bool] = [0.0, 1e9, -1e9, True, False]
    for limit in limits:
        (verdict,) = evaluate(report, {name: limit})
        assert verdict == Verdict(name, None, limit, False)
        (verdict,) = evaluate({}, {name: limit})
        assert verdict == Verdict(name, None, limit, False)


def test_a_branch_that_is_no_object_is_not_measured() -> None:
    assert passed({"export": 0.0}, export_kl_mean=1.0) == [False]
    assert passed({"export": None}, export_kl_mean=1.0) == [False]


def test_numbers_and_truth_values_do_not_mix() -> None:
    assert passed({"digests_equal": 1}, digests_equal=True) == [False]
    assert passed({"digests_equal": True}, digests_equal=1.0) == [False]
    assert passed({"export": {"kl_mean": False}}, export_kl_mean=1.0) == [False]
    assert passed({"export": {"top1": True}}, export_top1=0.5) == [False]


def test_a_limit_that_is_no_number_fails() -> None:
    assert passed({"export": {"kl_mean": 0.0}}, export_kl_mean=math.nan) == [False]
    assert passed({"export": {"kl_mean": 0.0}}, export_kl_mean=True) == [False]


def test_an_unknown_gate_is_named_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match=r'unknown gate "export_kl_men".*Did you mean "export_kl_mean"'):
        evaluate({}, {"export_kl_men": 1.0})
