"""The text that a user wants artifacts measured on: conversations and plain text, each where the files have some."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from exporter.checkpoint import Checkpoint
from exporter.errors import UsageError
from exporter.pipeline.calibration import text_reader
from exporter.pipeline.calibration.corpus import Reader, corpus_windows
from exporter.pipeline.calibration.rows import Row
from exporter.pipeline.conversations import Conversations, labelled
from exporter.pipeline.progress import Progress
from exporter.types.profile import ValidateSpec
from exporter.validate import text as texts

_SHORTEST = 32  # tokens of a text that still says something


@dataclass(frozen=True, eq=False)
class MeasuredText:
    """What to measure on; None where the default is to stand in."""

    plain: texts.Windows | None = None
    conversations: Conversations | None = None


def measured_text(setting: str, checkpoint: Checkpoint, spec: ValidateSpec, progress: Progress) -> MeasuredText:
    """The text of a file, a folder or a Hub dataset: rows of "messages" are conversations, the others plain text.

    As many windows as `spec` says, or as the text fills. Raises UsageError where it fills not even one of 32
    tokens, and as reading calibration text does.
    """
    assert checkpoint.tokenizer_file is not None
    reader, source = text_reader(setting, progress)
    plain = _windows(checkpoint, reader, source, spec, chat=False)
    spoken = _windows(checkpoint, reader, source, spec, chat=True)
    if plain is None and spoken is None:
        raise UsageError(f"{source} holds no text", hint='rows of {"text": ...} or {"messages": [...]}')
    tokenizer = texts.load_tokenizer(checkpoint.tokenizer_file)
    return MeasuredText(plain, None if spoken is None else labelled(spoken, tokenizer))


def _windows(
    checkpoint: Checkpoint, reader: Reader, source: str, spec: ValidateSpec, chat: bool
) -> texts.Windows | None:
    """Of the rows that are conversations, or are not; None where there are none."""
    if next(_only(reader(1 << 16), chat), None) is None:
        return None

    def rows(characters: int) -> Iterator[Row]:
        return _only(reader(characters), chat)

    shapes = [(count, spec.length) for count in range(spec.windows, 0, -1)]
    length = spec.length // 2
    while length >= _SHORTEST:
        shapes.append((1, length))
        length //= 2
    refusal = None
    for count, length in shapes:
        try:
            return corpus_windows(checkpoint, rows, source, count, length)
        except texts.TooShort as error:
            refusal = refusal or error
    raise UsageError(
        f"{source} has fewer than {_SHORTEST} tokens of {'conversations' if chat else 'plain text'}",
        hint="give a longer text",
    ) from refusal


def _only(rows: Iterator[Row], chat: bool) -> Iterator[Row]:
    """Conversations, or plain text that is not blank."""
    if chat:
        return (row for row in rows if row.chat is not None)
    return (row for row in rows if row.text is not None and row.text.strip())
