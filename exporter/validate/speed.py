"""How fast a runtime is: the same tests in every runtime, named and cut as llama-bench cuts them.

"pp512" is a prompt of 512 tokens into an empty cache; "tg64 @ d8192" is 64 tokens, one at a time, after 8,192. Rates
are tokens per second. A test that the machine does not allow, being deeper than the context or longer than the
seconds that are left, is named with the reason. Source: llama.cpp tools/llama-bench/README.md.

Unlike llama-bench, prompts are text, not random tokens: which experts a token takes decides how much is read. And at
a depth the runs follow one another, each deeper by its own tokens, because no runtime here can go back.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from exporter.errors import ExporterError, UsageError
from exporter.model.reference import I64
from exporter.validate import child
from exporter.validate.child import OnProgress

PIECE = 512  # tokens of a prompt that go in at once: llama.cpp's micro-batch; ONNX graphs give logits of each
PROMPT_TEXT = 4096  # tokens of text that prompts are cut from
PROMPTS_ARE = "held-out text, repeated to the length asked for"

FIGURES = ("ttft_seconds", "ttft_prompt", "tests", "not_run", "prompts_are")  # of `extended`

_PATIENCE = 2.0  # a prefill that takes this many times what was predicted is given up
_SLACK = 1.0  # and this many seconds more: the first run of anything is slow

Clock = Callable[[], float]


class Runner(Protocol):
    """One sequence in a runtime, with a cache."""

    def room(self, tokens: int) -> None:
        """Make sure that so many tokens have room. What is in the cache may be lost."""

    def clear(self) -> None:
        """Forget the sequence."""

    def prefill(self, tokens: Sequence[int] | I64) -> None:
        """Append tokens, at least one and at most PIECE."""

    def first(self) -> int:
        """The token that is most likely next after a prefill."""

    def step(self, token: int) -> int:
        """Append one; the token that is most likely next."""


@dataclass(frozen=True)
class Plan:
    """What to measure: `prompts` of so many tokens, `generate` tokens at each of `depths`, each `repeats` times.

    seconds: for all of it. context: tokens that the model takes, 0 where nothing says so.
    """

    prompts: Sequence[int] = (512, 2048)
    generate: int = 64
    depths: Sequence[int] = (0, 8192, 32768)
    repeats: int = 3
    seconds: float = 600.0
    context: int = 0

    @staticmethod
    def of(raw: Plan | Mapping[str, Any] | None) -> Plan | None:
        """As it comes out of a request's JSON."""
        return raw if raw is None or isinstance(raw, Plan) else Plan(**raw)


# A proof runs on any machine, so what it may add to its own tests is short.
PROOF = Plan(depths=(0, 8192), seconds=10.0)


def proof_plan() -> Plan:
    """PROOF, with as many seconds as $EXPORTER_SPEED_SECONDS says. Raises UsageError for what is no number."""
    asked = os.environ.get("EXPORTER_SPEED_SECONDS")
    try:
        return PROOF if not asked else replace(PROOF, seconds=max(0.0, float(asked)))
    except ValueError:
        raise UsageError(f"EXPORTER_SPEED_SECONDS is {asked!r}, no number of seconds", hint="unset it") from None


def prompt_test(tokens: int) -> str:
    return f"pp{tokens}"


def generate_test(tokens: int, depth: int) -> str:
    return f"tg{tokens} @ d{depth}" if depth else f"tg{tokens}"


def measure(
    runner: Runner,
    plan: Plan | Mapping[str, Any] | None,
    windows: I64,
    prompt: int,
    generate: int,
    repeats: int,
    report: OnProgress,
) -> dict[str, Any]:
    """`speed`: what `basic` gives, if `repeats`, and what `extended` gives, with a plan. `memory` of this process.

    The memory is that of the basic tests where there are any: deeper ones take more, and have their own figure.
    """
    found: dict[str, Any] = {}
    memory = child.memory()
    if repeats:
        found = basic(runner, windows, prompt, generate, repeats, report)
        memory = child.memory()
    if asked := Plan.of(plan):
        found = extended(runner, asked, windows, found, report, memory=child.peak)
        memory = memory if repeats else child.memory()
    return {"speed": found, "memory": memory}


# The tests that every run has


def basic(
    runner: Runner,
    windows: I64,
    prompt: int,
    generate: int,
    repeats: int,
    report: OnProgress,
    clock: Clock = time.perf_counter,
) -> dict[str, Any]:
    """Each of `repeats` windows [W, T] at once, then `generate` greedy tokens after `prompt` of the first.

    prompt 0 generates after one token. Medians, each run, `greedy_ids`, and the same as `tests`; see `extended`.
    """
    length, total = windows.shape[1], repeats * 2
    room = max(length, max(prompt, 1) + generate)
    runner.room(room)
    runner.clear()
    _prefill(runner, windows[0, : prompt or length])  # the first run reads the weights in
    prefill, decode, latencies, greedy = [], [], list[float](), list[int]()
    for repeat in range(repeats):
        report("speed", repeat, total)
        runner.clear()
        started = clock()
        _prefill(runner, windows[repeat % len(windows)])
        prefill.append(length / (clock() - started))
    for repeat in range(repeats if generate else 0):
        report("speed", repeats + repeat, total)
        runner.clear()
        first = _prefill(runner, windows[0, : max(prompt, 1)])
        greedy, times = _steps(runner, first, generate, clock)
        decode.append(generate / sum(times))
        latencies += times
    report("speed", total, total)
    tests = [summary(prompt_test(length), "prompt", length, 0, prefill)]
    if decode:
        tests.append(summary(generate_test(generate, prompt), "generate", generate, prompt, decode, latencies))
    return {
        "prefill_tokens_per_second": statistics.median(prefill),
        "decode_tokens_per_second": statistics.median(decode) if decode else None,
        "prefill_runs": prefill,
        "decode_runs": decode,
        "prefill_length": length,
        "decode_length": generate,
        "context": room,
        "greedy_ids": greedy,
        "tests": tests,
        "ttft_seconds": length / statistics.median(prefill),
        "ttft_prompt": length,
        "prompts_are": PROMPTS_ARE,
    }


def _prefill(runner: Runner, tokens: Sequence[int] | I64) -> int:
    for at in range(0, len(tokens), PIECE):
        runner.prefill(tokens[at : at + PIECE])
    return runner.first()


def _steps(runner: Runner, token: int, count: int, clock: Clock) -> tuple[list[int], list[float]]:
    """`token` and `count` more after it; the seconds that each of these took."""
    made, times = [token], []
    started = clock()
    for _ in range(count):
        made.append(runner.step(made[-1]))
        ended = clock()
        times.append(ended - started)
        started = ended
    return made, times


def summary(
    test: str, kind: str, tokens: int, depth: int, runs: Sequence[float], latencies: Sequence[float] = ()
) -> dict[str, Any]:
    """One test in figures. runs: tokens per second. latencies: seconds of single tokens, of all runs together."""
    figures: dict[str, Any] = {
        "test": test,
        "kind": kind,
        "tokens": tokens,
        "depth": depth,
        "mean": statistics.fmean(runs),
        "sd": statistics.stdev(runs) if len(runs) > 1 else None,
        "median": statistics.median(runs),
        "low": min(runs),
        "high": max(runs),
        "runs": list(runs),
    }
    if latencies:
        figures["latency_ms"] = {
            "median": statistics.median(latencies) * 1000,
            "p99": float(np.percentile(latencies, 99)) * 1000,
        }
    return figures


# The tests that a machine may be too slow or too small for


def extended(
    runner: Runner,
    plan: Plan,
    text: I64,
    known: Mapping[str, Any],
    report: OnProgress,
    clock: Clock = time.perf_counter,
    memory: Callable[[], int | None] = lambda: None,
) -> dict[str, Any]:
    """`known` (what `basic` gave) with the plan's tests added; `not_run`: {test: reason} of the others.

    text: tokens to take prompts from. Before a test its seconds are predicted from the rates measured so far;
    what does not fit into those that are left is not begun, and runs that no longer fit are left out.
    `memory` gives the peak bytes of the process so far, noted after each test.
    """
    found = _Extended(runner, plan, np.asarray(text).reshape(-1), clock, memory)
    if known:
        found.learn(known["tests"])
    else:
        found.warm_up()
    asked = [(prompt_test(n), partial(found.prompt, tokens=n)) for n in plan.prompts]
    asked += [(generate_test(plan.generate, d), partial(found.generate, depth=d)) for d in plan.depths]
    for done, (name, run) in enumerate(asked):
        if not known:  # behind the basic tests their stage stays
            report("speed", done, len(asked))
        if any(test["test"] == name for test in found.tests):
            continue
        try:
            run(name)
        except _NotRun as reason:
            found.not_run[name] = str(reason)
        except ExporterError as error:
            found.not_run[name] = error.message
    first = _first_token(found.tests)
    return {**known, **first, "tests": found.tests, "not_run": found.not_run, "prompts_are": PROMPTS_ARE}


def _first_token(tests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds from a prompt to its first token: of 512 tokens if that was measured, else of the first prompt."""
    prompts = [test for test in tests if test["kind"] == "prompt"]
    for test in sorted(prompts, key=lambda test: test["tokens"] != 512)[:1]:
        return {"ttft_seconds": test["tokens"] / test["median"], "ttft_prompt": test["tokens"]}
    return {}


class _NotRun(Exception):
    """Why a test was not run."""


@dataclass
class _Extended:
    """Tests so far, and what they say about the seconds of the next."""

    runner: Runner
    plan: Plan
    text: I64
    clock: Clock
    memory: Callable[[], int | None]
    tests: list[dict[str, Any]] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)
    spent: float = 0.0
    prefills: dict[int, float] = field(default_factory=dict)  # seconds by number of tokens
    step: float = 0.0  # seconds of one token, the last that was measured; 0: not yet

    def learn(self, tests: Sequence[Mapping[str, Any]]) -> None:
        """Take over what was measured before."""
        for test in tests:
            self.tests.append(dict(test))
            if test["kind"] == "prompt":
                self.prefills[test["tokens"]] = test["tokens"] / test["median"]
            else:
                self.step = 1 / test["median"]

    def warm_up(self) -> None:
        """The first run reads the weights in; what it takes says nothing of later ones but where to begin."""
        tokens = min([PIECE, *self.plan.prompts, *filter(None, self.plan.depths)])
        self.runner.room(tokens + 2)
        self.runner.clear()
        _, token = self._prefill(tokens, 0.0)
        _, (first, self.step) = _steps(self.runner, token, 2, self.clock)  # the first loads kernels: 0.8 s on a GPU
        self.spent += first + self.step

    def prompt(self, name: str, tokens: int) -> None:
        self._require_room(tokens)
        predicted = predict(self.prefills, tokens)
        self._require_time(predicted)
        self.runner.room(tokens)
        runs: list[float] = []
        while len(runs) < self.plan.repeats and (not runs or predicted <= self._left()):
            self.runner.clear()
            seconds, _ = self._prefill(tokens, predicted)
            runs.append(tokens / seconds)
            predicted = seconds
        self._add(summary(name, "prompt", tokens, 0, runs))

    def generate(self, name: str, depth: int) -> None:
        count, before = self.plan.generate, max(depth, 1)
        self._require_room(before + count)
        reach = self.plan.repeats if depth else 1  # runs that follow one another
        if self.plan.context:
            reach = min(reach, (self.plan.context - before) // count)
        filling, one = predict(self.prefills, before), count * self.step
        self._require_time(filling + one)
        self.runner.room(before + count * reach)
        runs: list[float] = []
        latencies: list[float] = []
        token = 0
        for run in range(min(self.plan.repeats, reach) if depth else self.plan.repeats):
            if runs and (one if depth else filling + one) > self._left():
                break
            if run == 0 or not depth:
                self.runner.clear()
                _, token = self._prefill(before, filling)
            started = self.clock()
            made, times = _steps(self.runner, token, count, self.clock)
            self.spent += self.clock() - started
            token, one = made[-1], sum(times)
            runs.append(count / one)
            latencies += times
        self.step = one / count
        self._add(summary(name, "generate", count, depth, runs, latencies))

    def _add(self, test: dict[str, Any]) -> None:
        peak = self.memory()
        self.tests.append(test if peak is None else {**test, "peak_rss_bytes": peak})

    def _left(self) -> float:
        return self.plan.seconds - self.spent

    def _require_room(self, tokens: int) -> None:
        if self.plan.context and tokens > self.plan.context:
            raise _NotRun(f"{tokens:,} tokens are more than the context of {self.plan.context:,}")

    def _require_time(self, predicted: float) -> None:
        left = max(0.0, self._left())
        if predicted > left or left == 0:
            raise _NotRun(f"would take about {predicted:.3g} s here, {left:.3g} s of {self.plan.seconds:g} s are left")

    def _prefill(self, tokens: int, predicted: float) -> tuple[float, int]:
        """Seconds, and the next token. _NotRun as soon as it takes far longer than predicted."""
        limit = _PATIENCE * predicted + _SLACK if predicted else max(self._left(), _SLACK)
        started, seconds = self.clock(), 0.0
        try:
            for at in range(0, tokens, PIECE):
                piece = np.arange(at, min(at + PIECE, tokens)) % len(self.text)
                self.runner.prefill(self.text[piece])
                seconds, done = self.clock() - started, at + len(piece)
                if done < tokens and seconds > limit:
                    raise _NotRun(
                        f"{done:,} of {tokens:,} tokens took {seconds:.3g} s, all were to take {predicted:.3g} s"
                    )
            token = self.runner.first()
        finally:
            seconds = self.clock() - started
            self.spent += seconds
        self.prefills[tokens] = seconds
        return seconds, token


def predict(prefills: Mapping[int, float], tokens: int) -> float:
    """Seconds that a prefill of `tokens` takes, from those of others; 0.0 where there are none.

    A token costs a constant and, for the keys that it looks at, something for each token before it: the two longest
    prefills say how much. Where the longer one was no slower a token, only the constant is left.
    """
    if not prefills:
        return 0.0
    longest, *others = sorted(prefills, reverse=True)
    constant, slope = prefills[longest] / longest, 0.0
    if others:
        slope = max(0.0, (constant - prefills[others[0]] / others[0]) / (longest - others[0]))
        constant = max(0.0, constant - slope * longest)
    return tokens * (constant + slope * tokens)
