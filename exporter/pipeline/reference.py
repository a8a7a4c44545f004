"""What the reference says of one checkpoint on the held-out text: made once, kept in a folder."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import ExporterError
from exporter.model import parameter_count
from exporter.model.config import ModelConfig, RopeConfig, Variant
from exporter.model.layer import AsVariant, Routed
from exporter.model.reference import I64, U16, ReferenceLogits, Routes, reference_logits
from exporter.model.weights import Read, Weights, room
from exporter.numerics import decode
from exporter.numerics.floats import F32
from exporter.pipeline.cache import cache_folder
from exporter.pipeline.conversations import Author, Conversations, Greedy, conversations, greedy
from exporter.pipeline.lock import locked
from exporter.pipeline.machine import usable_cpus
from exporter.pipeline.measured import MeasuredText
from exporter.pipeline.progress import Progress
from exporter.pipeline.source import OpenedModel
from exporter.types.profile import Profile
from exporter.validate import llama_cpp, text, twins
from exporter.validate.accuracy import CONVERSATIONS, LONG, Column, Further

REFERENCE_TOP_K = 1024
_ARITHMETIC = 2  # raised when our forward computes something else: what is kept outlives a version
_TWIN_TOKENS = 1024  # of the windows, on which known mistakes are computed
_PROMPTS = 8
_AHEAD = 16  # tensors that are read ahead, at most: of 20b 33 MB each
_BEYOND = 256  # tokens of the long text that lie beyond the length that the rope was trained on


class Reference:
    """Reference logits of one checkpoint on the texts that are measured on, made once and kept (pipeline/cache.py).

    `layers`: how many of the model's layers are computed, 0 for all of them. `texts`: what to measure on; None for
    held-out text of the standard library and conversations of the model's own. `folder`: where to keep what cannot
    be kept for all outputs.

    release   on plain text, as the rope was released; routes: the experts that it chooses, uint16 [layers, N, top_k]
    runtime   as llama.cpp computes the rope
    long      one sequence [1, T] that ends `_BEYOND` tokens after `trained`; None where the model does not
    """

    def __init__(
        self,
        model: OpenedModel,
        profile: Profile,
        folder: Path,
        device: str,
        progress: Progress,
        layers: int = 0,
        texts: MeasuredText | None = None,
    ) -> None:
        assert model.checkpoint.tokenizer_file is not None  # Run has looked
        self.tokenizer_file = model.checkpoint.tokenizer_file
        self.checkpoint, self.scratch, self.device = model.checkpoint, folder.parent, device
        self.config = model.checkpoint.config
        if layers:
            kinds = self.config.layer_types[:layers]
            self.config = replace(self.config, num_hidden_layers=layers, layer_types=kinds)
        self._made_of = (model, profile, folder, device, progress)
        self._folder = cache_folder("reference", folder)
        self._progress, self._profile = progress, profile
        self._fingerprint = model.fingerprint()
        self._texts = texts or MeasuredText()
        self.sample = text.standard_library()
        count, length = profile.validate.windows, profile.validate.length
        self.windows = self._texts.plain or text.windows(self.tokenizer_file, self.sample, count, length)
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
        return next(iter(self._long(self._ropes[:1])), None)

    def _long(self, ropes: list[RopeConfig]) -> list[ReferenceLogits]:
        """One for each rope, of one pass; none where the model takes no such text."""
        if not self._goes_beyond():
            return []
        length = min(self.config.max_position_embeddings, self.trained + _BEYOND)
        tokens = text.windows(self.tokenizer_file, self.sample, 1, length).tokens
        return self._kept(tokens, ropes, ["long", "long-llama.cpp"][: len(ropes)], "reference: long text")

    def _goes_beyond(self) -> bool:
        """Whether the model takes more tokens than its rope was made for."""
        return self.config.max_position_embeddings > self.trained

    # Conversations

    @functools.cached_property
    def conversations(self) -> Conversations | str:
        """What was given, else the model's own; a reason where there can be none."""
        if self._texts.conversations is not None:
            return self._texts.conversations
        spec = self._profile.validate
        try:
            with locked(self._writings, wait=True):
                return conversations(self._author, spec.windows, spec.length)
        except (ExporterError, OSError) as error:
            return f"no conversations: {error}"

    @functools.cached_property
    def greedy(self) -> Greedy | str:
        """How the model goes on by itself; a reason where that would take too long."""
        if not self._author.can_write():
            return "no answers: a model this large takes minutes a token, but on a GPU that holds it whole, in bfloat16"
        try:
            with locked(self._writings, wait=True):
                return greedy(self._author, _PROMPTS)
        except (ExporterError, OSError) as error:
            return f"no answers: {error}"

    @functools.cached_property
    def _author(self) -> Author:
        return Author(self.checkpoint, self._writings, self.device, self._progress, self._weights)

    @property
    def _writings(self) -> Path:
        return self._folder.with_name("written")

    # Known mistakes

    def _twins(self, rope: RopeConfig) -> dict[str, ReferenceLogits]:
        """Known mistakes by name (validate/twins.py), and FLOOR, of the first windows with this rope."""
        length = self.windows.tokens.shape[1]
        variants = {**twins.twins(self.config, rope, length), twins.FLOOR: Variant(rope, rounded=True)}
        count = max(1, min(len(self.windows.tokens), _TWIN_TOKENS // length))
        made = self._kept(
            self.windows.tokens[:count], list(variants.values()), list(variants), "reference: known mistakes"
        )
        return dict(zip(variants, made, strict=True))

    def further(self, as_runtime: bool = False, quick: bool = False) -> Further:
        """What to ask of a runtime beside the windows; `as_runtime`: one that computes the rope as llama.cpp does.

        `quick`: only what tells right from wrong: no long text, no answers.
        """
        columns, not_run, ropes = [], {}, self._ropes if as_runtime else self._ropes[:1]
        if isinstance(self.conversations, str):
            not_run["conversations"] = self.conversations
        else:
            windows = self.conversations.windows
            names = ["conversations-release", "conversations-llama.cpp"][: len(ropes)]
            made = self._kept(windows.tokens, ropes, names, "reference: conversations")
            columns.append(Column(CONVERSATIONS, windows.source, made[0], self.conversations.parts, *made[1:]))
        if quick:
            not_run["long"] = "left out"
        elif not self._goes_beyond():
            not_run["long"] = f"the model takes no more than the {self.trained:,} tokens it was trained on"
        else:
            made = self._long(ropes)
            columns.append(Column(LONG, self.sample.source, made[0], None, *made[1:]))
        answers: Greedy | str = "left out" if quick else self.greedy
        if isinstance(answers, str):
            not_run["generation"] = answers
            answers = Greedy([], [], frozenset(), 0)
        if (length := self.windows.tokens.shape[1]) <= self.config.sliding_window:
            not_run["window"] = f"in texts of {length} tokens a wrong window does not show: attention sees that many"
        beside = self._twins(self._ropes[as_runtime])
        floor = beside.pop(twins.FLOOR)
        base = self.runtime if as_runtime else self.release
        return Further(
            window=self.config.sliding_window,
            trained=self.trained,
            source=self.windows.source,
            columns=columns,
            twins=beside,
            base=base.first(len(floor.tokens)),
            floor=floor,
            routes=self.routes,
            prompts=answers.prompts,
            answers=answers.answers,
            answer=answers.tokens,
            ends=answers.ends,
            not_run=not_run,
        )

    def shallow(self, layers: int) -> Reference:
        """The same of the model's first layers."""
        return Reference(*self._made_of, layers=layers, texts=self._texts)

    def predict(
        self,
        read: Read | Weights,
        stage: str,
        tokens: I64 | None = None,
        routed: Routed | None = None,
        config: ModelConfig | None = None,
    ) -> ReferenceLogits:
        """What other weights predict on the same text (or `tokens`), in the arithmetic of `release` or of `config`."""
        config, tokens = config or self.config, self.windows.tokens if tokens is None else tokens
        return self._forward(read, tokens, [config.rope], stage, routed, config)[0]

    def _kept(self, tokens: I64, variants: Sequence[AsVariant], names: list[str], stage: str) -> list[ReferenceLogits]:
        """One result for each variant, loaded or made now; `names` tell their files apart."""
        paths = [self._file(tokens, [v], name) for v, name in zip(variants, names, strict=True)]
        try:
            return [ReferenceLogits.load(path) for path in paths]
        except (OSError, ExporterError):
            made = self._forward(self._weights, tokens, variants, stage)
        self._folder.mkdir(parents=True, exist_ok=True)
        for path, logits in zip(paths, made, strict=True):
            logits.save(path)
        return made

    def _file(self, tokens: I64, variants: Sequence[AsVariant], name: str) -> Path:
        whole = self.config == self.checkpoint.config
        depth = "" if whole else f" {self.config.num_hidden_layers} layers"
        key = _key(self._fingerprint, tokens, f"{_ARITHMETIC} {REFERENCE_TOP_K} {variants} {self.device}{depth}")
        return self._folder / f"{key}-{name.replace(' ', '-')}.npz"

    def _logits_files(self) -> list[Path]:
        return [self._file(self.windows.tokens, self._ropes, name) for name in ("release", "llama.cpp")]

    def _load_or_make(self) -> list[ReferenceLogits]:
        try:
            return [ReferenceLogits.load(p) for p in self._logits_files()]
        except (OSError, ExporterError):
            return self._make()

    def _make(self) -> list[ReferenceLogits]:
        routes = Routes(self.config, self.windows.tokens.size)
        made = self._forward(self._weights, self.windows.tokens, self._ropes, "reference", routes)
        self._folder.mkdir(parents=True, exist_ok=True)
        routes.save(self._file(self.windows.tokens, self._ropes, "routes"))
        for path, logits in zip(self._logits_files(), made, strict=True):
            logits.save(path)
        return made

    def _forward(
        self,
        read: Read | Weights,
        tokens: I64,
        variants: Sequence[AsVariant],
        stage: str,
        routed: Routed | None = None,
        config: ModelConfig | None = None,
    ) -> list[ReferenceLogits]:
        config = config or self.config
        weights = read if isinstance(read, Weights) else Weights(read, self.device, ahead=min(usable_cpus(), _AHEAD))
        self._progress.stage(stage, parameter_count(config), "parameters")
        done = 0

        def on_progress(now: int, _total: int) -> None:
            nonlocal done
            self._progress.advance(now - done)
            done = now

        made = reference_logits(
            config,
            weights,
            tokens,
            variants,
            top_k=min(config.vocab_size, REFERENCE_TOP_K),
            device=self.device,
            routed=routed,
            on_progress=on_progress,
        )
        self._progress.done()
        return made

    @functools.cached_property
    def _weights(self) -> Weights:
        """The checkpoint's, for every pass over them."""
        return Weights(self._read, self.device, room(self.device), min(usable_cpus(), _AHEAD))

    def weights_of(self, read: Read) -> Weights:
        """Another model's, for several passes over them. The reference's own leave the device."""
        self.__dict__.pop("_weights", None)
        self.__dict__.pop("_author", None)
        return Weights(read, self.device, room(self.device), min(usable_cpus(), _AHEAD))

    def _read(self, name: str, start: int, stop: int) -> F32:
        return decode.values(self.checkpoint.read(name, start, stop))


def _key(fingerprint: str, tokens: np.ndarray[Any, Any], settings: str) -> str:
    """Names one reference: checkpoint, text, and how it is computed."""
    h = hashlib.sha256(f"{fingerprint} {settings}\n".encode())
    h.update(np.ascontiguousarray(tokens).tobytes())
    return h.hexdigest()[:24]
