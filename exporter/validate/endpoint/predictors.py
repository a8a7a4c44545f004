"""One sequence at a time in a runtime: tokens in, logits out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from exporter.errors import ExporterError
from exporter.model.config import ModelConfig
from exporter.model.generate import BLOCK, Decoder
from exporter.model.weights import Read
from exporter.numerics.floats import F32
from exporter.validate.llama_cpp import Context, Model
from exporter.validate.onnx_session import Decoding, Graph

_LOGITS = 1 << 25  # logits that are held at once: 128 MiB
_BATCH = 512


class Predictor(Protocol):
    """A runtime with a model in it; `runtime` is its name and version."""

    runtime: str
    vocab_size: int

    def piece(self, every: bool) -> int:
        """The most tokens that one `append` takes."""

    def clear(self) -> None:
        """Forget the sequence."""

    def append(self, tokens: Sequence[int], every: bool) -> F32:
        """Logits float32 [n, V] after each of n more tokens, or [1, V] after the last; good until the next call."""


class LlamaPredictor:
    """A GGUF in llama.cpp, weights and activations as it computes them; keys and values in f16."""

    def __init__(self, model: Model, context: int, threads: int) -> None:
        self.vocab_size = model.vocab_size
        self.runtime = f"llama.cpp {model.library.llama_version().decode()}"
        self._batch = min(_BATCH, context)
        self._outputs = max(1, min(self._batch, _LOGITS // model.vocab_size))
        self._context = Context(model, context, self._batch, threads, outputs=self._outputs)

    def piece(self, every: bool) -> int:
        return self._outputs if every else self._batch

    def clear(self) -> None:
        self._context.clear()

    def append(self, tokens: Sequence[int], every: bool) -> F32:
        return self._context.decode(tokens, all_logits=every)


class OnnxPredictor:
    """A decoder graph in ONNX Runtime, activations as the graph says."""

    def __init__(self, path: Path, provider: str, threads: int, head_size: int) -> None:
        self._graph = Graph(path, threads=threads, provider=provider, head_size=head_size)
        self.vocab_size = self._graph.vocab_size
        self.runtime = f"ONNX Runtime {self._graph.version}"
        self._decoding = Decoding(self._graph)

    def piece(self, every: bool) -> int:
        """The graph gives all logits, whether they are asked for or not."""
        return max(1, min(_BATCH, _LOGITS // self.vocab_size))

    def clear(self) -> None:
        self._decoding = Decoding(self._graph)

    def append(self, tokens: Sequence[int], every: bool) -> F32:
        logits = self._decoding.append(tokens)
        return logits if every else logits[-1:]


class ForwardPredictor:
    """Weights in our own float32 forward, for files that no runtime here opens; `keep_bytes` of them stay decoded."""

    def __init__(self, config: ModelConfig, read: Read, context: int, keep_bytes: int) -> None:
        self.vocab_size = config.vocab_size
        self.runtime = "exporter's own float32 forward"
        self._kept: dict[tuple[str, int, int], F32] = {}
        self._room, self._read = keep_bytes, read
        self._config, self._context = config, context
        self.clear()

    def piece(self, every: bool) -> int:
        return BLOCK

    def clear(self) -> None:
        self._decoder = Decoder(self._config, self._weights, 1, self._context)

    def append(self, tokens: Sequence[int], every: bool) -> F32:
        logits = self._decoder.advance(np.array([tokens], np.int64), every=True)
        self._decoder.commit()
        out: F32 = logits[0].cpu().numpy()
        return out if every else out[-1:]

    def _weights(self, name: str, start: int, stop: int) -> F32:
        """As `read`; every step asks for the same ones in the same order, so those that came first are kept."""
        key = (name, start, stop)
        if key in self._kept:
            return self._kept[key]
        values = self._read(name, start, stop)
        if values.nbytes <= self._room:
            self._room -= values.nbytes
            self._kept[key] = values
        return values


def prefill(predictor: Predictor, tokens: Sequence[int], every: bool) -> Iterator[F32]:
    """Append any number of tokens, piece by piece, with the logits of each piece as `append` gives them."""
    if not tokens:
        raise ExporterError("there is no token to go on from", hint="a prompt of one token at least")
    piece = predictor.piece(every)
    for at in range(0, len(tokens), piece):
        yield predictor.append(tokens[at : at + piece], every)
