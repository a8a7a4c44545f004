"""The tokenizer keys of a GGUF file, from tokenizer.json.

llama.cpp splits text with a regex that it knows by name (`tokenizer.ggml.pre`). Its converter finds
the name by hashing the ids of one sample text against a list, so every retrained vocabulary fails; we
compare the regex that the tokenizer itself carries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from exporter.formats.gguf.file import ARRAY, I32, STRING, U32, Value

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

_LETTERS_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_LETTERS_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_REST = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# o200k (openai/tiktoken `tiktoken_ext/openai_public.py`); llama.cpp calls the same rules "gpt-4o".
_PRE_BY_REGEX = {f"{_LETTERS_LOWER}{_ENDINGS}|{_LETTERS_UPPER}{_ENDINGS}|{_REST}": "gpt-4o"}


def _regexes(pre: Any) -> list[str]:
    """The Split patterns of a tokenizer.json pre_tokenizer, in order."""
    if not isinstance(pre, Mapping):
        return []
    parts = pre.get("pretokenizers")
    if pre.get("type") == "Sequence" and isinstance(parts, list):
        return [r for p in parts for r in _regexes(p)]
    pattern = pre.get("pattern")
    if pre.get("type") == "Split" and isinstance(pattern, Mapping):
        return [str(pattern.get("Regex", pattern.get("String", "")))]
    return []


def refuse_tokenizer(tokenizer: Mapping[str, Any], vocab_size: int) -> str | None:
    """Why llama.cpp could not use this tokenizer.json, or None."""
    model = tokenizer.get("model")
    if not isinstance(model, Mapping) or model.get("type") != "BPE":
        return "tokenizer.json is not a byte-pair encoding"
    if pre_tokenizer_name(tokenizer) is None:
        found = _regexes(tokenizer.get("pre_tokenizer"))
        shown = repr(found[0][:60] + "...") if found else "no Split regex"
        return f"tokenizer.json splits text by rules that llama.cpp has no name for: {shown}, not the o200k regex"
    for text, i in _ids(tokenizer):
        if not isinstance(i, int) or not 0 <= i < vocab_size:
            return f"tokenizer.json gives {text!r} the id {i!r}, outside the vocabulary of {vocab_size:,}"
        if not _encodable(text):
            return f"tokenizer.json has a token {text!a} that is not text"
    merges = model.get("merges", [])
    if not isinstance(merges, list) or not all(map(_is_merge, merges)):
        return "tokenizer.json has merges that are not pairs of tokens"
    return None


def _encodable(text: str) -> bool:
    """False for half a surrogate pair, which JSON can hold and UTF-8 cannot."""
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


def _is_merge(merge: Any) -> bool:
    pair = merge.split(" ") if isinstance(merge, str) else merge
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) and _encodable(p) for p in pair)


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for this tokenizer's splitting rules; None for rules it does not have."""
    # Possessive quantifiers change speed here, not matches.
    plain = [
        r.replace("?+", "?").replace("++", "+").replace("}+", "}") for r in _regexes(tokenizer.get("pre_tokenizer"))
    ]
    return _PRE_BY_REGEX.get(plain[0]) if len(plain) == 1 else None


def _ids(tokenizer: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from tokenizer["model"]["vocab"].items()
    yield from ((t["content"], t["id"]) for t in tokenizer.get("added_tokens", []))


def _tables(tokenizer: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Token texts and types by id; ids without a token become `[PADn]`, unused."""
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for text, i in tokenizer["model"]["vocab"].items():
        tokens[i], types[i] = text, NORMAL
    for added in tokenizer.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added.get("special") else USER_DEFINED
    return tokens, types


def tokenizer_keys(
    tokenizer: Mapping[str, Any],
    tokenizer_config: Mapping[str, Any],
    special_ids: Mapping[str, int | None],
    chat_template: str | None,
    vocab_size: int,
) -> dict[str, Value]:
    """The `tokenizer.*` keys of a tokenizer that `refuse_tokenizer` lets pass.

    `special_ids`: "bos", "eos", "padding" -> id, left out where None.
    """
    tokens, types = _tables(tokenizer, vocab_size)
    # "a b": the two parts, which hold no space themselves; tokenizer.json has them so, or as pairs.
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"].get("merges", [])]
    keys = {
        "tokenizer.ggml.model": Value(STRING, "gpt2"),
        "tokenizer.ggml.pre": Value(STRING, pre_tokenizer_name(tokenizer) or ""),
        "tokenizer.ggml.tokens": Value(ARRAY, tokens, STRING),
        "tokenizer.ggml.token_type": Value(ARRAY, types, I32),
        "tokenizer.ggml.merges": Value(ARRAY, merges, STRING),
    }
    for name, i in special_ids.items():
        if i is not None:
            keys[f"tokenizer.ggml.{name}_token_id"] = Value(U32, i)
    template = chat_template or tokenizer_config.get("chat_template")
    if isinstance(template, str):
        keys["tokenizer.chat_template"] = Value(STRING, template)
    return keys
