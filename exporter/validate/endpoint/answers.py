"""The objects that a client gets. Source: OpenAI API reference, "Completions" and "Chat"."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from exporter.validate.endpoint.generation import Written
from exporter.validate.endpoint.requests import Completion
from exporter.validate.endpoint.turn import Call
from exporter.validate.endpoint.vocabulary import Vocabulary
from exporter.validate.endpoint.worker import Likely


@dataclass(frozen=True)
class Answer:
    """What the objects of one answer share."""

    model: str
    chat: bool
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[dict[str, Any]], written: Sequence[Written]) -> dict[str, Any]:
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": list(choices), "usage": usage(written)}

    def chunk(self, choices: Sequence[dict[str, Any]], used: Sequence[Written] = ()) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        found = {**self._head(kind), "choices": list(choices)}
        return {**found, "usage": usage(used)} if used else found

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}


def usage(written: Sequence[Written]) -> dict[str, int]:
    prompt, made = sum(len(w.prompt) for w in written), sum(len(w.likely) for w in written)
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def text_choice(index: int, asked: Completion, written: Written, vocabulary: Vocabulary) -> dict[str, Any]:
    """One prompt's choice, with the prompt before it and log-probabilities where they were asked for."""
    before = vocabulary.decode(written.prompt) if asked.echo else ""
    likely: list[Likely | None] = list(written.likely)
    tokens = written.tokens
    if asked.echo:
        likely, tokens = [None, *written.prompt_likely, *likely], written.prompt + tokens
    return {
        "index": index,
        "text": before + written.text,
        "logprobs": None if asked.logprobs is None else _logprobs(tokens, likely, vocabulary),
        "finish_reason": written.finish,
    }


def _logprobs(tokens: Sequence[int], likely: Sequence[Likely | None], vocabulary: Vocabulary) -> dict[str, Any]:
    """Of each token; null for the first of a prompt, before which there is nothing."""
    offsets, at = [], 0
    for token in tokens:
        offsets.append(at)
        at += len(vocabulary.pieces[token].decode("utf-8", "replace"))
    best: list[dict[str, float] | None] = []
    for each in likely:
        if each is None:
            best.append(None)
            continue
        named: dict[str, float] = {}
        for token, log_p in [*each.top, (each.token, each.log_p)]:  # of two tokens of one name, the likelier
            named.setdefault(vocabulary.name(token), log_p)
        best.append(named)
    return {
        "tokens": [vocabulary.name(token) for token in tokens],
        "token_logprobs": [None if each is None else each.log_p for each in likely],
        "top_logprobs": best,
        "text_offset": offsets,
    }


def chat_choice(reasoning: str, content: str, calls: Sequence[Call], finish: str) -> dict[str, Any]:
    """The message of a chat. `reasoning` is the same under the name that vLLM has for it."""
    message: dict[str, Any] = {"role": "assistant", "content": content or None, "refusal": None}
    if reasoning:
        message |= {"reasoning_content": reasoning, "reasoning": reasoning}
    if calls:
        message["tool_calls"] = tool_calls(calls)
    return {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}


def tool_calls(calls: Sequence[Call], indexed: bool = False) -> list[dict[str, Any]]:
    return [
        {
            **({"index": i} if indexed else {}),
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for i, call in enumerate(calls)
    ]
