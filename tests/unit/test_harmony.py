"""Which part of a conversation each token is, against conversations written out piece by piece."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import ExporterError
from exporter.validate import harmony, text

DEMO = Path(__file__).parents[1] / "data" / "tiny-gpt-oss"
Pieces = list[tuple[str, str]]

SYSTEM: Pieces = [("", "<|start|>system<|message|>You are ChatGPT.\n# Valid channels: analysis, final.<|end|>")]
DEVELOPER: Pieces = [("", "<|start|>developer<|message|># Tools\ntype f = () => any;<|end|>")]
USER: Pieces = [("", "<|start|>user<|message|>the assistant to=nobody<|end|>")]
ANALYSIS: Pieces = [
    ("", "<|start|>assistant"),
    ("header", "<|channel|>analysis<|message|>"),
    ("analysis", "Let me think.<|end|>"),
]
# The released template names the recipient before the channel, the model after it.
CALL_OF_TEMPLATE: Pieces = [
    ("", "<|start|>assistant"),
    ("header", " to=functions.f<|channel|>commentary json<|message|>"),
    ("tool call", '{"a": 1}<|call|>'),
]
CALL_OF_MODEL: Pieces = [
    ("", "<|start|>assistant"),
    ("header", "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"),
    ("tool call", '{"a": 1}<|call|>'),
]
RESULT: Pieces = [("", "<|start|>functions.f to=assistant<|channel|>commentary<|message|>42<|end|>")]
PREAMBLE: Pieces = [
    ("", "<|start|>assistant"),
    ("header", "<|channel|>commentary<|message|>"),
    ("commentary", "I will look.<|end|>"),
]
FINAL: Pieces = [
    ("", "<|start|>assistant"),
    ("header", "<|channel|>final<|message|>"),
    ("final", "It is 42.<|return|>"),
]
OWN_CHANNEL: Pieces = [
    ("", "<|start|>assistant"),
    ("header", "<|channel|>plan<|message|>"),
    ("other", "First.<|end|>"),
]
PLAIN: Pieces = [("", "<|start|>assistant"), ("header", "<|message|>"), ("final", "hello<|end|>")]
CUT_IN_HEADER: Pieces = [("", "<|start|>assistant"), ("header", "<|channel|>fin")]
CUT_IN_CONTENT: Pieces = [
    ("", "<|start|>assistant"),
    ("header", "<|channel|>final<|message|>"),
    ("final", "It is"),
]
BROKEN_OFF: Pieces = [
    ("", "<|start|>assistant"),
    ("header", "<|channel|>analysis<|message|>"),
    ("analysis", "no end"),
]
NO_MESSAGE: Pieces = [("", "<|start|>assistant"), ("header", "<|channel|>final<|end|>")]
BEFORE: Pieces = [("", "<|channel|>final<|message|>what came before<|end|>")]
BETWEEN: Pieces = [("", "not in any message")]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return text.load_tokenizer(DEMO / "tokenizer.json")


def encoded(tokenizer: Any, pieces: Pieces) -> tuple[list[int], list[str]]:
    """Ids, and the label that each must have."""
    parts = [(label, text.encode(tokenizer, piece)) for label, piece in pieces]
    return [i for _, ids in parts for i in ids], [label for label, ids in parts for _ in ids]


@pytest.mark.parametrize(
    "messages",
    [
        [SYSTEM, DEVELOPER, USER, ANALYSIS, PREAMBLE, CALL_OF_MODEL, RESULT, ANALYSIS, FINAL],
        [SYSTEM, USER, CALL_OF_TEMPLATE, RESULT, FINAL],
        [USER, PLAIN, USER, OWN_CHANNEL, FINAL],
        [BEFORE, USER, FINAL],
        [USER, FINAL, BETWEEN, USER, CUT_IN_CONTENT],
        [USER, CUT_IN_HEADER],
        [USER, BROKEN_OFF, USER, NO_MESSAGE, FINAL],
        [USER, [("", "<|start|>assistant")]],
        [USER, [("", "<|start|>")]],
        [[("", "no messages at all")]],
        [],
    ],
    ids=["tools", "template", "channels", "middle", "between", "header", "broken", "asked", "start", "text", "empty"],
)
def test_every_token_has_the_label_of_its_piece(tokenizer: Any, messages: list[Pieces]) -> None:
    tokens, expected = encoded(tokenizer, list(itertools.chain(*messages)))
    found = harmony.labels(tokens, tokenizer)
    assert list(zip(tokens, found, strict=True)) == list(zip(tokens, expected, strict=True))


def test_messages_are_read_back(tokenizer: Any) -> None:
    tokens, _ = encoded(tokenizer, USER + ANALYSIS + CALL_OF_MODEL + CALL_OF_TEMPLATE + RESULT + PLAIN + CUT_IN_CONTENT)
    assert harmony.parse(tokens, tokenizer) == [
        harmony.Message("user", "", "", "the assistant to=nobody", True),
        harmony.Message("assistant", "analysis", "", "Let me think.", True),
        harmony.Message("assistant", "commentary", "functions.f", '{"a": 1}', True),
        harmony.Message("assistant", "commentary", "functions.f", '{"a": 1}', True),
        harmony.Message("functions.f", "commentary", "assistant", "42", True),
        harmony.Message("assistant", "", "", "hello", True),
        harmony.Message("assistant", "final", "", "It is", False),
    ]


def test_a_tokenizer_of_another_model_is_refused(tokenizer: Any) -> None:
    class Other:
        def token_to_id(self, token: str) -> int | None:
            return None if token == "<|message|>" else 1

    with pytest.raises(ExporterError, match=r"has no <\|message\|>"):
        harmony.labels([1, 2], Other())
