"""Text to measure on, and its tokens.

The default needs no download: the sources of the running Python's standard library, of which a
quarter, chosen by hash, is held out and the rest is for calibration. A different Python has a
different text, so a report carries the text's digest.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from exporter.errors import ExporterError, MissingExtra, UsageError

I64 = npt.NDArray[np.int64]
Part = Literal["held-out", "calibration"]

_PASS = 2  # windows that one document gives before the next document's turn

# Where tokenizers disagree: white space, line ends, joined characters, digits, contractions.
EDGE_CASES = (
    "",
    " ",
    "  \t\t  \n\n\n   x",
    "a\r\nb\rc\n\r\n",
    "trailing space \n and\u00a0no-break\u3000ideographic\u200bzero width",
    "I'll, we'VE, it's, they'd, O'Neil's don't",
    "0 12 123 1234 1234567 3.14159e-10 0x1F ٣٤٥ \uff11\uff12\uff13",
    "HTTPServerError camelCase snake_case SCREAMING_CASE ÀÉÎõü ǅungla",
    "e\u0301 vs \u00e9, नमस्ते, ภาษาไทย, العربية, 한국어, 日本語。中文\uff0cאבג",
    "\U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f \U0001f9ff",
    "!!!??? ... --- === /* */ // <!-- --> \\n \\\\ {}[]() @#$%^&*~`",
    "\u0000\u0001\u007f\ufeffBOM\ufffd",
    "line\u2028separator\u2029paragraph\x0bvertical\x0cfeed\x85next",
    "<|not_special|> <|start <|endoftext <| |>",
)


class TooShort(UsageError):
    """A text that does not fill the windows that were asked for."""


@dataclass(frozen=True)
class Text:
    """Documents in a fixed order. `source` says in words where they are from."""

    documents: tuple[str, ...]
    source: str

    @property
    def sha256(self) -> str:
        h = hashlib.sha256()
        for document in self.documents:
            data = document.encode()
            h.update(f"{len(data)}\n".encode() + data)
        return h.hexdigest()


@dataclass(frozen=True, eq=False)
class Windows:
    """tokens int64 [W, T], and the digest and source of the text that they are from."""

    tokens: I64
    sha256: str
    source: str


def standard_library(part: Part = "held-out", root: Path | None = None) -> Text:
    """The running Python's own sources, or those under `root`; tests and installed packages left out."""
    base = root or Path(sysconfig.get_path("stdlib"))
    found: list[tuple[str, str]] = []
    for path in sorted(base.rglob("*.py")):
        name = path.relative_to(base).as_posix()
        if {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(name.split("/")):
            continue
        try:
            content = path.read_text("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        key = hashlib.sha256(name.encode() + b"\0" + content.encode()).hexdigest()
        if content.strip() and (int(key[0], 16) < 4) == (part == "held-out"):
            found.append((key, content))
    if not found:
        raise ExporterError(
            f"{base} holds no Python sources to measure on", hint="install the standard library with its sources"
        )
    version = sysconfig.get_python_version()
    source = f"standard library of Python {version}, {part} files"
    return Text(tuple(content for _, content in sorted(found)), source)


def load_tokenizer(tokenizer_file: Path) -> Any:
    """The `tokenizers` object of a tokenizer.json."""
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as missing:
        raise MissingExtra("tokenizers", "validate", "measuring on text") from missing
    if not tokenizer_file.is_file():
        raise ExporterError(f"{tokenizer_file} is missing", hint="copy tokenizer.json from the source model")
    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    except Exception as error:  # the library raises plain Exception for any bad file
        raise ExporterError(
            f"{tokenizer_file} cannot be read ({error})", hint="copy it from the source model"
        ) from error
    # Training leaves these behind in a file; they would cut or fill the text that is measured on.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text, special tokens in it recognised, none added."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def windows(tokenizer_file: Path, text: Text, count: int, length: int) -> Windows:
    """`count` windows of `length` tokens. Raises TooShort, a UsageError.

    Documents take turns, two windows' worth of tokens each, and are joined end to end: long files
    do not crowd out the others, and short messages fill windows together.
    """
    if count < 1 or length < 2:
        raise UsageError(f"{count} windows of {length} tokens", hint="at least 1 window of 2 tokens")
    need = count * length
    taken: list[int] = []
    for run in _turns(load_tokenizer(tokenizer_file), text, _PASS * length):
        taken += run
        if len(taken) >= need:
            tokens = np.array(taken[:need], np.int64).reshape(count, length)
            return Windows(tokens, text.sha256, text.source)
    raise TooShort(
        f"{text.source} has {len(taken):,} tokens, {count} windows of {length} need {need:,}",
        hint="give a longer text, or fewer or shorter windows",
    )


def _turns(tokenizer: Any, text: Text, run: int) -> Iterator[list[int]]:
    """Runs of at most `run` tokens, one from each document, then the next of each, until none is left."""
    rest: list[list[int]] = []
    for document in text.documents:
        ids = encode(tokenizer, document)
        yield ids[:run]
        rest.append(ids[run:])
    while rest := [ids for ids in rest if ids]:
        for i, ids in enumerate(rest):
            yield ids[:run]
            rest[i] = ids[run:]


def pieces(tokenizer: Any, text: Text, count: int = 24, characters: int = 2000) -> list[str]:
    """Texts on which a runtime's tokenizer is compared: edge cases, special tokens, then real text."""
    special = sorted(t.content for t in tokenizer.get_added_tokens_decoder().values())
    conversation = "<|start|>user<|message|>Hi  there!\n<|end|><|start|>assistant<|channel|>final<|message|>"
    found = [*EDGE_CASES, conversation, "".join(special[:64]), " ".join(special[:64])]
    return found + [document[:characters] for document in text.documents[:count]]
