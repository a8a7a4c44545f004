"""The plan of speed tests, with a runner whose seconds are made up: names, figures, and what is left out and why."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from exporter.errors import ExporterError
from exporter.validate import speed
from exporter.validate.speed import PIECE, Plan

TEXT = np.arange(100, 1100)


class Machine:
    """A runtime and its clock: a token of a prompt takes `token` seconds, a single one `step`, each `behind` more for
    every token before it; the very first call `first` more."""

    def __init__(self, token: float = 0.001, step: float = 0.1, behind: float = 0.0, first: float = 0.0) -> None:
        self.token, self.one, self.behind, self.start = token, step, behind, first
        self.now = 0.0
        self.at = 0
        self.reserved = 0
        self.calls: list[tuple[str, int]] = []
        self.prompts: list[int] = []

    def clock(self) -> float:
        return self.now

    def room(self, tokens: int) -> None:
        self.reserved = max(self.reserved, tokens)

    def clear(self) -> None:
        self.calls.append(("clear", self.at))
        self.at = 0

    def prefill(self, tokens: Sequence[int]) -> None:
        assert 0 < len(tokens) <= PIECE
        self.prompts += [int(t) for t in tokens]
        self._append(len(tokens), self.token)

    def first(self) -> int:
        return 7

    def step(self, token: int) -> int:
        self._append(1, self.one)
        return token + 1

    def _append(self, count: int, seconds: float) -> None:
        self.calls.append(("append", count))
        self.now += self.start + sum(seconds + self.behind * (self.at + i) for i in range(count))
        self.start = 0.0
        self.at += count
        assert self.at <= self.reserved, "more tokens than there is room for"


def measure(machine: Machine, plan: Plan, known: dict[str, Any] | None = None) -> dict[str, Any]:
    return speed.extended(machine, plan, TEXT, known or {}, lambda *done: None, machine.clock)


def by_name(found: dict[str, Any]) -> dict[str, Any]:
    return {test["test"]: test for test in found["tests"]}


def test_names_are_those_of_llama_bench() -> None:
    assert speed.prompt_test(512) == "pp512"
    assert speed.generate_test(64, 0) == "tg64"
    assert speed.generate_test(64, 8192) == "tg64 @ d8192"


def test_all_of_the_plan() -> None:
    machine = Machine()
    found = measure(machine, Plan())
    assert list(by_name(found)) == ["pp512", "pp2048", "tg64", "tg64 @ d8192", "tg64 @ d32768"]
    assert found["not_run"] == {}
    assert found["prompts_are"]
    for test in found["tests"]:
        assert len(test["runs"]) == 3
        assert test["mean"] == pytest.approx(1000 if test["kind"] == "prompt" else 10)
        assert test["sd"] == pytest.approx(0, abs=1e-6)
    assert found["ttft_seconds"] == pytest.approx(0.512)
    assert found["ttft_prompt"] == 512
    assert machine.reserved == 32768 + 3 * 64


def test_a_prompt_starts_empty_and_generation_after_its_depth() -> None:
    machine = Machine()
    found = measure(machine, Plan(prompts=(600,), depths=(0, 1000), generate=4, repeats=2))
    starts = [i for i, call in enumerate(machine.calls) if call[0] == "clear"]
    runs = [[n for _, n in machine.calls[a + 1 : b]] for a, b in zip(starts, [*starts[1:], None], strict=True)]
    warm_up, *rest = runs
    assert warm_up == [512, 1, 1], "the second step is what a step takes"
    assert rest == [[512, 88], [512, 88], [1, *[1] * 4], [1, *[1] * 4], [512, 488, *[1] * 8]]
    assert by_name(found)["tg4 @ d1000"]["depth"] == 1000


def test_prompts_are_the_text_repeated() -> None:
    machine = Machine()
    measure(machine, Plan(prompts=(1300,), depths=(), repeats=1))
    assert machine.prompts[-1300:] == [*range(100, 1100), *range(100, 400)]


def test_figures_of_runs() -> None:
    test = speed.summary("pp512", "prompt", 512, 0, [10.0, 20.0, 60.0])
    assert (test["mean"], test["median"], test["low"], test["high"]) == (30, 20, 10, 60)
    assert test["sd"] == pytest.approx(statistics.stdev([10, 20, 60]))
    assert test["runs"] == [10, 20, 60]
    assert "latency_ms" not in test
    assert speed.summary("pp512", "prompt", 512, 0, [10.0])["sd"] is None


def test_latency_of_single_tokens() -> None:
    latencies = [0.001] * 98 + [0.5] * 2
    test = speed.summary("tg64", "generate", 64, 0, [50.0], latencies)
    assert test["latency_ms"] == {"median": 1.0, "p99": pytest.approx(500)}


# What is left out


def test_deeper_than_the_context() -> None:
    found = measure(Machine(), Plan(context=8192 + 64))
    assert list(found["not_run"]) == ["tg64 @ d32768"]
    assert found["not_run"]["tg64 @ d32768"] == "32,832 tokens are more than the context of 8,256"
    # No room for a second run behind the first.
    assert len(by_name(found)["tg64 @ d8192"]["runs"]) == 1
    found = measure(Machine(), Plan(context=2047, depths=(0,)))
    assert list(found["not_run"]) == ["pp2048"]
    found = measure(Machine(), Plan(context=8191))
    assert list(found["not_run"]) == ["tg64 @ d8192", "tg64 @ d32768"]


def test_longer_than_the_seconds_that_are_left() -> None:
    """0.5 + 1.5 + 6.1 + 19.2 seconds, and then 8.2 and 3 x 6.4; the next would take 32.8 + 6.4."""
    machine = Machine()
    found = measure(machine, Plan(seconds=60))
    assert list(found["not_run"]) == ["tg64 @ d32768"]
    assert found["not_run"]["tg64 @ d32768"].startswith("would take about 39.2 s here, ")
    assert found["not_run"]["tg64 @ d32768"].endswith(" of 60 s are left")
    assert machine.now < 60


def test_a_slow_machine_runs_what_fits() -> None:
    """5.1 seconds and two to warm up, then 5.1 for each prompt of 512: four of them, not five; nothing else fits."""
    machine = Machine(token=0.01, step=1.0)
    found = measure(machine, Plan(seconds=30, repeats=5))
    assert {name: len(test["runs"]) for name, test in by_name(found).items()} == {"pp512": 4}
    assert list(found["not_run"]) == ["pp2048", "tg64", "tg64 @ d8192", "tg64 @ d32768"]
    assert machine.now < 30


def test_no_seconds_at_all() -> None:
    machine = Machine()
    found = measure(machine, Plan(seconds=0), {"tests": [speed.summary("pp9", "prompt", 9, 0, [10.0])]})
    assert machine.calls == []
    assert len(found["not_run"]) == 5


def test_what_a_deep_prefill_takes_is_predicted_from_two_shorter_ones() -> None:
    """n (a + b n), as attention makes it."""
    seen = {n: n * (0.001 + 1e-6 * n) for n in (32, 512, 2048)}
    assert speed.predict(seen, 8192) == pytest.approx(8192 * (0.001 + 1e-6 * 8192))
    assert speed.predict({}, 5) == 0
    assert speed.predict({100: 2.0}, 50) == pytest.approx(1.0)
    # A longer one that was faster a token: no deeper cost is made up.
    assert speed.predict({100: 2.0, 1000: 10.0}, 4000) == pytest.approx(40.0)


def test_a_quadratic_machine_is_not_caught_in_a_deep_prefill() -> None:
    machine = Machine(token=0.001, behind=1e-5)  # 8,192 tokens: 344 s; 2,048: 23 s
    found = measure(machine, Plan(depths=(0, 8192), seconds=250))
    assert list(found["not_run"]) == ["tg64 @ d8192"]
    assert "would take about 35" in found["not_run"]["tg64 @ d8192"]


def test_a_prefill_that_breaks_its_promise_is_given_up() -> None:
    """The first prompts say nothing of what comes: at 4,096 tokens the machine becomes a hundred times slower."""

    class Swapping(Machine):
        def _append(self, count: int, seconds: float) -> None:
            super()._append(count, seconds * (100 if self.at >= 4096 else 1))

    machine = Swapping()
    found = measure(machine, Plan(prompts=(512,), depths=(8192,), seconds=600))
    reason = found["not_run"]["tg64 @ d8192"]
    assert reason == "4,608 of 8,192 tokens took 55.3 s, all were to take 8.19 s"
    assert machine.now < 60


def test_a_runtime_that_refuses_a_depth() -> None:
    class Short(Machine):
        def room(self, tokens: int) -> None:
            if tokens > 4096:
                raise ExporterError("no room for so many")
            super().room(tokens)

    found = measure(Short(), Plan())
    assert found["not_run"] == dict.fromkeys(("tg64 @ d8192", "tg64 @ d32768"), "no room for so many")
    with pytest.raises(ExporterError, match="no room"):  # nothing runs at all: that is a failure
        measure(type("None", (Short,), {"clear": lambda self: self.room(9999)})(), Plan())


# The tests that every run has


def basic(machine: Machine, **settings: Any) -> dict[str, Any]:
    given = {"prompt": 32, "generate": 8, "repeats": 3, **settings}
    windows = TEXT[:1000].reshape(2, 500)
    return speed.basic(machine, windows, report=lambda *done: None, clock=machine.clock, **given)


def test_the_tests_of_a_proof() -> None:
    machine = Machine(first=9.0)  # the first run reads the weights in, and is in no figure
    found = basic(machine)
    assert found["prefill_runs"] == pytest.approx([1000] * 3)
    assert found["decode_runs"] == pytest.approx([10] * 3)
    assert (found["prefill_tokens_per_second"], found["decode_tokens_per_second"]) == pytest.approx((1000, 10))
    assert (found["prefill_length"], found["decode_length"], found["context"]) == (500, 8, 500)
    assert found["greedy_ids"] == list(range(7, 16))
    assert list(by_name(found)) == ["pp500", "tg8 @ d32"]
    assert found["ttft_seconds"] == pytest.approx(0.5)
    assert basic(Machine(), generate=0)["decode_tokens_per_second"] is None
    assert "tg8" in by_name(basic(Machine(), prompt=0))


def test_the_plan_goes_on_from_what_a_proof_measured() -> None:
    machine = Machine()
    known = basic(machine)
    machine.calls.clear()
    found = measure(machine, replace(speed.PROOF, seconds=3), known)
    assert {key: found[key] for key in known if key not in ("tests", "ttft_seconds", "ttft_prompt")} == {
        key: value for key, value in known.items() if key not in ("tests", "ttft_seconds", "ttft_prompt")
    }
    assert list(by_name(found)) == ["pp500", "tg8 @ d32", "pp512"]
    assert found["ttft_prompt"] == 512
    assert list(found["not_run"]) == ["pp2048", "tg64", "tg64 @ d8192"]
    assert machine.calls[0] == ("clear", 40), "no warm-up: the weights are there"


def test_a_test_that_was_measured_is_not_measured_again() -> None:
    known = {"tests": [speed.summary("pp512", "prompt", 512, 0, [1000.0])]}
    machine = Machine()
    found = measure(machine, Plan(prompts=(512,), depths=()), known)
    assert found["tests"] == known["tests"]
    assert machine.calls == []


def test_memory_is_noted_after_each_test() -> None:
    peaks = iter([10, 20, 30])
    machine = Machine()
    plan = Plan(prompts=(512, 600), depths=(0,))
    found = speed.extended(machine, plan, TEXT, {}, lambda *done: None, machine.clock, lambda: next(peaks))
    assert [test["peak_rss_bytes"] for test in found["tests"]] == [10, 20, 30]


def test_a_plan_out_of_json() -> None:
    assert Plan.of(None) is None
    assert Plan.of({"prompts": [16], "depths": [0], "seconds": 2.5}) == Plan(prompts=[16], depths=[0], seconds=2.5)
