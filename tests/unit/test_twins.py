"""Known mistakes are what they are called, by transformers, and an artifact that has one is told from one without."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from exporter.checkpoint import Checkpoint
from exporter.model.config import RopeConfig, Variant
from exporter.model.reference import ReferenceLogits, reference_logits
from exporter.numerics import decode
from exporter.validate import text, twins
from exporter.validate.metrics import between, bootstrap_mean
from tests.conftest import DEMO
from tests.unit.test_reference import Oracle, dense, max_difference, text_tokens

torch = pytest.importorskip("torch")
_VOCABULARY = 2048


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


# Each twin against transformers


@contextmanager
def set_on(thing: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(thing, name)
    setattr(thing, name, value)
    try:
        yield
    finally:
        setattr(thing, name, before)


@contextmanager
def window(oracle: Oracle, keys: int) -> Iterator[None]:
    with set_on(oracle.model.config, "sliding_window", keys):
        yield


@contextmanager
def other_parameters(oracle: Oracle, change: Callable[[str, Any], Any]) -> Iterator[None]:
    """The parameters of which `change` gives another value."""
    kept = {name: each.detach().clone() for name, each in oracle.model.named_parameters()}
    try:
        with torch.no_grad():
            for name, each in oracle.model.named_parameters():
                new = change(name, kept[name])
                if new is not None:
                    each.copy_(new)
        yield
    finally:
        with torch.no_grad():
            for name, each in oracle.model.named_parameters():
                each.copy_(kept[name])


def without_sinks(name: str, value: Any) -> Any:
    return torch.full_like(value, -1e4) if name.endswith("sinks") else None


def swapped(name: str, value: Any) -> Any:
    """Columns are gate, up, gate, up, ... in transformers, and rows of biases."""
    if "gate_up_proj" not in name:
        return None
    return value.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


@contextmanager
def plain_rope(oracle: Oracle) -> Iterator[None]:
    before = dict(oracle.model.config.rope_parameters)
    oracle.model.config.rope_parameters = {"rope_type": "default", "rope_theta": before["rope_theta"]}
    try:
        yield
    finally:
        oracle.model.config.rope_parameters = before


MISTAKES: dict[str, Callable[[Oracle], Any]] = {
    "window of 127": lambda oracle: window(oracle, 127),
    "window of 129": lambda oracle: window(oracle, 129),
    "no window": lambda oracle: window(oracle, 1 << 20),
    "no sinks": lambda oracle: other_parameters(oracle, without_sinks),
    "gate and up swapped": lambda oracle: other_parameters(oracle, swapped),
    "no YaRN": plain_rope,
}


@pytest.fixture(scope="module")
def plain_text() -> Any:
    return text_tokens(1, 300)


@pytest.fixture(scope="module")
def ours(oracle: Oracle, plain_text: Any) -> dict[str, ReferenceLogits]:
    """The release, every twin and the floor by name, of the whole vocabulary."""
    rope = oracle.config.rope
    variants = {
        twins.RELEASED: Variant(rope),
        **twins.twins(oracle.config, rope),
        twins.FLOOR: Variant(rope, rounded=True),
    }
    found = reference_logits(oracle.config, oracle.read, plain_text, list(variants.values()), top_k=_VOCABULARY)
    return dict(zip(variants, found, strict=True))


@pytest.mark.parametrize("name", [*MISTAKES, "YaRN range rounded"])
def test_a_twin_is_what_transformers_computes_with_that_mistake(
    name: str, oracle: Oracle, ours: dict[str, ReferenceLogits], plain_text: Any
) -> None:
    if name == "YaRN range rounded":
        logits = oracle.logits(plain_text, True)
    else:
        with MISTAKES[name](oracle):
            logits = oracle.logits(plain_text, False)
    assert max_difference(logits, ours[name], _VOCABULARY) < 1e-4
    # The release is far off that, and so is every other twin.
    for other in ours.keys() - {name}:
        assert max_difference(logits, ours[other], _VOCABULARY) > 0.02, other


def test_the_floor_is_as_far_as_transformers_in_bfloat16(
    ours: dict[str, ReferenceLogits], oracle: Oracle, plain_text: Any
) -> None:
    import transformers

    short = transformers.AutoModelForCausalLM.from_pretrained(
        DEMO,
        dtype=torch.bfloat16,
        attn_implementation="eager",
        quantization_config=transformers.Mxfp4Config(dequantize=True),
    )
    with torch.no_grad():
        logits = short(torch.from_numpy(plain_text), use_cache=False).logits[0].float()
    theirs = torch.log_softmax(logits.double(), 1).numpy()
    exact = dense(ours[twins.RELEASED], _VOCABULARY)
    theirs_kl = float((np.exp(exact) * (exact - theirs)).sum(axis=1).mean())
    our_kl = float(between(ours[twins.RELEASED], ours[twins.FLOOR]).kl.mean())
    assert theirs_kl / 3 < our_kl < theirs_kl * 3


def test_variants_together_are_those_alone(oracle: Oracle) -> None:
    """A mark of one variant does not reach the rows of its neighbours."""
    tokens, rope = text_tokens(2, 150), oracle.config.rope
    variants = [
        Variant(rope),
        Variant(rope, swapped=True),
        Variant(rope, rounded=True, window=100),
        Variant(rope, sinks=False),
    ]
    together = reference_logits(oracle.config, oracle.read, tokens, variants, top_k=_VOCABULARY)
    for variant, found in zip(variants, together, strict=True):
        (alone,) = reference_logits(oracle.config, oracle.read, tokens, [variant], top_k=_VOCABULARY)
        np.testing.assert_allclose(dense(found, _VOCABULARY), dense(alone, _VOCABULARY), atol=2e-3)
        assert between(alone, found).kl.max() < (1e-3 if variant.rounded else 1e-9)


def test_a_model_without_a_window_or_yarn_has_fewer_twins(demo_checkpoint: Checkpoint) -> None:
    config = demo_checkpoint.config
    everything = twins.twins(config, config.rope)
    assert set(everything) == {*MISTAKES, "YaRN range rounded"}
    full = replace(config, layer_types=("full_attention",) * config.num_hidden_layers)
    assert set(twins.twins(full, config.rope)) == {"no sinks", "gate and up swapped", "no YaRN", "YaRN range rounded"}
    assert set(twins.twins(replace(config, sliding_window=1), config.rope)) == set(twins.twins(full, config.rope))
    # Nor has a text that never leaves the window.
    assert set(twins.twins(config, config.rope, 128)) == set(twins.twins(full, config.rope))
    assert set(twins.twins(config, config.rope, 129)) == set(everything)
    rounded = replace(config.rope, truncate=True)
    assert set(everything) - set(twins.twins(config, rounded)) == {"YaRN range rounded"}
    plain = RopeConfig(theta=config.rope.theta)
    assert set(everything) - set(twins.twins(config, plain)) == {"YaRN range rounded", "no YaRN"}
    # A text that fits into the window shows none of another window: such a twin would be the release itself.
    assert set(twins.twins(config, config.rope, config.sliding_window)) == set(twins.twins(full, config.rope))
    assert set(twins.twins(config, config.rope, config.sliding_window + 1)) == set(everything)


# Telling them apart


@dataclass(frozen=True)
class Pairs:
    """By name: what an exact computation predicts, and what an artifact in bfloat16 does."""

    exact: dict[str, ReferenceLogits]
    artifact: dict[str, ReferenceLogits]

    def judged(self, name: str) -> dict[str, Any]:
        kl = {other: between(logits, self.artifact[name]).kl for other, logits in self.exact.items()}
        return twins.judge(kl.pop(twins.RELEASED), kl)


@pytest.fixture(scope="module")
def pairs(demo_checkpoint: Checkpoint) -> Pairs:
    config, rope = demo_checkpoint.config, demo_checkpoint.config.rope
    tokens = text.windows(DEMO / "tokenizer.json", text.standard_library(), 2, 448).tokens
    variants = {twins.RELEASED: Variant(rope), **twins.twins(config, rope)}
    every = [*variants.values(), *(replace(v, rounded=True) for v in variants.values())]

    def read(name: str, start: int, stop: int) -> Any:
        return decode.values(demo_checkpoint.read(name, start, stop))

    made = reference_logits(config, read, tokens, every, top_k=256)
    n = len(variants)
    return Pairs(dict(zip(variants, made[:n], strict=True)), dict(zip(variants, made[n:], strict=True)))


def test_an_artifact_as_released_passes(pairs: Pairs) -> None:
    found = pairs.judged(twins.RELEASED)
    assert (found["nearest"], found["nearest_is_released"], found["passed"]) == (twins.RELEASED, True, True)
    assert len(found["each"]) == 7
    json.dumps(found, allow_nan=False)
    for each in found["each"]:
        low, high = each["ci95"]
        assert 0.5 < low <= each["share"] <= high <= 1
        assert each["nearer_by"] > 0


@pytest.mark.parametrize("name", [*MISTAKES, "YaRN range rounded"])
def test_an_artifact_with_a_mistake_is_named_by_it(name: str, pairs: Pairs) -> None:
    found = pairs.judged(name)
    assert (found["nearest"], found["nearest_is_released"], found["passed"]) == (name, False, False)
    (own,) = [each for each in found["each"] if each["name"] == name]
    assert own["ci95"][1] < 0.5
    assert own["nearer_by"] < 0


def test_a_limit_on_the_divergence_would_not_show_a_window_off_by_one(pairs: Pairs) -> None:
    """Why they are told apart by counting: 8 bits lose more than the profiles' "near" class may than this."""
    kl = between(pairs.exact[twins.RELEASED], pairs.exact["window of 127"]).kl
    assert kl.mean() < 0.005


def test_what_is_counted() -> None:
    """Shares, halves for equal ones, and an interval that a few large values do not sway."""
    released = np.full(640, 1.0)
    other = released.copy()
    other[:320] += 1e-6
    other[320:330] -= 100  # few, and far
    (each,) = twins.judge(released, {"t": other})["each"]
    assert each["share"] == (320 + 310 / 2) / 640
    assert each["nearer_by"] < 0
    sides = np.r_[np.ones(320), np.zeros(10), np.full(310, 0.5)]
    assert each["ci95"] == list(bootstrap_mean(sides))
    assert each["kl_mean"] == pytest.approx(other.mean())


def test_as_near_to_both_is_not_passed() -> None:
    same = np.linspace(0, 1, 640)
    found = twins.judge(same, {"t": same.copy()})
    assert (found["nearest"], found["passed"]) == (twins.RELEASED, False)
    assert found["each"][0]["ci95"] == [0.5, 0.5]


def test_more_often_nearer_is_not_enough() -> None:
    """Neighbours depend on each other: six runs of ten may be chance, so the interval has to lie above one half."""
    nearer = np.repeat([1.0, 1, 0, 1, 0, 1, 0, 1, 0, 1], 64) * 2 - 1
    found = twins.judge(np.zeros(640), {"t": nearer})
    assert (found["nearest"], found["passed"]) == (twins.RELEASED, False)
    assert found["nearest_is_released"] is True
    (each,) = found["each"]
    assert each["share"] == pytest.approx(0.6)
    assert each["ci95"][0] < 0.5 < each["ci95"][1]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_never_passes(bad: float) -> None:
    released, clear, damaged = np.zeros(256), np.ones(256), np.ones(256)
    assert twins.judge(released, {"a": clear})["passed"] is True
    damaged[7] = bad
    found = twins.judge(released, {"a": clear, "b": damaged})
    assert (found["nearest"], found["nearest_is_released"], found["passed"]) == (twins.RELEASED, False, False)
    assert [each["share"] is None for each in found["each"]] == [False, True]
    json.dumps(found, allow_nan=False)
    found = twins.judge(np.full(256, bad), {"a": clear})
    assert found["passed"] is False


def test_nothing_to_compare_with_never_passes() -> None:
    found = twins.judge(np.zeros(64), {})
    assert (found["nearest_is_released"], found["passed"], found["each"]) == (False, False, [])
