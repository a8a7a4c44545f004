"""The harmony format that gpt-oss speaks: which part of a conversation each token is, and its messages.

A message is `<|start|>HEADER<|message|>CONTENT<|end|>`. The header is a role, and where the assistant speaks a
channel as well: `assistant<|channel|>final`. A call of a tool names its recipient on either side of the channel,
`assistant to=functions.f<|channel|>commentary json` (the released chat template) or `assistant<|channel|>commentary
to=functions.f <|constrain|>json` (the model), and ends with `<|call|>`; the last message ends with `<|return|>`.
Source: OpenAI's harmony format guide, github.com/openai/harmony docs/format.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from exporter.errors import ExporterError

ASSISTANT = "assistant"
CHANNELS = ("analysis", "commentary", "final")
OTHER = "other"  # a channel of some other name
HEADER, TOOL_CALL = "header", "tool call"
_RECIPIENT = re.compile(r"\bto=(\S+)")


@dataclass(frozen=True)
class Special:
    """Ids of the tokens that give the format its shape; -1 where the vocabulary has none (not start, message, end)."""

    start: int
    message: int
    end: int
    channel: int
    call: int
    return_: int
    constrain: int
    end_of_text: int

    @classmethod
    def of(cls, tokenizer: Any) -> Special:
        """From a tokenizer with `token_to_id`. Raises ExporterError where it does not know the format."""
        names = ("start", "message", "end", "channel", "call", "return", "constrain", "endoftext")
        found = [tokenizer.token_to_id(f"<|{name}|>") for name in names]
        for name, token in zip(names[:3], found, strict=False):
            if token is None:
                raise ExporterError(
                    f"the tokenizer has no <|{name}|>, so it is not one of gpt-oss",
                    hint="copy tokenizer.json from the source model",
                )
        return cls(*(-1 if token is None else int(token) for token in found))

    @property
    def stops(self) -> frozenset[int]:
        """What ends the assistant's turn: the model hands over to the user or to a tool."""
        return frozenset({self.return_, self.call, self.end_of_text} - {-1})


@dataclass(frozen=True)
class Message:
    """One message. channel, recipient: "" for none. ended: by its own `<|end|>`, `<|return|>` or `<|call|>`."""

    role: str
    channel: str
    recipient: str
    content: str
    ended: bool


@dataclass(frozen=True)
class _Span:
    """Where one message is: tokens[start] is `<|start|>`, the content is [body, stop), its end at stop if `ended`."""

    start: int
    body: int
    stop: int
    ended: bool
    has_body: bool


def labels(tokens: Sequence[int], tokenizer: Any) -> list[str]:
    """The part of the conversation that each token is, "" for what the assistant did not write.

    "header": of the assistant's messages, all after the role up to and including `<|message|>`.
    "analysis", "commentary", "final", "other": content and its closing token, by channel; "tool call": the same
    where the header names a recipient. A message without a channel is "final". `<|start|>assistant` is "".

    `tokens` is a conversation from its start: what precedes the first `<|start|>` has no label.
    `tokenizer` is one of the tokenizers library. Raises ExporterError where it does not know the format.
    """
    special = Special.of(tokenizer)
    out = [""] * len(tokens)
    for span in _spans(tokens, special):
        header = tokens[span.start + 1 : span.body - span.has_body]
        role, channel, recipient = _header(header, special, tokenizer)
        if role != ASSISTANT:
            continue
        written = span.start + 1 + _role_length(header, special, tokenizer)
        out[written : span.body] = [HEADER] * (span.body - written)
        stop = span.stop + span.ended
        part = TOOL_CALL if recipient else channel if channel in CHANNELS else OTHER if channel else "final"
        out[span.body : stop] = [part if span.has_body else HEADER] * (stop - span.body)
    return out


def parse(tokens: Sequence[int], tokenizer: Any) -> list[Message]:
    """The messages of a conversation, also where it stops in the middle of one.

    What a model was asked to write after `<|start|>assistant` is parsed with those tokens put before it.
    """
    special = Special.of(tokenizer)
    found = []
    for span in _spans(tokens, special):
        header = tokens[span.start + 1 : span.body - span.has_body]
        role, channel, recipient = _header(header, special, tokenizer)
        content = _text(tokens[span.body : span.stop], tokenizer) if span.has_body else ""
        found.append(Message(role, channel, recipient, content, span.ended))
    return found


def _spans(tokens: Sequence[int], special: Special) -> Iterator[_Span]:
    """Each message in turn; one that breaks off goes up to where the next begins."""
    ends = {special.end, special.return_, special.call, special.end_of_text} - {-1}
    start: int | None = None
    body: int | None = None
    for at, token in enumerate(tokens):
        if token == special.start:
            if start is not None:
                yield _Span(start, body or at, at, False, body is not None)
            start, body = at, None
        elif start is None:
            continue
        elif token == special.message and body is None:
            body = at + 1
        elif token in ends:
            yield _Span(start, body or at, at, True, body is not None)
            start = None
    if start is not None:
        yield _Span(start, body or len(tokens), len(tokens), False, body is not None)


def _header(header: Sequence[int], special: Special, tokenizer: Any) -> tuple[str, str, str]:
    """(role, channel, recipient) of the tokens between `<|start|>` and `<|message|>`."""
    header = header[:256]  # names of tools are 64 characters at most
    cut = next((i for i, token in enumerate(header) if token == special.channel), len(header))
    before = _text(header[:cut], tokenizer)
    after = _text([t for t in header[cut + 1 :] if t != special.constrain], tokenizer)
    recipient = _RECIPIENT.search(before) or _RECIPIENT.search(after)
    channel = re.match(r"[^\s<]*", after.lstrip())
    role = before.split(maxsplit=1)[0] if before.strip() else ""
    if channel is None or channel[0].startswith("to="):
        return role, "", recipient[1] if recipient else ""
    return role, channel[0], recipient[1] if recipient else ""


def _role_length(header: Sequence[int], special: Special, tokenizer: Any) -> int:
    """Tokens of the header that spell its role."""
    for n in range(len(header)):
        if header[n] == special.channel or len(_text(header[:n], tokenizer)) >= len(ASSISTANT):
            return n
    return len(header)


def _text(tokens: Sequence[int], tokenizer: Any) -> str:
    if not len(tokens):
        return ""
    text: str = tokenizer.decode([int(token) for token in tokens], skip_special_tokens=False)
    return text
