"""Rows of a text file: plain text or a conversation each, read piece by piece.

.jsonl and .parquet have a row on each line or in each record, .json is an array or such lines, .txt is
one row. Each may be gzipped, but for .parquet.
"""

from __future__ import annotations

import difflib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from exporter.checkpoint.hub_dataset import SUFFIXES
from exporter.errors import MissingExtra, UsageError, did_you_mean

# Beside "messages", a conversation may carry these for the template; other columns are somebody's notes.
TEMPLATE_INPUTS = ("tools", "builtin_tools", "model_identity", "reasoning_effort")
_LINE_CAP = 64 << 20  # bytes
_ARRAY_CAP = 1 << 30  # bytes
_CURE = 'each row is {"text": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}'


@dataclass(frozen=True)
class Row:
    """`where` names file and line. One of `text` and `chat` is set; a chat holds what a template takes."""

    where: str
    text: str | None = None
    chat: dict[str, Any] | None = None

    @property
    def written(self) -> str:
        """The text, or what was said in the chat."""
        if self.text is not None:
            return self.text
        assert self.chat is not None
        return "\n".join(m["content"] for m in self.chat["messages"] if isinstance(m.get("content"), str))


def read_rows(path: Path, name: str, characters: int) -> Iterator[Row]:
    """The rows of a file called `name` in messages. Of plain text at most `characters` are read.

    Raises UsageError naming file and line; MissingExtra for .parquet without pyarrow.
    """
    kind = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    read: dict[str, Callable[[], Iterator[Row]]] = {
        "txt": lambda: _plain(path, name, characters),
        "jsonl": lambda: _lines(path, name),
        "json": lambda: _json(path, name),
        "parquet": lambda: _parquet(path, name),
    }
    if kind not in read:
        raise UsageError(f"{name} is not a text file that can be read", hint=f"give one of {', '.join(SUFFIXES[:4])}")
    with _explained(name):
        yield from read[kind]()


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 text ({error.reason})", hint="convert it to UTF-8") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{name} is not a whole gzip file ({error})", hint="fetch or make it again") from error
    except OSError as error:
        raise UsageError(f"{name}: {error.strerror or error}", hint="give a file that can be read") from error


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else open(path, "rb")


def _plain(path: Path, name: str, characters: int) -> Iterator[Row]:
    with _open(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as file:
        yield Row(name, text=file.read(characters))


def _lines(path: Path, name: str) -> Iterator[Row]:
    with _open(path) as file:
        number = 0
        while line := file.readline(_LINE_CAP):
            number += 1
            where = f"{name}:{number}"
            if len(line) == _LINE_CAP:
                raise UsageError(f"{where}: a line of more than {_LINE_CAP >> 20} MiB", hint="one row on each line")
            try:
                decoded = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UsageError(f"{where}: not UTF-8 text (byte {error.start})", hint="convert it to UTF-8") from error
            if decoded.strip():
                yield row(_parsed(decoded, where), where)


def _json(path: Path, name: str) -> Iterator[Row]:
    with _open(path) as file:
        start = file.read(1 << 16).lstrip(b"\xef\xbb\xbf \t\r\n")
    if not start.startswith(b"["):
        yield from _lines(path, name)
        return
    with _open(path) as file:
        raw = file.read(_ARRAY_CAP)
    if len(raw) == _ARRAY_CAP:
        raise UsageError(f"{name} is an array of more than {_ARRAY_CAP >> 30} GiB", hint="save it as .jsonl")
    for number, entry in enumerate(_parsed(raw.decode("utf-8-sig"), name), 1):
        yield row(entry, f"{name}[{number}]")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deep or too long"
        raise UsageError(f"{where}: not JSON ({reason})", hint=_CURE) from error


def _parquet(path: Path, name: str) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as missing:
        raise MissingExtra("pyarrow", "datasets", "reading a .parquet file") from missing
    try:
        with parquet.ParquetFile(path) as file:
            columns = [c for c in ("text", "messages", *TEMPLATE_INPUTS) if c in file.schema_arrow.names]
            if not {"text", "messages"} & set(columns):
                raise _no_text(name, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(batch_size=64, columns=columns):
                for entry in batch.to_pylist():
                    number += 1
                    yield row(entry, f"{name}:{number}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # OSError: also for damaged pages
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UsageError(f"{name} is not a sound parquet file ({reason})", hint="fetch or make it again") from error


def row(entry: Any, where: str) -> Row:
    """One parsed row, its shape checked. Raises UsageError."""
    if not isinstance(entry, dict):
        raise UsageError(f"{where}: not an object", hint=_CURE)
    if entry.get("messages") is None:
        if isinstance(entry.get("text"), str):
            return Row(where, text=entry["text"])
        if "text" in entry:
            raise UsageError(f'{where}: "text" is not text', hint=_CURE)
        raise _no_text(where, list(entry))
    for key in entry.keys() - {"messages", "text", *TEMPLATE_INPUTS}:
        if meant := difflib.get_close_matches(str(key), ("messages", *TEMPLATE_INPUTS), n=1, cutoff=0.85):
            raise UsageError(f'{where}: unknown key "{key}". Did you mean "{meant[0]}"?', hint="rename or remove it")
    messages = entry["messages"]
    if not isinstance(messages, list) or not messages:
        raise UsageError(f'{where}: "messages" is not a list with messages', hint=_CURE)
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UsageError(f'{where}: a message without a "role"', hint=_CURE)
    for key in ("tools", "builtin_tools"):
        if not isinstance(entry.get(key) or [], list):
            raise UsageError(f'{where}: "{key}" is not a list', hint="give each tool as an object in a list")
    # A table has a place for every field in every message, null where it is not said.
    said = [{key: value for key, value in m.items() if value is not None} for m in messages]
    return Row(where, chat={"messages": said, **{k: entry[k] for k in TEMPLATE_INPUTS if entry.get(k) is not None}})


def _no_text(where: str, columns: list[Any]) -> UsageError:
    names = ", ".join(map(str, columns[:12])) or "nothing"
    meant = next((m for c in columns if (m := did_you_mean(str(c), ("messages", "text")))), "")
    return UsageError(f'{where}: neither "text" nor "messages" (it has {names}).{meant}', hint=_CURE)
