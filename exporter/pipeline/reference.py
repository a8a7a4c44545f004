"""What the reference says of one checkpoint on the held-out text: made once, kept in a folder."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import ExporterError
from exporter.model import parameter_count
from exporter.model.config import RopeConfig
from exporter.model.layer import Read, Routed
from exporter.model.reference import I64, U16, ReferenceLogits, Routes, reference_logits
from exporter.numerics import decode
from exporter.numerics.floats import F32
from exporter.pipeline.progress import Progress
from exporter.pipeline.source import OpenedModel
from exporter.types.profile import Profile
from exporter.validate import llama_cpp, text

REFERENCE_TOP_K = 1024
_BEYOND = 256  # tokens of the long text that lie beyond the length that the rope was trained on


class Reference:
    """Reference logits of one checkpoint on the held-out text, made once and kept in `folder`.

    `layers`: how many of the model's layers are computed, 0 for all of them.

    release   as the rope was released; routes: the experts that it chooses, uint16 [layers, N, top_k]
    runtime   as llama.cpp computes the rope
    long      one sequence [1, T] that ends `_BEYOND` tokens after `trained`; None where the model does not
    """

    def __init__(
        self, model: OpenedModel, profile: Profile, folder: Path, device: str, progress: Progress, layers: int = 0
    ) -> None:
        assert model.checkpoint.tokenizer_file is not None  # Run has looked
        self.tokenizer_file = model.checkpoint.tokenizer_file
        self.sample = text.standard_library()
        self.windows = text.windows(self.tokenizer_file, self.sample, profile.validate.windows, profile.validate.length)
        self.checkpoint, self.scratch = model.checkpoint, folder.parent
        self.config = model.checkpoint.config
        if layers:
            kinds = self.config.layer_types[:layers]
            self.config = replace(self.config, num_hidden_layers=layers, layer_types=kinds)
        self._made_of = (model, profile, folder, device, progress)
        self._folder, self._device, self._progress = folder, device, progress
        self._fingerprint = model.fingerprint()
        rope = self.config.rope
        self._ropes = [rope, llama_cpp.runtime_rope(rope)]
        self.release, self.runtime = self._load_or_make()

    @property
    def trained(self) -> int:
        """Tokens that the rope was made for, before YaRN stretched it."""
        config = self.config
        stretched = config.rope.kind == "yarn"
        return config.rope.original_max_position if stretched else config.max_position_embeddings

    @functools.cached_property
    def routes(self) -> U16:
        path = self._file(self.windows.tokens, self._ropes, "routes")
        try:
            return Routes.load(path)
        except (OSError, ExporterError):
            self._make()  # logits that were kept before routes were
            return Routes.load(path)

    @functools.cached_property
    def long(self) -> ReferenceLogits | None:
        config = self.config
        length = min(config.max_position_embeddings, self.trained + _BEYOND)
        if length <= self.trained:
            return None
        tokens = text.windows(self.tokenizer_file, self.sample, 1, length).tokens
        path = self._file(tokens, [config.rope], "long")
        try:
            return ReferenceLogits.load(path)
        except (OSError, ExporterError):
            (made,) = self._forward(self._read, tokens, [config.rope], "reference: long text")
        path.parent.mkdir(parents=True, exist_ok=True)
        made.save(path)
        return made

    def shallow(self, layers: int) -> Reference:
        """The same of the model's first layers."""
        return Reference(*self._made_of, layers=layers)

    def predict(self, read: Read, stage: str) -> ReferenceLogits:
        """What other weights predict on the same text, in the arithmetic of `release`."""
        return self._forward(read, self.windows.tokens, [self.config.rope], stage)[0]

    def _file(self, tokens: I64, ropes: list[RopeConfig], name: str) -> Path:
        whole = self.config == self.checkpoint.config
        depth = "" if whole else f" {self.config.num_hidden_layers} layers"
        key = _key(self._fingerprint, tokens, f"{REFERENCE_TOP_K} {ropes} {self._device}{depth}")
        return self._folder / f"{key}-{name}.npz"

    def _logits_files(self) -> list[Path]:
        return [self._file(self.windows.tokens, self._ropes, name) for name in ("release", "llama.cpp")]

    def _load_or_make(self) -> list[ReferenceLogits]:
        try:
            return [ReferenceLogits.load(p) for p in self._logits_files()]
        except (OSError, ExporterError):
            return self._make()

    def _make(self) -> list[ReferenceLogits]:
        routes = Routes(self.config, self.windows.tokens.size)
        made = self._forward(self._read, self.windows.tokens, self._ropes, "reference", routes)
        self._folder.mkdir(parents=True, exist_ok=True)
        routes.save(self._file(self.windows.tokens, self._ropes, "routes"))
        for path, logits in zip(self._logits_files(), made, strict=True):
            logits.save(path)
        return made

    def _forward(
        self, read: Read, tokens: I64, ropes: list[RopeConfig], stage: str, routed: Routed | None = None
    ) -> list[ReferenceLogits]:
        config = self.config
        self._progress.stage(stage, parameter_count(config), "parameters")
        done = 0

        def on_progress(now: int, _total: int) -> None:
            nonlocal done
            self._progress.advance(now - done)
            done = now

        made = reference_logits(
            config,
            read,
            tokens,
            ropes,
            top_k=min(config.vocab_size, REFERENCE_TOP_K),
            device=self._device,
            routed=routed,
            on_progress=on_progress,
        )
        self._progress.done()
        return made

    def _read(self, name: str, start: int, stop: int) -> F32:
        return decode.values(self.checkpoint.read(name, start, stop))


def _key(fingerprint: str, tokens: np.ndarray[Any, Any], settings: str) -> str:
    """Names one reference: checkpoint, text, and how it is computed."""
    h = hashlib.sha256(f"{fingerprint} {settings}\n".encode())
    h.update(np.ascontiguousarray(tokens).tobytes())
    return h.hexdigest()[:24]
