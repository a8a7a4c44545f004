"""A user's text: as many rows of files as the windows need, made documents and looked over."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from exporter.checkpoint import Checkpoint
from exporter.checkpoint.hub_dataset import SUFFIXES
from exporter.checkpoint.vocabulary import HARMONY
from exporter.errors import Refused, UsageError
from exporter.pipeline.calibration import chat
from exporter.pipeline.calibration.rows import Row, read_rows
from exporter.validate import text as texts

# characters to read of each document at most -> rows in a fixed order.
Reader = Callable[[int], Iterator[Row]]

# What conversations for other models are marked with. None of it means anything to gpt-oss.
_FOREIGN = re.compile(
    r"<\|im_(?:start|end)\|>|\[/?INST\]|<<SYS>>|<\|(?:start|end)_header_id\|>|<\|eot_id\|>|<\|begin_of_text\|>"
    r"|<(?:start|end)_of_turn>|<\|(?:user|assistant|system|observation)\|>|<\|end_of_turn\|>"
    r"|<\uff5c(?:User|Assistant|begin\u2581of\u2581sentence|end\u2581of\u2581sentence)\uff5c>"
    r"|<\|(?:START|END)_OF_TURN_TOKEN\|>"
)
_FOREIGN_SHARE = 0.1  # of the documents; a text that speaks about templates may show some
_CHARACTERS = 16  # read for each token wanted, at first: 4 to 5 is usual


def files_reader(path: Path) -> Reader:
    """Rows of a file, or of all text files in a folder, which then take turns."""
    if not path.is_dir():
        if not path.is_file():  # a pipe waits for whoever writes it
            raise UsageError(f"{path} is no plain file", hint=f"text files end in {', '.join(SUFFIXES[:4])}")
        return lambda characters: read_rows(path, str(path), characters)
    found = [p for p in sorted(path.rglob("*")) if p.name.endswith(SUFFIXES) and p.is_file() and not _hidden(p, path)]
    if not found:
        raise UsageError(f"{path} holds no text files", hint=f"text files end in {', '.join(SUFFIXES[:4])}")
    return lambda characters: _in_turn([read_rows(p, str(p), characters) for p in found])


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _in_turn(sources: list[Iterator[Row]]) -> Iterator[Row]:
    while sources:
        for source in list(sources):
            row = next(source, None)
            if row is None:
                sources.remove(source)
            else:
                yield row


def corpus_windows(checkpoint: Checkpoint, reader: Reader, source: str, count: int, length: int) -> texts.Windows:
    """`count` windows of `length` tokens; conversations go through the checkpoint's template.

    Reads more where the text turns out to have few tokens for its size. Equal documents count once,
    so that no window repeats another. Raises UsageError, Refused, and what chat.render raises.
    """
    assert checkpoint.tokenizer_file is not None
    characters = _CHARACTERS
    while True:
        enough = characters * count * length
        rows, repeated, whole = _gather(reader(enough), enough, 2 * characters * length)
        named = f"{source} ({repeated:,} repeated rows left out)" if repeated else source
        text = _text(checkpoint, rows, named, enough)
        try:
            return texts.windows(checkpoint.tokenizer_file, text, count, length)
        except UsageError:
            if whole:
                raise
        characters *= 4


def _gather(rows: Iterable[Row], enough: int, each: int) -> tuple[list[Row], int, bool]:
    """Rows until `enough` characters are there, of which one row counts for `each` at most.

    Also how many came twice, and whether this is all there is.
    """
    taken: dict[str, Row] = {}
    size, repeated, whole = 0, 0, True
    for row in rows:
        if row.text is not None and not row.text.strip():
            continue
        key = repr((row.text, row.chat))
        repeated += key in taken
        if key not in taken:
            taken[key] = row
            size += min(len(key), each)
            whole = whole and len(key) < enough  # a plain file is read that far only
        if size >= enough:
            return list(taken.values()), repeated, False
    return list(taken.values()), repeated, whole


def _text(checkpoint: Checkpoint, rows: list[Row], source: str, enough: int) -> texts.Text:
    """Documents of at most `enough` characters each: a tokenizer takes 200 bytes of memory for one."""
    if not rows:
        raise UsageError(f"{source} holds no text", hint="give a text that is not empty")
    _require_own_template(rows, source)
    rendered = iter(chat.render(checkpoint, [r for r in rows if r.chat is not None]))
    documents = [(row.text if row.text is not None else next(rendered))[:enough] for row in rows]
    for row, document in zip(rows, documents, strict=True):
        try:
            document.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"{row.where}: half of a surrogate pair (character {error.start}), which no tokenizer reads",
                hint="repair the escapes \\ud800 to \\udfff",
            ) from None
    _require_special(checkpoint, rows, documents)
    return texts.Text(tuple(documents), source)


def _require_own_template(rows: list[Row], source: str) -> None:
    """Refuse text that was rendered for another model."""
    foreign: list[tuple[Row, str]] = []
    for row in rows:
        marks = _FOREIGN.findall(row.written)
        led = _FOREIGN.match(row.written.lstrip().removeprefix("<s>").lstrip())
        if (led or len(marks) > 1) and "<|message|>" not in row.written:
            foreign.append((row, marks[0]))
    if len(foreign) > _FOREIGN_SHARE * len(rows):
        row, mark = foreign[0]
        raise Refused(
            f"{source}: {len(foreign):,} of {len(rows):,} documents are of another model's template"
            f" ({mark} in {row.where})",
            hint='give the conversations as "messages": the checkpoint\'s own template renders them',
        )


def _require_special(checkpoint: Checkpoint, rows: list[Row], documents: list[str]) -> None:
    """Refuse harmony tags that this tokenizer would read as plain characters."""
    assert checkpoint.tokenizer_file is not None
    tokenizer = None
    for tag in HARMONY:
        where = next((r.where for r, d in zip(rows, documents, strict=True) if tag in d), None)
        if where is not None:
            tokenizer = tokenizer or texts.load_tokenizer(checkpoint.tokenizer_file)
            if len(texts.encode(tokenizer, tag)) != 1:
                raise Refused(
                    f"{where}: {tag} is not one token of {checkpoint.tokenizer_file}",
                    hint="take tokenizer.json and chat template from the same model",
                )
