"""The tokens of a model as bytes, and texts as tokens, in the words of the runtime that serves it."""

from __future__ import annotations

import codecs
import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from exporter.errors import ExporterError
from exporter.validate.llama_cpp import Model


@dataclass(frozen=True)
class Vocabulary:
    """pieces: the bytes of each token, special ones written out. control: ids that are no text.

    `encode` recognises special tokens and adds none. Has what validate/harmony.py asks of a tokenizer.
    """

    pieces: Sequence[bytes]
    control: frozenset[int]
    encode: Callable[[str], list[int]]

    def bytes_of(self, tokens: Sequence[int], special: bool = True) -> bytes:
        """special: whether tokens that are no text are written out."""
        return b"".join(self.pieces[t] for t in tokens if special or t not in self.control)

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        return self.bytes_of(tokens, not skip_special_tokens).decode("utf-8", "replace")

    def token_to_id(self, text: str) -> int | None:
        return self._special.get(text)

    @functools.cached_property
    def _special(self) -> dict[str, int]:
        """Text -> id of tokens that are no text."""
        return {self.pieces[t].decode("utf-8", "replace"): t for t in sorted(self.control, reverse=True)}

    def name(self, token: int) -> str:
        """The token as text; one that is no whole text as OpenAI writes it: "bytes:\\xe2\\x82"."""
        piece = self.pieces[token]
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in piece)


class Pieces:
    """Bytes that come token by token, as text that comes in whole characters."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, piece: bytes, final: bool = False) -> str:
        return self._decoder.decode(piece, final)


def of_llama(model: Model) -> tuple[list[bytes], list[int]]:
    """(pieces, control) of a GGUF, from llama.cpp itself; control are those written `<|name|>` that it reads as one."""
    pieces = [_piece(model, token) for token in range(model.vocab_size)]
    written = [t for t, piece in enumerate(pieces) if len(piece) > 4 and piece[:2] == b"<|" and piece[-2:] == b"|>"]
    return pieces, [t for t in written if model.tokenize(pieces[t].decode("utf-8", "replace")) == [t]]


def _piece(model: Model, token: int) -> bytes:
    size = 128
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = int(model.library.llama_token_to_piece(model.vocabulary, token, buffer, size, 0, True))
        if n >= 0:
            return buffer.raw[:n]
        size = -n  # what a longer piece needs


def of_tokenizer(tokenizer: Any, vocab_size: int) -> tuple[list[bytes], list[int]]:
    """(pieces, control) of a tokenizer.json of the byte-level kind. Raises ExporterError for another kind."""
    alphabet = _alphabet()
    special = {token: added.content for token, added in tokenizer.get_added_tokens_decoder().items()}
    pieces = []
    for token in range(vocab_size):
        written = special.get(token)
        if written is not None:
            pieces.append(written.encode())
            continue
        text = tokenizer.id_to_token(token) or ""
        try:
            pieces.append(bytes(alphabet[character] for character in text))
        except KeyError:
            raise ExporterError(
                f"the tokenizer is not a byte-level one: it has a token {text[:40]!a}",
                hint="copy tokenizer.json from the source model",
            ) from None
    control = [t for t, added in tokenizer.get_added_tokens_decoder().items() if added.special and t < vocab_size]
    return pieces, control


def _alphabet() -> dict[str, int]:
    """Character -> byte: how byte-level BPE writes bytes in JSON (`bytes_to_unicode` of openai/gpt-2, encoder.py)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}
