"""The endpoint's parts: what a client asks, how a token is drawn, what a turn is taken apart into."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.errors import ExporterError
from exporter.validate import text
from exporter.validate.endpoint import requests, sampling, vocabulary
from exporter.validate.endpoint.requests import ApiError
from exporter.validate.endpoint.turn import Call, Growing, Turn
from exporter.validate.endpoint.vocabulary import Vocabulary

DEMO = Path(__file__).parents[1] / "data" / "tiny-gpt-oss"


@pytest.fixture(scope="module")
def words() -> Vocabulary:
    tokenizer = text.load_tokenizer(DEMO / "tokenizer.json")
    pieces, control = vocabulary.of_tokenizer(tokenizer, 2048)
    return Vocabulary(pieces, frozenset(control), lambda t: text.encode(tokenizer, t))


# Tokens


@pytest.mark.parametrize("written", text.EDGE_CASES)
def test_pieces_are_the_bytes_of_the_text(words: Vocabulary, written: str) -> None:
    assert words.bytes_of(words.encode(written)) == written.encode()


def test_names_of_tokens_tell_them_apart(words: Vocabulary) -> None:
    names = [words.name(token) for token in range(len(words.pieces)) if words.pieces[token]]
    assert len(set(names)) == len(names)
    assert words.name(words.encode("\u20ac")[0]).startswith("bytes:\\x")
    assert words.token_to_id("<|call|>") == words.encode("<|call|>")[0]
    assert words.token_to_id("return") is None


# Drawing


def test_log_probabilities_are_those_of_a_softmax() -> None:
    logits = np.random.default_rng(0).normal(0, 30, (3, 500)).astype(np.float32)
    found = sampling.log_probabilities(logits)
    for row, expected in zip(found, logits.astype(float), strict=True):
        assert row == pytest.approx([x - math.log(math.fsum(np.exp(expected))) for x in expected], abs=1e-4)
        assert math.fsum(np.exp(row)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_an_error(bad: float) -> None:
    with pytest.raises(ExporterError, match="not finite"):
        sampling.log_probabilities(np.array([0.0, bad], np.float32))


def test_tokens_come_as_often_as_they_are_likely() -> None:
    log_p = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    at = (np.arange(10_000) + 0.5) / 10_000
    share = np.bincount([sampling.sample(log_p, u, 1.0, 1.0) for u in at], minlength=4) / len(at)
    assert share == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=2e-4)
    share = np.bincount([sampling.sample(log_p, u, 1.0, 0.75) for u in at], minlength=4) / len(at)
    assert share == pytest.approx([0.625, 0.375, 0, 0], abs=2e-4)
    share = np.bincount([sampling.sample(log_p, u, 0.5, 1.0) for u in at], minlength=4) / len(at)
    assert share == pytest.approx(np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365, abs=2e-4)
    assert {sampling.sample(log_p, u, 0, 1.0) for u in at} == {0}


@given(st.lists(st.floats(-80, 0), min_size=1, max_size=30), st.floats(0, 1, exclude_max=True), st.floats(0.01, 1))
def test_a_drawn_token_is_one_that_may_come(values: list[float], uniform: float, top_p: float) -> None:
    log_p = sampling.log_probabilities(np.array(values, np.float32))
    found = sampling.sample(log_p, uniform, 1.0, top_p)
    likelier = math.fsum(p for p in np.exp(log_p) if p > np.exp(log_p[found]))
    assert likelier < top_p + 1e-9


@given(st.lists(st.sampled_from([-3.0, -2.0, -1.0, -0.5]), min_size=1, max_size=12), st.integers(0, 14))
def test_top_is_a_stable_sort(values: list[float], k: int) -> None:
    found = sampling.top(np.array(values), k)
    assert found == sorted(enumerate(values), key=lambda each: -each[1])[:k]


# Stop texts


@settings(max_examples=200)
@given(st.text("ab\u20ac", max_size=20), st.lists(st.text("ab\u20ac", min_size=1, max_size=4), max_size=3), st.data())
def test_nothing_of_a_stop_text_is_given_away(whole: str, stops: list[str], data: st.DataObject) -> None:
    """However the bytes come, what was certain is a beginning of the text up to the stop that is first whole."""
    ends = [(end, end - len(s)) for end in range(len(whole) + 1) for s in stops if whole[:end].endswith(s)]
    expected = whole[: min(ends)[1]] if ends else whole
    raw, growing, given_away = whole.encode(), Growing(stops), ""
    while raw and not growing.stopped:
        n = data.draw(st.integers(1, len(raw)))
        growing.add(raw[:n])
        raw = raw[n:]
        assert growing.certain.startswith(given_away)
        given_away = growing.certain
    assert growing.finished() == expected
    assert expected.startswith(given_away)


def test_the_stop_that_is_first_whole_counts() -> None:
    together, apart = Growing(["b", "aba"]), Growing(["b", "aba"])
    together.add(b"aba")
    for byte in (b"a", b"b", b"a"):
        apart.add(byte)
    assert together.finished() == apart.finished() == "a"


def test_half_a_character_at_the_end_is_shown_as_one() -> None:
    growing = Growing()
    growing.add("a\u20ac".encode()[:-1])
    assert growing.certain == "a"
    assert growing.finished() == "a\ufffd"


# Turns

TURN = "<|channel|>analysis<|message|>I think.<|end|><|start|>assistant<|channel|>final<|message|>Yes."
CALLED = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>'

PREAMBLE = "<|channel|>commentary<|message|>Wait.<|end|><|start|>assistant"


def taken_apart(words: Vocabulary, written: str, stops: tuple[str, ...] = (), prompt: str = "") -> tuple[Any, ...]:
    """(reasoning, content, calls, tokens that were not looked at)"""
    opened = prompt or "<|start|>user<|message|>Well?<|end|><|start|>assistant"
    ends = frozenset(words.encode("<|return|><|call|><|endoftext|>"))
    turn = Turn(words.encode(opened), words, ends, stops)
    reasoning, content, tokens = "", "", words.encode(written)
    while tokens and not turn.over:
        turn.add(tokens.pop(0))
        more, said = turn.news()
        reasoning, content = reasoning + more, content + said
    turn.finish()
    more, said = turn.news()
    return reasoning + more, content + said, turn.calls, words.decode(tokens)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (TURN, ("I think.", "Yes.", [], "")),
        (TURN + "<|return|>more", ("I think.", "Yes.", [], "more")),
        (TURN + "<|end|><|start|>user<|message|>And?", ("I think.", "Yes.", [], "<|start|>user<|message|>And?")),
        (CALLED + "x", ("", "", [Call("f", '{"a": 1}')], "x")),
        (" to=functions.g<|channel|>commentary json<|message|>{}<|call|>", ("", "", [Call("g", "{}")], "")),
        (CALLED.removesuffix("<|call|>"), ("", "", [], "")),
        (PREAMBLE + CALLED, ("", "Wait.", [Call("f", '{"a": 1}')], "")),
        ("<|channel|>analysis<|message|>A<|end|><|start|>assistant" + TURN, ("A\nI think.", "Yes.", [], "")),
        ("<|message|>plain<|end|>", ("", "plain", [], "")),
        ("<|channel|>analysis<|message|>A<|end|><|start|>user<|message|>B", ("A", "", [], "B")),
        ("no format at all", ("", "", [], "")),
        ("<|channel|>final<|message|>\u20ac<|return|>", ("", "\u20ac", [], "")),
        ("", ("", "", [], "")),
    ],
)  # fmt: skip
def test_a_turn_is_taken_apart(words: Vocabulary, written: str, expected: tuple[Any, ...]) -> None:
    assert taken_apart(words, written) == expected


def test_stop_texts_count_in_the_answer_only(words: Vocabulary) -> None:
    turn = "<|channel|>analysis<|message|>Question: A<|end|><|start|>assistant<|channel|>final<|message|>B Question: C"
    assert taken_apart(words, turn, ("Question:",))[:2] == ("Question: A", "B ")


def test_what_the_prompt_began_is_gone_on_with(words: Vocabulary) -> None:
    opened = "<|start|>assistant<|channel|>final<|message|>It is"
    assert taken_apart(words, " late.<|return|>", prompt=opened) == ("", " late.", [], "")


def test_a_model_of_another_kind_only_answers(words: Vocabulary) -> None:
    plain = Vocabulary(words.pieces, frozenset(), words.encode)
    turn = Turn(words.encode("Hello"), plain, frozenset({7}), ("stop",))
    for token in words.encode("a <|end|> b stop"):
        turn.add(token)
    assert turn.over
    assert turn.news() == ("", "a <|end|> b ")


# Requests

ASKED: dict[str, Any] = {"model": "m", "prompt": "x"}
SPOKEN: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": [1, True]}, "prompt"),
    ({"prompt": [[1], []]}, "prompt"),
    ({"prompt": ["x", 5]}, "prompt"),
    ({"prompt": ["x"] * 257}, "prompt"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 10**400}, "max_tokens"),  # no float holds it
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 1e999}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"seed": "1"}, "seed"),
    ({"stop": 5}, "stop"),
    ({"stop": ["x"] * 65}, "stop"),
    ({"logprobs": 21}, "logprobs"),
    ({"echo": 1}, "echo"),
    ({"stream_options": 1}, "stream_options"),
    ({"n": 2}, "n"),
    ({"logit_bias": {"1": 5}}, "logit_bias"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"guided_json": {}}, "guided_json"),
    ({"model": 5}, "model"),
]


def calling(calls: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": calls}


BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "x"}, "messages"),
    ({"messages": [{"content": "x"}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]"),
    ({"messages": [calling({})]}, "messages[0]"),
    ({"messages": [calling([{"function": {}}])]}, "messages[0]"),
    ({"messages": [calling([{"function": {"name": "f", "arguments": "{"}}])]}, "messages[0]"),
    ({"tools": [{"type": "web_search"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"logprobs": True}, "logprobs"),
    ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs"),
    ({"reasoning_effort": 3}, "reasoning_effort"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "param"), BAD, ids=str)
def test_a_bad_completion_is_refused_by_name(change: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as found:
        requests.completion({**ASKED, **change})
    assert (found.value.status, found.value.param) == (400, param)


@pytest.mark.parametrize(("change", "param"), BAD_CHATS, ids=str)
def test_a_bad_chat_is_refused_by_name(change: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as found:
        requests.chat({**SPOKEN, **change})
    assert (found.value.status, found.value.param) == (400, param)


def test_what_does_nothing_is_taken() -> None:
    neutral = {"n": 1, "best_of": 1, "logit_bias": {}, "presence_penalty": 0.0, "user": "me", "suffix": None}
    assert requests.completion({**ASKED, **neutral}) == requests.completion(ASKED)


def test_messages_are_as_templates_take_them() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    asked = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1"},
    ]
    found = requests.chat({"messages": asked, "reasoning_effort": "low", "tool_choice": "none", "tools": [call]})
    assert found.template == {
        "messages": [
            {"role": "user", "content": "ab"},
            {"role": "assistant", "tool_calls": [{**call, "function": {"name": "f", "arguments": {"a": 1}}}]},
            {"role": "tool", "content": "1"},
        ],
        "reasoning_effort": "low",
    }
