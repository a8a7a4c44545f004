"""Limits by what an artifact may lose; limits that nothing can keep; gates of what could not be measured."""

from __future__ import annotations

import math
from typing import Any

import pytest

from exporter.errors import UsageError
from exporter.pipeline.judge import verdicts
from exporter.pipeline.profiles import load_profile, profile_names, source_text
from exporter.types import Scheme, TensorSpec
from exporter.types.gates import CLASSES, GATES, Limits, LossClass, Verdict, read_limits
from exporter.types.profile import Profile
from exporter.types.recipe import Method, Step, loss_of
from exporter.validate.gates import evaluate

WHERE = "p.toml [gates]"
NOISE = {"kl_mean": 0.004, "what": "the reference in bfloat16 against itself in float32"}


# Classes


def test_a_class_has_what_every_artifact_has_and_its_own() -> None:
    raw = {
        "digests_equal": True,
        "release_kl_mean": 0.5,
        "exact": {"release_kl_mean": 0.001},
        "lossy": {"release_kl_mean": 0.1, "release_flips": 0.05},
    }
    limits = read_limits(raw, WHERE)
    assert limits.of("exact") == {"digests_equal": True, "release_kl_mean": 0.001}
    assert limits.of("near") == {"digests_equal": True, "release_kl_mean": 0.5}
    assert limits.of("lossy") == {"digests_equal": True, "release_kl_mean": 0.1, "release_flips": 0.05}
    assert set(raw) == {"digests_equal", "release_kl_mean", "exact", "lossy"}  # read, not eaten


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        ({"exact": {"release_kl_men": 1}}, r'p.toml \[gates.exact\]: unknown key "release_kl_men".*release_kl_mean'),
        ({"exakt": {"release_kl_mean": 1.0}}, r'p.toml \[gates\]: unknown key "exakt"'),
        ({"near": 3}, r"p.toml \[gates.near\]: expected a table"),
        ({"near": {"exact": {}}}, r'p.toml \[gates.near\]: unknown key "exact"'),
        ({"lossy": {"release_kl_mean": math.nan}}, r"\[gates.lossy\].* must be a finite number"),
        ({"lossy": {"release_kl_mean": math.inf}}, r"\[gates.lossy\].* must be a finite number"),
        ({"exact": {"digests_equal": 1}}, r'\[gates.exact\]: "digests_equal" must be bool'),
        ({"exact": {"release_kl_mean": True}}, r'\[gates.exact\]: "release_kl_mean" must be int or float'),
        ([], r"p.toml \[gates\]: expected a table"),
    ],
)
def test_a_class_is_read_as_strictly_as_the_rest(raw: Any, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        read_limits(raw, WHERE)


def spec(name: str) -> TensorSpec:
    return TensorSpec(name, (64, 64), "linear", 0)


def step(method: Method, source: str, scheme: str) -> Step:
    return Step(spec("model.layers.0.self_attn.q_proj.weight"), method, Scheme.parse(source), Scheme.parse(scheme))


@pytest.mark.parametrize(
    ("method", "source", "scheme", "loss"),
    [
        ("keep", "bf16", "bf16", "exact"),
        ("pass", "mxfp4", "mxfp4", "exact"),
        ("exact", "mxfp4", "int8-g32", "exact"),
        ("rtn", "bf16", "int8-g32", "near"),
        ("rtn", "bf16", "f32", "near"),
        ("gptq", "bf16", "int8-g32", "near"),
        ("rtn", "bf16", "int4-g32", "lossy"),
        ("gptq", "bf16", "int4-g64", "lossy"),
        ("gptq", "bf16", "mxfp4", "lossy"),
    ],
)
def test_the_class_of_a_tensor(method: Method, source: str, scheme: str, loss: LossClass) -> None:
    assert step(method, source, scheme).loss == loss


def test_the_class_of_an_artifact_is_that_of_its_worst_tensor() -> None:
    exact, near, lossy = (
        step("pass", "mxfp4", "mxfp4"),
        step("rtn", "bf16", "int8-g32"),
        step("rtn", "bf16", "int4-g32"),
    )
    assert loss_of([exact, exact]) == "exact"
    assert loss_of([exact, near, exact]) == "near"
    assert loss_of([near, lossy, exact]) == "lossy"


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_is_strictest_where_nothing_is_rounded(name: str) -> None:
    gates = load_profile(name).gates
    exact, near, lossy = (gates.of(loss) for loss in CLASSES)
    for gate in exact.keys() & near.keys() & lossy.keys():
        limits = [float(each[gate]) for each in (exact, near, lossy)]
        assert limits == sorted(limits, reverse=GATES[gate].sense == "min"), gate
    for limits in (exact, near, lossy):
        # What lost much has wide intervals: of it the count alone is asked.
        assert limits["nearest_is_released" if limits is lossy else "behaves_as_released"] is True
        assert limits["digests_equal"] is True
        assert {"release_kl_mean", "conversations_kl_mean", "ppl_ratio"} <= limits.keys()


def test_a_profile_may_have_gates_for_a_class_alone() -> None:
    head, tail = source_text("16gb").split("[gates]", 1)
    classes = tail[tail.index("[gates.exact]") :]
    profile = Profile.from_toml(head + "[gates]\n" + classes, "p", "p.toml")
    assert "digests_equal" not in profile.gates.of("exact")
    with pytest.raises(UsageError, match=r"p.toml \[gates\]: no gates"):  # a class without any passes everything
        Profile.from_toml(head + "[gates.exact]\nrelease_kl_mean = 0.1\n", "p", "p.toml")


# The noise floor


def test_a_limit_below_the_noise_fails_and_says_so() -> None:
    report = {"release": {"kl_mean": 0.001}, "floor": NOISE}
    (verdict,) = evaluate(report, {"release_kl_mean": 0.003})
    assert (verdict.value, verdict.passed) == (0.001, False)
    assert verdict.note == (
        "the limit is below the noise floor: 0.004 nats is what the reference in bfloat16 against itself in float32 has"
    )
    (verdict,) = evaluate(report, {"release_kl_mean": 0.004})
    assert (verdict.passed, verdict.note) == (True, "")
    (verdict,) = evaluate(report | {"release": {"kl_mean": 0.01}}, {"release_kl_mean": 0.005})
    assert (verdict.passed, verdict.note) == (False, "")


def test_only_divergences_of_what_is_served_have_a_floor() -> None:
    with_floor = {name for name, gate in GATES.items() if gate.floor}
    assert with_floor == {"release_kl_mean", "conversations_kl_mean", "depth_kl_mean"}
    report = {"export": {"kl_mean": 1e-6}, "release": {"top1": 1.0, "kl_p99": 0.0}, "floor": NOISE}
    for verdict in evaluate(report, {"export_kl_mean": 1e-5, "release_top1": 0.5, "release_kl_p99": 1e-5}):
        assert (verdict.passed, verdict.note) == (True, "")


@pytest.mark.parametrize("floor", [None, {}, {"kl_mean": None, "what": "x"}, {"kl_mean": "0.5", "what": "x"}, 0.5])
def test_a_floor_that_was_not_measured_changes_nothing(floor: Any) -> None:
    report = {"release": {"kl_mean": 0.001}, "floor": floor}
    (verdict,) = evaluate(report, {"release_kl_mean": 0.003})
    assert (verdict.passed, verdict.note) == (True, "")


# What was not measured


@pytest.mark.parametrize("name", GATES)
def test_what_is_missing_never_passes_without_a_reason(name: str) -> None:
    limit: float | bool = True if GATES[name].sense == "equal" else 0.5
    assert verdicts({}, {name: limit}) == [Verdict(name, None, limit, False)]
    assert verdicts({"not_run": {}}, {name: limit}) == [Verdict(name, None, limit, False)]


@pytest.mark.parametrize("name", GATES)
def test_a_reason_excuses_answers_and_long_texts_alone(name: str) -> None:
    """Answers take a GPU for a large model, and there are models without a longer text; all else has to be there."""
    limit: float | bool = True if GATES[name].sense == "equal" else 0.5
    metric = GATES[name].metric
    excused = metric.startswith(("generation.", "long.", "accuracy.long."))
    reasons = dict.fromkeys((metric, metric.split(".")[0], "generation", "long", "conversations", "twins"), "a reason")
    assert verdicts({"not_run": reasons}, {name: limit}) == ([] if excused else [Verdict(name, None, limit, False)])


def test_one_reason_does_not_excuse_another() -> None:
    limits = {"greedy_agreement": 0.5, "long_kl_mean": 0.1, "depth_kl_mean": 0.1, "conversations_kl_mean": 0.1}

    def left(*not_run: str) -> set[str]:
        return {v.name for v in verdicts({"not_run": dict.fromkeys(not_run, "x")}, limits)}

    assert left("generation") == limits.keys() - {"greedy_agreement"}
    assert left("long") == {"greedy_agreement", "conversations_kl_mean"}
    assert left("conversations") == limits.keys()
    assert left("longer", "gene") == limits.keys()


def test_what_was_measured_is_judged_whatever_not_run_says_of_others() -> None:
    report = {"release": {"kl_mean": 0.1}, "not_run": {"long": "x", "generation": "y"}}
    (verdict,) = verdicts(report, {"release_kl_mean": 0.2, "long_kl_mean": 0.1})
    assert (verdict.name, verdict.passed) == ("release_kl_mean", True)


def test_an_unknown_gate_of_a_class_is_no_silent_pass() -> None:
    limits = Limits({}, {"exact": {"no_such_gate": 1.0}})
    with pytest.raises(UsageError, match='unknown gate "no_such_gate"'):
        verdicts({"not_run": {"long": "x"}}, limits.of("exact"))
