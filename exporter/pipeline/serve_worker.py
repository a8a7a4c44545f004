"""Loads an artifact for the endpoint, in a process of its own: `python -m exporter.pipeline.serve_worker`.

validate/endpoint/worker.py says how it is asked and how it answers; the first line is a `Request`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import ExporterError
from exporter.validate import text as texts
from exporter.validate.endpoint import vocabulary, worker
from exporter.validate.endpoint.predictors import ForwardPredictor, LlamaPredictor, OnnxPredictor, Predictor

KEEP = 4 << 30  # bytes of decoded weights that stay, where our own forward runs


@dataclass(frozen=True)
class Request:
    """What to load. kind: "gguf", "onnx" or "folder"; path as pipeline/foreign.py gives it; context in tokens."""

    kind: str
    path: str
    context: int
    threads: int
    tokenizer: str = ""
    provider: str = ""
    head_size: int = 0


def load(asked: dict[str, Any]) -> tuple[Predictor, list[bytes], list[int], Callable[[str], list[int]]]:
    """(predictor, pieces, control, encode) of a request. A GGUF brings its own tokenizer."""
    request = Request(**asked)
    if request.kind == "gguf":
        from exporter.validate.llama_cpp import Model

        model = Model(Path(request.path))
        return LlamaPredictor(model, request.context, request.threads), *vocabulary.of_llama(model), model.tokenize
    tokenizer = texts.load_tokenizer(Path(request.tokenizer))
    predictor = _onnx(request) if request.kind == "onnx" else _folder(request)
    found = vocabulary.of_tokenizer(tokenizer, predictor.vocab_size)
    return predictor, *found, lambda text: texts.encode(tokenizer, text)


def _onnx(request: Request) -> Predictor:
    return OnnxPredictor(Path(request.path), request.provider, request.threads, request.head_size)


def _folder(request: Request) -> Predictor:
    import torch

    from exporter.pipeline.foreign import open_foreign

    torch.set_num_threads(request.threads)
    found = open_foreign(Path(request.path))
    if found.config is None or found.read is None:
        raise ExporterError(f"{request.path} is no folder of weights", hint="exporter serve --help")
    return ForwardPredictor(found.config, found.read, request.context, KEEP)


def main() -> int:
    return worker.serve(load)


if __name__ == "__main__":
    sys.exit(main())
