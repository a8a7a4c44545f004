"""Conversations that the model writes itself: text of its own kind, without any download.

Every window begins with a user's turn from a list of openings and lets the model answer; where an
answer ends, the next opening follows. One window in four begins with the bare start token, so that what
the model writes unasked is there too. Written once: what is there is kept block by block and used again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from exporter.checkpoint import Checkpoint
from exporter.errors import Refused, UsageError
from exporter.model.generate import BLOCK, generate
from exporter.model.reference import I64
from exporter.model.weights import Weights, room
from exporter.numerics import decode
from exporter.numerics.floats import F32
from exporter.pipeline.calibration.openings import OPENINGS
from exporter.pipeline.journal import Journal
from exporter.pipeline.progress import Progress
from exporter.pipeline.source import fingerprint
from exporter.validate import text as texts

SEED, TEMPERATURE, TOP_P = 0, 1.0, 1.0
_ENDS = ("<|return|>", "<|call|>", "<|endoftext|>")
_UNASKED = 4  # one window in so many begins with the start token


def by_the_model(
    checkpoint: Checkpoint,
    count: int,
    length: int,
    scratch: Path,
    device: str,
    progress: Progress,
    keep_bytes: int | None = None,
) -> texts.Windows:
    """`count` windows of `length` tokens, sampled at temperature 1 with a fixed seed.

    The cost is in model/generate.py. `scratch` holds the tokens, under a name of their own for each
    checkpoint and setting; a killed run goes on from the last full block of 32. `keep_bytes` of weights
    stay on the device; None: 0.25 GiB on a CPU, most of what is free on a GPU.
    """
    if count < 1 or length < 2:
        raise UsageError(f"{count} windows of {length} tokens", hint="at least 1 window of 2 tokens")
    script = Script(checkpoint, count)
    tokens = written(checkpoint, script, count, length, Sampling(), scratch, device, progress, keep_bytes)
    digest = hashlib.sha256(np.ascontiguousarray(tokens, "<i8").tobytes()).hexdigest()
    return texts.Windows(tokens, digest, f"written by the model itself (seed {SEED}, temperature {TEMPERATURE:g})")


@dataclass(frozen=True)
class Sampling:
    """How the model chooses. temperature 0: the likeliest token."""

    seed: int = SEED
    temperature: float = TEMPERATURE
    top_p: float = TOP_P


class Scripted(Protocol):
    """model/generate.Script, and what names it."""

    key: str

    def __call__(self, tokens: I64) -> I64: ...


def written(
    checkpoint: Checkpoint,
    script: Scripted,
    count: int,
    length: int,
    sampling: Sampling,
    scratch: Path,
    device: str,
    progress: Progress,
    keep_bytes: int | None = None,
    weights: Weights | None = None,
    stage: str = "the model writes calibration text",
) -> I64:
    """Tokens int64 [count, length] that `script` and the model write; see `by_the_model`. `weights`: the model's."""
    how = f"{sampling.seed} {sampling.temperature} {sampling.top_p}"
    settings = f"{count} {length} {how} {BLOCK} {device.partition(':')[0]} {script.key}"
    key = hashlib.sha256(f"{fingerprint(checkpoint, {})} {settings}".encode()).hexdigest()[:24]
    scratch.mkdir(parents=True, exist_ok=True)
    journal, known = _opened(scratch / f"written-{key}.jsonl", count, length, checkpoint.config.vocab_size)

    def on_block(block: I64) -> None:
        journal.append({"tokens": block.tolist()})
        os.fsync(journal.descriptor)

    def read(name: str, start: int, stop: int) -> F32:
        return decode.values(checkpoint.read(name, start, stop))

    progress.stage(stage, length, "tokens")
    try:
        return generate(
            checkpoint.config,
            weights or read,
            script,
            count,
            length,
            seed=sampling.seed,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            known=known,
            device=device,
            keep_bytes=room(device) if keep_bytes is None and weights is None else keep_bytes or 0,
            on_block=on_block,
            on_token=progress.advance,
        )
    finally:
        journal.close()
        progress.done()


def _opened(path: Path, count: int, length: int, vocabulary: int) -> tuple[Journal, list[I64]]:
    """The journal, and the blocks that an earlier run wrote; begun anew when one of them cannot be a block."""
    journal = Journal(path)
    widths = [min(BLOCK, length - start) for start in range(0, length, BLOCK)]
    blocks = [_block(record.get("tokens")) for record in journal.records]
    shapes = [(count, width) for width in widths[: len(blocks)]]
    if [b.shape for b in blocks] == shapes and all(b.min() >= 0 and b.max() < vocabulary for b in blocks):
        return journal, blocks
    journal.close()
    path.unlink()
    return Journal(path), []


def _block(tokens: object) -> I64:
    try:
        return np.array(tokens, np.int64)
    except (ValueError, TypeError, OverflowError):
        return np.empty(0, np.int64)


class Script:
    """Says which token must come next in each window; see model/generate.Script.

    It follows the tokens so far and nothing else, so that a resumed run sees what the first one saw.
    """

    def __init__(self, checkpoint: Checkpoint, windows: int) -> None:
        assert checkpoint.tokenizer_file is not None
        tokenizer = texts.load_tokenizer(checkpoint.tokenizer_file)
        for tag in ("<|start|>", "<|message|>", "<|end|>"):
            if len(texts.encode(tokenizer, tag)) != 1:
                raise Refused(
                    f"{checkpoint.tokenizer_file}: {tag} is not one token, so the model cannot be spoken to",
                    hint="copy tokenizer.json from the source model, or choose another calibration text",
                )
        self._turns = [
            texts.encode(tokenizer, f"<|start|>user<|message|>{opening}<|end|><|start|>assistant")
            for opening in OPENINGS
        ]
        start = checkpoint.config.bos_token_id
        self._start = self._turns[0][:1] if start is None else [start]
        self._ends = frozenset(i for tag in _ENDS for i in texts.encode(tokenizer, tag)[-1:])
        self.key = hashlib.sha256(repr((self._turns, self._start, sorted(self._ends))).encode()).hexdigest()
        self._seen = 0
        self._next = [w for w in range(windows)]  # number of the next opening
        self._due = [self._beginning(w) for w in range(windows)]

    def _beginning(self, window: int) -> list[int]:
        return list(self._start) if window % _UNASKED == _UNASKED - 1 else self._opening(window)

    def _opening(self, window: int) -> list[int]:
        turn = self._turns[self._next[window] % len(self._turns)]
        self._next[window] += 7  # another part of the list than the neighbours'
        return list(turn)

    def __call__(self, tokens: I64) -> I64:
        for column in tokens[:, self._seen :].T:
            self._follow(column.tolist())
        self._seen = tokens.shape[1]
        return np.array([due[0] if due else -1 for due in self._due], np.int64)

    def _follow(self, column: Sequence[int]) -> None:
        for window, token in enumerate(column):
            due = self._due[window]
            if due:
                due.pop(0)
            elif token in self._ends:
                self._due[window] = self._opening(window)
