"""What a proof says of accuracy: by text, part of a conversation and depth; and what the top k of a vocabulary lose."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from exporter.checkpoint import Checkpoint
from exporter.model.config import Variant
from exporter.model.reference import ReferenceLogits, following, reference_logits
from exporter.numerics import decode
from exporter.validate import harmony, text, twins
from exporter.validate.accuracy import CONVERSATIONS, LONG, PLAIN, Column, Further, further_report, generation
from exporter.validate.metrics import Positions, bootstrap_mean, compare, summary
from tests.conftest import DEMO
from tests.unit.test_metrics import case, keep, true_kl

torch = pytest.importorskip("torch")
TOKENIZER = text.load_tokenizer(DEMO / "tokenizer.json")
_VOCABULARY = 2048


# The top k, and the mass of the rest


@pytest.fixture(scope="module")
def wholes(demo_checkpoint: Checkpoint) -> list[ReferenceLogits]:
    """Of the whole vocabulary: as released, in bfloat16, and with mistakes of a small and of a large effect."""
    torch.set_num_threads(1)  # two test processes on two cores: more threads only wait for each other
    rope = demo_checkpoint.config.rope
    variants = [Variant(rope), Variant(rope, rounded=True), Variant(rope, window=127), Variant(rope, sinks=False)]
    tokens = text.windows(DEMO / "tokenizer.json", text.standard_library(), 1, 320).tokens

    def read(name: str, start: int, stop: int) -> Any:
        return decode.values(demo_checkpoint.read(name, start, stop))

    return reference_logits(demo_checkpoint.config, read, tokens, variants, top_k=_VOCABULARY)


def cut(whole: ReferenceLogits, k: int) -> ReferenceLogits:
    """The same with k tokens kept."""
    rest = np.exp(whole.top_logprobs[:, k:].astype(np.float64)).sum(axis=1)
    return replace(
        whole,
        top_ids=whole.top_ids[:, :k],
        top_logprobs=whole.top_logprobs[:, :k],
        tail_logprob=np.log(rest).astype(np.float32),
    )


def logits(whole: ReferenceLogits) -> Any:
    out = np.empty((whole.tokens.size, _VOCABULARY), np.float32)
    np.put_along_axis(out, whole.top_ids.astype(np.int64), whole.top_logprobs, axis=1)
    return out


@pytest.mark.parametrize("k", [256, 512, 1024])
def test_what_the_top_k_lose_is_about_the_mass_of_the_tail(k: int, wholes: list[ReferenceLogits]) -> None:
    """Measured: 0.7 to 3.3 times the tail's share of the divergence; that share is 3 % at k = 256 and 0.2 % at 1024."""
    released, *others = wholes
    kept = cut(released, k)
    tail = float(np.exp(kept.tail_logprob.astype(np.float64)).mean())
    assert tail < {256: 0.05, 512: 0.02, 1024: 0.004}[k]
    for other in others:
        exact = compare(released, 0, logits(other)).kl
        found = compare(kept, 0, logits(other)).kl
        assert (found <= exact + 1e-12).all()
        assert 0 < exact.mean() - found.mean() <= 4 * tail * exact.mean() + 1e-9


@pytest.mark.parametrize(("steepness", "noise", "tail"), [(1.5, 0.1, 0.03), (1.5, 1.0, 0.03), (1.2, 0.1, 0.2)])
def test_a_vocabulary_of_the_released_size(steepness: float, noise: float, tail: float) -> None:
    """201,088 tokens with probabilities by a power of their rank, and errors that the tail has as the head has them."""
    rng = np.random.default_rng(0)
    ranks = np.stack([rng.permutation(201_088) for _ in range(4)])
    reference = (-steepness * np.log1p(ranks) + 0.3 * rng.normal(size=ranks.shape)).astype(np.float32)
    artifact = (reference + noise * rng.normal(size=ranks.shape)).astype(np.float32)
    kept = keep(reference, np.zeros((1, 4), np.int64), 1024)
    mass = float(np.exp(kept.tail_logprob.astype(np.float64)).mean())
    assert mass < tail
    exact, found = true_kl(reference, artifact), compare(kept, 0, artifact).kl
    assert (found <= exact + 1e-9).all()
    assert exact.mean() - found.mean() <= 4 * mass * exact.mean() + 1e-9


# Flips


def test_flips_are_counted_one_by_one() -> None:
    reference, artifact, tokens = case(11, vocab=12, shape=(3, 40), noise=1.5)
    found = summary(compare(keep(reference, tokens, 12), 0, artifact))
    to_wrong = to_right = scored = 0
    for n, target in enumerate(following(tokens)):
        if target < 0:
            continue
        scored += 1
        was, now = reference[n].argmax() == target, artifact[n].argmax() == target
        to_wrong += was and not now
        to_right += now and not was
    assert min(to_wrong, to_right) > 0
    assert (found["flips_to_wrong"], found["flips_to_right"]) == (to_wrong, to_right)
    assert scored == 117
    assert found["flips"] == pytest.approx((to_wrong + to_right) / scored)


def right(reference: str, artifact: str) -> Positions:
    """ "1" right, "0" wrong, "-" no token follows."""
    sides = [np.array([{"1": 1.0, "0": 0.0, "-": np.nan}[c] for c in side]) for side in (reference, artifact)]
    logprob = np.where(np.isnan(sides[0]), np.nan, -1.0)
    return Positions(np.zeros(len(reference)), np.ones(len(reference)), logprob, logprob, *sides)


def test_flips_by_hand() -> None:
    found = summary(right("1111 1111 00 11 00 -".replace(" ", ""), "0000 0000 11 11 00 -".replace(" ", "")))
    assert (found["flips_to_wrong"], found["flips_to_right"], found["positions"]) == (8, 2, 15)
    assert found["flips"] == 10 / 14
    # Two or fewer of ten on one side, twice: McNemar's exact test.
    assert found["flips_p"] == pytest.approx(2 * (1 + 10 + 45) / 1024)


def test_flips_of_equal_and_of_unscored_texts() -> None:
    found = summary(right("10", "10"))
    assert (found["flips"], found["flips_p"]) == (0.0, 1.0)
    found = summary(right("--", "--"))
    assert found["flips"] is None
    assert (found["ppl"], found["ppl_ratio"]) == (None, None)
    json.dumps(found, allow_nan=False)


# The report


CHAT = (
    "<|start|>system<|message|>Be brief.<|end|><|start|>user<|message|>Look it up.<|end|>"
    "<|start|>assistant<|channel|>analysis<|message|>They want a search.<|end|>"
    "<|start|>assistant to=functions.search<|channel|>commentary json<|message|>{}<|call|>"
    "<|start|>functions.search to=assistant<|channel|>commentary<|message|>nothing<|end|>"
    "<|start|>assistant<|channel|>final<|message|>There is nothing to be found.<|return|>"
)


def made_up(tokens: Any, seed: int = 0) -> ReferenceLogits:
    rng = np.random.default_rng(seed)
    return keep(rng.normal(size=(tokens.size, _VOCABULARY)).astype(np.float32), tokens, 64)


def counting(n: int) -> Positions:
    """Position i has a divergence of i, so that means say which positions were taken."""
    at = np.arange(n, dtype=np.float64)
    return Positions(at, np.ones(n), -np.ones(n), -np.ones(n), np.ones(n), np.ones(n))


def asked(columns: list[Column], reference: ReferenceLogits, **more: Any) -> Further:
    settings: dict[str, Any] = {
        "window": 8,
        "trained": 40,
        "source": "plain text",
        "columns": columns,
        "twins": {},
        "base": reference,
        "floor": None,
        "routes": None,
        "prompts": [],
        "answers": [],
        "answer": 0,
        "ends": frozenset(),
        "not_run": {},
    }
    return Further(**settings | more)


def report(further: Further, found: Mapping[str, Mapping[str, Positions]], **more: Any) -> dict[str, Any]:
    plain = further.base, counting(further.base.tokens.size)
    settings = {"base": None, "beside": {}, "answers": None} | more
    made = further_report(further, plain, found, **settings)
    json.dumps(made, allow_nan=False)
    return made


@pytest.fixture(scope="module")
def conversation() -> Column:
    """Two windows of one conversation, each with another beginning."""
    ids = text.encode(TOKENIZER, CHAT)
    row = [*ids, *text.encode(TOKENIZER, "<|start|>user<|message|>Thanks.<|end|>")]
    tokens = np.array([row, row], np.int64)
    return Column(CONVERSATIONS, "made up", made_up(tokens), harmony.labels(tokens.reshape(-1).tolist(), TOKENIZER))


def test_channels_add_up_to_what_the_assistant_says(conversation: Column) -> None:
    tokens = conversation.reference.tokens
    found = {CONVERSATIONS: {"release": counting(tokens.size)}}
    block = report(asked([conversation], conversation.reference), found)["accuracy"][CONVERSATIONS]
    wanted: dict[str, list[int]] = {}
    for w in range(2):
        labels = harmony.labels(tokens[w].tolist(), TOKENIZER)
        for t in range(tokens.shape[1] - 1):  # position t predicts token t + 1
            if labels[t + 1]:
                wanted.setdefault(labels[t + 1], []).append(w * tokens.shape[1] + t)
    assert list(wanted) == ["header", "analysis", "tool call", "final"]
    assert {name: figures["positions"] for name, figures in block["channels"].items()} == {
        name: len(at) for name, at in wanted.items()
    }
    for name, at in wanted.items():
        assert block["channels"][name]["kl_mean"] == pytest.approx(np.mean(at)), name
    everything = sorted(n for at in wanted.values() for n in at)
    assert block["all"]["positions"] == len(everything) < tokens.size - 2
    assert block["all"]["kl_mean"] == pytest.approx(np.mean(everything))
    assert block["tokens"] == tokens.size
    # A closing token belongs to what it closes: <|call|> is one that the assistant has to say.
    words = len(text.encode(TOKENIZER, "{}"))
    assert len(wanted["tool call"]) == 2 * (words + 1)


def test_a_text_of_others_words_has_no_figures(conversation: Column) -> None:
    silent = replace(conversation, parts=[""] * conversation.reference.tokens.size)
    found = {CONVERSATIONS: {"release": counting(conversation.reference.tokens.size)}}
    block = report(asked([silent], conversation.reference), found)["accuracy"][CONVERSATIONS]
    assert block.keys() == {"source", "sha256", "tokens"}


def test_depths_of_a_long_text() -> None:
    tokens = np.arange(100).reshape(2, 50) % 17
    long = Column(LONG, "a long text", made_up(tokens))
    block = report(asked([long], long.reference), {LONG: {"release": counting(100)}})["accuracy"][LONG]
    at = np.tile(np.arange(50), 2)
    wanted = {"within the window": at < 8, "past the window": (at >= 8) & (at < 40), "past 40": at >= 40}
    assert {name: figures["positions"] for name, figures in block["depths"].items()} == {
        name: mask.sum() for name, mask in wanted.items()
    }
    for name, mask in wanted.items():
        assert block["depths"][name]["kl_mean"] == np.arange(100)[mask].mean()
    assert "channels" not in block
    assert block["all"]["positions"] == 100
    short = report(asked([], made_up(tokens[:, :6])), {})["accuracy"][PLAIN]
    assert list(short["depths"]) == ["within the window"]


def test_the_runtimes_own_arithmetic_is_beside_the_release() -> None:
    tokens = np.arange(40).reshape(1, 40)
    as_runtime = replace(counting(40), kl=np.full(40, 0.25))
    long = Column(LONG, "a long text", made_up(tokens), runtime=made_up(tokens, 1))
    block = report(asked([long], long.reference), {LONG: {"release": counting(40), "export": as_runtime}})
    assert block["accuracy"][LONG]["as_runtime"]["kl_mean"] == 0.25
    assert block["accuracy"][LONG]["all"]["kl_mean"] == 19.5
    # Where there is one arithmetic only, both are the same.
    assert block["accuracy"][PLAIN]["as_runtime"] == block["accuracy"][PLAIN]["all"]


def test_the_curve_and_the_means_by_position() -> None:
    tokens = np.arange(1000).reshape(2, 500)
    block = report(asked([], made_up(tokens)), {})["accuracy"][PLAIN]
    quantiles, values = zip(*block["curve"], strict=True)
    assert list(quantiles) == sorted(quantiles)
    assert (quantiles[0], quantiles[-1]) == (0, 1)
    assert values == tuple(np.quantile(np.arange(1000), quantiles))
    assert len(block["by_position"]) == 63  # runs of eight: 64 at most
    first, mean = block["by_position"][2]
    assert first == 16
    assert mean == np.mean([*range(16, 24), *range(516, 524)])


def test_a_position_that_is_not_finite_is_left_out_of_curves_and_passes_nothing() -> None:
    tokens = np.arange(128).reshape(1, 128)
    further = asked([], made_up(tokens))
    damaged = counting(128)
    damaged.kl[70] = np.nan
    made = further_report(further, (further.base, damaged), {}, None, {}, None)
    json.dumps(made, allow_nan=False)
    block = made["accuracy"][PLAIN]
    assert block["all"]["kl_mean"] is None
    assert block["all"]["kl_max"] is None
    assert 70 not in [first for first, _ in block["by_position"]]
    assert len(block["by_position"]) == 63


def test_twins_are_of_the_first_windows() -> None:
    tokens = np.arange(256).reshape(4, 64)
    reference = made_up(tokens)
    further = asked([], reference, twins={"t": reference.first(2)}, floor=made_up(tokens[:2], 1))
    further = replace(further, base=reference.first(2))
    near, far = counting(256), counting(128)
    far = replace(far, kl=far.kl + 1)
    made = further_report(further, (reference, near), {}, near, {"t": far}, None)
    assert made["twins"]["passed"] is True
    assert made["twins"]["each"][0]["nearer_by"] == 1
    assert made["floor"]["kl_mean"] > 0
    assert made["floor"]["what"].startswith("the reference in bfloat16")
    without = further_report(replace(further, twins={}), (reference, near), {}, near, {}, None)
    assert "twins" not in without
    assert twins.judge(near.kl[:128], {"t": far.kl})["each"] == made["twins"]["each"]


def test_an_interval_of_a_channel_is_of_that_channel(conversation: Column) -> None:
    tokens = conversation.reference.tokens
    found = {CONVERSATIONS: {"release": counting(tokens.size)}}
    block = report(asked([conversation], conversation.reference), found)["accuracy"][CONVERSATIONS]
    labels = np.array(["", *harmony.labels(tokens.reshape(-1).tolist(), TOKENIZER)])[1:]
    where = np.roll(labels == "final", -1)
    where[tokens.shape[1] - 1 :: tokens.shape[1]] = False
    assert block["channels"]["final"]["kl_ci95"] == list(bootstrap_mean(np.flatnonzero(where).astype(np.float64)))


# Answers


def test_answers_are_compared_up_to_the_first_that_differs() -> None:
    wanted, found = [[1, 2, 3, 9], [1, 2, 3, 4], [5, 9]], [[1, 2, 3, 9], [1, 2, 7, 4], [5, 6, 7, 8]]
    made = generation(wanted, found, 4, frozenset({9}))
    assert made["agreement"] == pytest.approx((1 + 2 / 4 + 1 / 4) / 3)
    assert made["same"] == pytest.approx(1 / 3)
    assert (made["length"], made["length_reference"]) == (pytest.approx(4), pytest.approx(10 / 3))
    assert made["length_ratio"] == pytest.approx(1.2)
    assert made["length_difference"] == pytest.approx(0.2)
    assert (made["ended"], made["ended_reference"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert (made["prompts"], made["tokens"]) == (3, 4)


def test_an_answer_that_only_goes_on_is_no_full_agreement() -> None:
    made = generation([[1, 2]], [[1, 2, 3, 4]], 4, frozenset())
    assert (made["agreement"], made["same"]) == (0.5, 0.0)
    assert "length_difference" not in made, "no answer of the reference ended: all are as long as they may be"
    made = generation([[1, 2, 3, 9]], [[1]], 4, frozenset({9}))
    assert (made["agreement"], made["length_difference"]) == (0.25, 0.75)


def test_answers_that_nobody_was_asked_for_are_not_reported() -> None:
    tokens = np.arange(64).reshape(1, 64)
    further = asked([], made_up(tokens), prompts=[[1]], answers=[[2]], answer=1)
    assert "generation" not in report(further, {})
    assert report(further, {}, answers=[[2]])["generation"]["same"] == 1.0
