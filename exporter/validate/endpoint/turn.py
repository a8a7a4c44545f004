"""What a model writes, taken apart as it comes: texts up to a stop, and the messages of an assistant's turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from exporter.errors import ExporterError
from exporter.validate import harmony
from exporter.validate.endpoint.vocabulary import Pieces, Vocabulary

_FUNCTIONS = "functions."


class Growing:
    """Text that grows by bytes, up to the first of some stop texts."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops, self._pieces, self._text = stops, Pieces(), ""
        self._longest = max(map(len, stops), default=0)
        self.stopped = False

    def add(self, piece: bytes) -> None:
        self._put(self._pieces.add(piece))

    def _put(self, more: str) -> None:
        if self.stopped or not more:
            return
        start = max(0, len(self._text) - self._longest)
        self._text += more
        # The first to be whole, not the first to begin: else the text would depend on how its bytes came.
        if found := [(at + len(stop), at) for stop in self._stops if (at := self._text.find(stop, start)) >= 0]:
            self._text, self.stopped = self._text[: min(found)[1]], True

    @property
    def certain(self) -> str:
        """Without an end that may become a stop text."""
        if not self.stopped:
            for n in range(min(len(self._text), self._longest - 1), 0, -1):
                if any(stop.startswith(self._text[-n:]) for stop in self._stops):
                    return self._text[:-n]
        return self._text

    def finished(self) -> str:
        self._put(self._pieces.add(b"", final=True))
        return self._text


@dataclass(frozen=True)
class Call:
    """A tool's name and the arguments as the model wrote them: JSON, if it did as it was told."""

    name: str
    arguments: str


class Turn:
    """The assistant's turn so far: reasoning, content (preambles and the answer), calls.

    `over`: it ends with a token of `stops` (`<|return|>`, `<|call|>`), with a stop text in the content, with the
    `<|end|>` of an answer where a model was not taught `<|return|>`, and where another role's message begins.
    A model that does not know the format writes content only.
    """

    def __init__(
        self, prompt: Sequence[int], vocabulary: Vocabulary, stops: frozenset[int], stop_texts: Sequence[str]
    ) -> None:
        self._vocabulary, self._stops = vocabulary, stops
        self.reasoning, self.content = Growing(), Growing(stop_texts)
        self.calls: list[Call] = []
        self.over = False
        self._given = [0, 0]
        self._header: list[int] = []  # from `<|start|>` on, until the content begins
        self._part: Growing | None = None  # where content goes
        self._message: harmony.Message | None = None  # of which the content is being written
        try:
            self._special: harmony.Special | None = harmony.Special.of(vocabulary)
        except ExporterError:
            self._special, self._part = None, self.content
            return
        # The prompt may have begun the message, or even its content.
        last = max((i for i, t in enumerate(prompt) if t == self._special.start), default=None)
        for token in [self._special.start] if last is None else prompt[last:]:
            self.add(token)
        self.over, self._given = False, [len(self.reasoning.certain), len(self.content.certain)]

    def add(self, token: int) -> None:
        special = self._special
        if token in self._stops or (special and token == special.end):
            self._close(token)
        elif special and token == special.start:
            self._header, self._part, self._message = [token], None, None
        elif special and token == special.message and self._message is None:
            self._open([*self._header, token])
        elif self._part is None:
            self._header.append(token)
        else:
            self._part.add(self._vocabulary.bytes_of([token], special is None or token not in self._vocabulary.control))
            self.over = self.content.stopped

    def _open(self, header: list[int]) -> None:
        self._message = message = (harmony.parse(header, self._vocabulary) or [harmony.Message("", "", "", "", False)])[
            0
        ]
        if message.role != harmony.ASSISTANT:
            self.over = True
        elif message.recipient:
            self._part = Growing()
        else:
            self._part = self.reasoning if message.channel == "analysis" else self.content
            if self._part.certain:
                self._part.add(b"\n")  # the second message of a kind

    def _close(self, token: int) -> None:
        message = self._message
        if message and message.recipient and self._part is not None and message.role == harmony.ASSISTANT:
            self.calls.append(Call(message.recipient.removeprefix(_FUNCTIONS), self._part.finished()))
        answered = message is not None and not message.recipient and message.channel in ("", "final")
        self.over = token in self._stops or answered
        self._header, self._part, self._message = [], None, None

    def finish(self) -> None:
        """Nothing more will come."""
        self.reasoning.finished()
        self.content.finished()
        self.over = True

    def news(self) -> tuple[str, str]:
        """(reasoning, content) that were not given yet."""
        found = []
        for i, text in enumerate((self.reasoning, self.content)):
            now = text.finished() if self.over else text.certain
            found.append(now[self._given[i] :])
            self._given[i] = len(now)
        return found[0], found[1]
