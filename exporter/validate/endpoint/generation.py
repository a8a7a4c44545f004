"""A prompt and what the model writes after it, token by token, until something ends it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from exporter.validate.endpoint.requests import ApiError, Chat, Completion, Sampling, splittable
from exporter.validate.endpoint.turn import Growing, Turn
from exporter.validate.endpoint.vocabulary import Vocabulary
from exporter.validate.endpoint.worker import Likely, Worker

Finish = Literal["stop", "length", "tool_calls"]
# Asked between two tokens: True once nobody waits for the answer any more.
Gone = Callable[[], bool]


@dataclass(frozen=True)
class Limits:
    """context: tokens that the sequence may have. stops: tokens that end the model's turn, by the files' own word."""

    context: int
    stops: frozenset[int]


@dataclass
class Written:
    """What came after a prompt. `text` is without what ended it; `ended` by a token that stops or a stop text."""

    prompt: list[int]
    prompt_likely: list[Likely] = field(default_factory=list)
    likely: list[Likely] = field(default_factory=list)
    text: str = ""
    finish: Finish = "length"

    @property
    def tokens(self) -> list[int]:
        return [each.token for each in self.likely]


class Abandoned(Exception):
    """The client has gone."""


def encode(prompt: str | Sequence[int], vocabulary: Vocabulary, limits: Limits) -> list[int]:
    """Tokens of a prompt that fits. Raises ApiError."""
    tokens = vocabulary.encode(splittable(prompt)) if isinstance(prompt, str) else list(prompt)
    if not tokens:
        raise ApiError(400, "the prompt is empty: the model has nothing to go on from", "prompt")
    wrong = next((t for t in tokens if not 0 <= t < len(vocabulary.pieces)), None)
    if wrong is not None:
        raise ApiError(400, f"the prompt has a token {wrong}, the vocabulary is {len(vocabulary.pieces):,}", "prompt")
    if len(tokens) > limits.context:
        message = f"the prompt has {len(tokens):,} tokens, the context is {limits.context:,} (exporter serve --context)"
        raise ApiError(400, message, "prompt", "context_length_exceeded")
    return tokens


def _uniforms(seed: int | None) -> Iterator[float]:
    """Numbers in [0, 1) by counting, so that the n-th does not depend on how the others were used."""
    key = os.urandom(16) if seed is None else str(seed).encode()
    step = 0
    while True:
        mixed = hashlib.sha256(b"%b %d" % (key, step)).digest()
        yield (int.from_bytes(mixed[:8], "little") >> 11) / (1 << 53)
        step += 1


def complete(worker: Worker, asked: Completion, written: Written, limits: Limits, gone: Gone) -> Iterator[str]:
    """Go on from written.prompt: the text in pieces, as soon as they are certain; `written` holds all of it.

    Of a stop text nothing is given away, so what could become one is held back.
    """
    written.prompt_likely = worker.prompt(written.prompt, asked.logprobs if asked.echo else None)
    text, given = Growing(asked.sampling.stop), 0
    room = _room(asked.sampling, written.prompt, limits)
    for each in _draw(worker, asked.sampling, asked.logprobs or 0, room, gone):
        written.likely.append(each)
        shown = asked.special or each.token not in worker.vocabulary.control
        text.add(worker.vocabulary.pieces[each.token] if shown else b"")
        if each.token in limits.stops or text.stopped:
            written.finish = "stop"
            break
        yield text.certain[given:]
        given = len(text.certain)
    written.text = text.finished()
    yield written.text[given:]


def converse(
    worker: Worker, asked: Chat, written: Written, turn: Turn, limits: Limits, gone: Gone
) -> Iterator[tuple[str, str]]:
    """The assistant's turn after a prompt that ends with `<|start|>assistant`: (reasoning, content) as they come.

    Stop texts count in the content only: a model that reasons may write "Question:" for itself.
    """
    worker.prompt(written.prompt, None)
    for each in _draw(worker, asked.sampling, 0, _room(asked.sampling, written.prompt, limits), gone):
        written.likely.append(each)
        turn.add(each.token)
        if turn.over:
            written.finish = "stop"
            break
        yield turn.news()
    turn.finish()
    if turn.calls:
        written.finish = "tool_calls"
    yield turn.news()


def _room(sampling: Sampling, prompt: list[int], limits: Limits) -> int:
    """Tokens that may follow. A client that asks for more than there is gets "length", as OpenAI's models do."""
    left = limits.context - len(prompt)
    return left if sampling.max_tokens is None else min(sampling.max_tokens, left)


def _draw(worker: Worker, sampling: Sampling, count: int, room: int, gone: Gone) -> Iterator[Likely]:
    token: int | None = None
    for _, uniform in zip(range(room), _uniforms(sampling.seed), strict=False):
        if gone():
            raise Abandoned
        each = worker.next(token, uniform, sampling.temperature, sampling.top_p, count)
        yield each
        token = each.token
