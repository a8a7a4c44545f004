"""Tokenizer, special tokens and chat template of a checkpoint, compared with its configuration."""

from __future__ import annotations

import functools
import gc
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.checkpoint.findings import Findings
from exporter.checkpoint.headers import read_json, shown, shown_list
from exporter.errors import BadCheckpoint, ExporterError
from exporter.model import ModelConfig
from exporter.model.released import KNOWN_SHA256

TOKENIZER_CAP = 256 << 20  # bytes; the released tokenizer.json is 28 MB
_COPY = "copy it from the model this one was made from"
# The released tokenizer leaves 1,069 of 201,088 ids (0.5 %) without a token: reserved ones at the end.
_HOLES = 0.01
HARMONY = (
    "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>",
)  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, added tokens included; `special` are the ids that no text can produce."""

    tokens: dict[int, str]
    special: frozenset[int]
    twice: tuple[int, ...]

    def id_of(self, token: str) -> int | None:
        return next((i for i, t in self.tokens.items() if t == token), None)


def read_tokenizer(path: Path) -> dict[str, Any]:
    """tokenizer.json as it lies there. The last one is kept: the released file takes a third of a second."""
    stat = path.stat()
    return _parsed(path, (stat.st_size, stat.st_mtime_ns))


@functools.lru_cache(maxsize=1)
def _parsed(path: Path, _stamp: tuple[int, int]) -> dict[str, Any]:
    # A released tokenizer is a million small objects that live to the end. Looking for cycles among
    # them while they are made, and ever after, takes longer than reading it.
    gc.disable()
    try:
        return read_json(path, TOKENIZER_CAP)
    finally:
        gc.enable()
        gc.freeze()


def read_vocabulary(path: Path) -> Vocabulary:
    """Ids of a tokenizer.json (tokenizers library). Raises BadCheckpoint."""
    raw = read_tokenizer(path)
    model = raw.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise BadCheckpoint(f"{path}: has no model.vocab of tokens and ids (a BPE tokenizer)", _COPY)
    tokens = {i: t for t, i in vocab.items()}
    counted: dict[int, int] = {}
    if len(tokens) != len(vocab):
        for i in vocab.values():
            counted[i] = counted.get(i, 0) + 1
    twice = {i for i, n in counted.items() if n > 1}
    special = set()
    added = raw.get("added_tokens") or []
    for entry in added if isinstance(added, list) else []:
        if not isinstance(entry, dict) or type(entry.get("id")) is not int:
            raise BadCheckpoint(f"{path}: an added token has no id ({shown(entry)})", _COPY)
        i, content = entry["id"], str(entry.get("content"))
        if tokens.get(i, content) != content:
            twice.add(i)
        tokens[i] = content
        if entry.get("special"):
            special.add(i)
    return Vocabulary(tokens, frozenset(special), tuple(sorted(twice)))


def examine_texts(
    config: ModelConfig,
    tokenizer_file: Path | None,
    generation: dict[str, Any] | None,
    tokenizer_config: dict[str, Any] | None,
    chat_template: str | None,
    findings: Findings,
    where: Path,
) -> dict[str, Any]:
    """Add what is wrong with tokenizer, special tokens and chat template; returns plain facts."""
    facts: dict[str, Any] = {"file": None, "tokens": None, "special": None, "template": None}
    vocabulary = None
    if tokenizer_file is None:
        findings.add("error", "tokenizer.json is missing", str(where), _COPY)
    else:
        try:
            vocabulary = read_vocabulary(tokenizer_file)
        except ExporterError as e:
            findings.add("error", e.message, str(tokenizer_file), e.hint or "")
    if vocabulary is not None and tokenizer_file is not None:
        facts["file"], facts["tokens"] = str(tokenizer_file), len(vocabulary.tokens)
        facts["special"] = len(vocabulary.special)
        _check_ids(config.vocab_size, vocabulary, findings, tokenizer_file)
        _check_special(config, generation, tokenizer_config, vocabulary, findings, tokenizer_file)
    _check_generation(config, generation, findings, where)
    facts["template"] = _check_template(chat_template, findings, where)
    return facts


def _check_ids(size: int, v: Vocabulary, findings: Findings, where: Path) -> None:
    beyond = sorted(i for i in v.tokens if not 0 <= i < size)
    if beyond:
        what = f"{len(beyond):,} token ids lie outside the vocabulary of {size:,} ({shown_list(beyond)})"
        findings.add("error", what, str(where), "take the tokenizer of the model these weights belong to")
    if v.twice:
        what = f"{len(v.twice):,} ids have two tokens ({shown_list(v.twice)})"
        findings.add("error", what, str(where), _COPY)
    holes = size - (len(v.tokens) - len(beyond))
    if not holes:
        return
    last = max((i for i in v.tokens if i < size), default=-1)
    inner = last + 1 - (len(v.tokens) - len(beyond))
    place = f"{inner:,} of them below {last:,}" if inner else "all at the end"
    what = f"{holes:,} of {size:,} ids have no token ({place})"
    if holes > size * _HOLES:
        findings.add("error", what, str(where), "take the tokenizer of the model these weights belong to")
    else:
        findings.add("note", what + ": reserved, as in the release", str(where))


def _check_special(
    config: ModelConfig,
    generation: dict[str, Any] | None,
    tokenizer_config: dict[str, Any] | None,
    v: Vocabulary,
    findings: Findings,
    where: Path,
) -> None:
    configured = {"bos": config.bos_token_id, "eos": config.eos_token_id, "pad": config.pad_token_id}
    named: list[tuple[str, int]] = [(f"{k}_token_id", i) for k, i in configured.items() if i is not None]
    named += [("eos_token_id of generation_config.json", i) for i in _ids(generation, "eos_token_id")]
    for key, n in dict.fromkeys(named):
        if n not in v.tokens:
            findings.add("error", f"{key} {n} is not an id of the tokenizer", str(where), _COPY)
        elif n not in v.special:
            what = f"{key} {n} is the ordinary token {shown(v.tokens[n])!r}, not a special one"
            findings.add("warning", what, str(where), _COPY)
    for kind, i in configured.items():
        token = (tokenizer_config or {}).get(f"{kind}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and i is not None and v.tokens.get(i, token) != token:
            ours = f"id {i} of config.json is {shown(v.tokens[i])}"
            what = f"{kind}_token of tokenizer_config.json is {shown(token)}, {ours}"
            findings.add("warning", what, str(where), "make the two agree; config.json decides for exporter")
    present = set(v.tokens.values())
    absent = [t for t in HARMONY if t not in present]
    if absent:
        what = f"harmony tokens are missing: {shown_list(absent, len(HARMONY))}"
        findings.add("warning", what, str(where), "take the tokenizer of gpt-oss (o200k_harmony)")
    call, stops = v.id_of("<|call|>"), _ids(generation, "eos_token_id")
    if call is not None and stops and call not in stops:
        what = f"<|call|> ({call}) is not an eos_token_id of generation_config.json: tool calls will not stop"
        findings.add("warning", what, str(where.parent), f"add {call} to eos_token_id")


def _ids(raw: dict[str, Any] | None, key: str) -> list[int]:
    value = (raw or {}).get(key)
    return [i for i in (value if isinstance(value, list) else [value]) if type(i) is int]


def _check_generation(config: ModelConfig, generation: dict[str, Any] | None, findings: Findings, where: Path) -> None:
    if generation is None:
        findings.add(
            "warning", "generation_config.json is missing: runtimes will guess when to stop", str(where), _COPY
        )
        return
    stops = _ids(generation, "eos_token_id")
    if config.eos_token_id is not None and stops and config.eos_token_id not in stops:
        what = f"eos_token_id is {config.eos_token_id} in config.json and {stops} in generation_config.json"
        findings.add("warning", what, str(where), "make the two agree")
    for key, value in (("bos_token_id", config.bos_token_id), ("pad_token_id", config.pad_token_id)):
        other = generation.get(key)
        if value is not None and other is not None and other != value:
            what = f"{key} is {value} in config.json and {shown(other)} in generation_config.json"
            findings.add("warning", what, str(where), "make the two agree")


def _check_template(template: str | None, findings: Findings, where: Path) -> str | None:
    """Returns "released" or "other" or None. A template is code: it is never rendered here."""
    if template is None:
        findings.add("warning", "no chat template: runtimes will make one up", str(where), _COPY)
        return None
    absent = [t for t in ("<|start|>", "<|message|>", "<|end|>") if t not in template]
    if absent:
        what = f"the chat template is not harmony's: {', '.join(absent)} do not occur in it"
        findings.add("warning", what, str(where), "take chat_template.jinja of gpt-oss, or train with it")
    digest = hashlib.sha256(template.encode()).hexdigest()
    if digest in {files.get("chat_template.jinja") for files in KNOWN_SHA256.values()}:
        return "released"
    what = f"the chat template is not the released one (sha256 {digest[:12]}...)"
    findings.add("note", what, str(where), "read it before you trust it: a template is code")
    return "other"
