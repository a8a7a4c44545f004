"""Runs one GGUF in llama.cpp, in a process of its own: `python -m exporter.validate.llama_worker`.

`child.py` says how it is asked and how it answers; the request is a `Request`. Per-position results are
an .npz that it names.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import ExporterError, UsageError
from exporter.model.reference import I64, ReferenceLogits
from exporter.validate import child
from exporter.validate import text as texts
from exporter.validate.child import OnProgress
from exporter.validate.llama_cpp import Context, FlashAttention, KvType, Model
from exporter.validate.metrics import Positions, compare

_LOGITS = 1 << 25  # logits that the library holds at once while comparing: 128 MiB
_BATCH = 512


@dataclass(frozen=True)
class Request:
    """What to run; paths are absolute.

    references: .npz files of model/reference.py by name, all of the same tokens; the results for
    each are written to `results` as NAME.kl, NAME.same_top, ...
    length: tokens of a window of held-out text, which speed is measured on where there are no references.
    pieces: texts to tokenize. Windows are prefilled at once; `generate` greedy tokens, 0 for none, come after
    `prompt` tokens of the first; both `repeats` times.
    """

    model: str
    references: dict[str, str]
    results: str
    pieces: list[str]
    threads: int
    length: int = 512
    prompt: int = 32
    flash_attention: FlashAttention = "auto"
    kv_type: KvType = "f16"
    gpu_layers: int = 0
    context: int = 0
    generate: int = 32
    repeats: int = 3


def run(request: Request, report: OnProgress) -> dict[str, Any]:
    """Load, tokenize, measure speed and memory, then compare. In this order: comparing needs memory of its own."""
    report("load", 0, 1)
    started = time.perf_counter()
    with Model(Path(request.model), request.gpu_layers) as model:
        load_seconds = time.perf_counter() - started
        answer: dict[str, Any] = {
            "version": model.library.llama_version().decode(),
            "system": model.library.llama_print_system_info().decode().strip(),
            "vocab_size": model.vocab_size,
            "ids": [model.tokenize(piece) for piece in request.pieces],
        }
        answer["speed"] = {"load_seconds": load_seconds, **_speed(model, request, _tokens(model, request), report)}
        answer["memory"] = child.memory()
        answer["load_average"] = child.load_average()
        if request.references:
            _compare(model, request, report)
    return answer


def _tokens(model: Model, request: Request) -> I64:
    """int64 [W, T], what speed is measured on: of the references, else held-out text in the model's own tokens."""
    if request.references:
        tokens = ReferenceLogits.load(Path(next(iter(request.references.values())))).tokens
        if int(tokens.max()) >= model.vocab_size:
            raise ExporterError(
                f"the text has token {int(tokens.max())}, the file a vocabulary of {model.vocab_size}",
                hint="make the file and the reference from the same checkpoint",
            )
        return tokens
    need, ids = request.length * request.repeats, list[int]()
    for document in texts.standard_library().documents:
        ids += model.tokenize(document)
        if len(ids) >= need:
            return np.array(ids[:need], np.int64).reshape(request.repeats, request.length)
    raise UsageError(
        f"the text has {len(ids):,} tokens, {need:,} are asked for", hint="a smaller --prompt or --repeats"
    )


def _speed(model: Model, request: Request, tokens: I64, report: OnProgress) -> dict[str, Any]:
    """Prefill and decode rates, tokens per second, medians and each run; and the greedy text."""
    length = tokens.shape[1]
    prompt = [int(t) for t in tokens[0, : request.prompt]]
    room = max(request.context, length, len(prompt) + request.generate)
    prefill, decode, text, total = [], [], "", request.repeats * 2
    with Context(
        model,
        room,
        min(_BATCH, room),
        request.threads,
        flash_attention=request.flash_attention,
        kv_type=request.kv_type,
        outputs=1,
    ) as context:
        context.prefill(prompt)  # the first run reads the weights in
        for repeat in range(request.repeats):
            report("speed", repeat, total)
            context.clear()
            started = time.perf_counter()
            context.prefill(tokens[repeat % len(tokens)])
            prefill.append(length / (time.perf_counter() - started))
        for repeat in range(request.repeats if request.generate else 0):
            report("speed", request.repeats + repeat, total)
            context.clear()
            token = int(context.prefill(prompt)[0].argmax())
            made = [token]
            started = time.perf_counter()
            for _ in range(request.generate):
                token = int(context.decode([token], all_logits=False)[0].argmax())
                made.append(token)
            decode.append(request.generate / (time.perf_counter() - started))
            text = model.text(made)
    report("speed", total, total)
    return {
        "prefill_tokens_per_second": statistics.median(prefill),
        "decode_tokens_per_second": statistics.median(decode) if decode else None,
        "prefill_runs": prefill,
        "decode_runs": decode,
        "prefill_length": length,
        "decode_length": request.generate,
        "context": room,
        "greedy_text": text,
    }


def _compare(model: Model, request: Request, report: OnProgress) -> None:
    references = {name: ReferenceLogits.load(Path(p)) for name, p in request.references.items()}
    windows, length = next(iter(references.values())).tokens.shape
    tokens = next(iter(references.values())).tokens
    batch = max(1, min(_BATCH, length, _LOGITS // model.vocab_size))
    parts: dict[str, list[Positions]] = {name: [] for name in references}
    with Context(
        model,
        length,
        batch,
        request.threads,
        flash_attention=request.flash_attention,
        kv_type=request.kv_type,
    ) as context:
        for w in range(windows):
            context.clear()
            for at in range(0, length, batch):
                logits = context.decode(tokens[w, at : at + batch], all_logits=True)
                for name, reference in references.items():
                    parts[name].append(compare(reference, w * length + at, logits))
                report("compare", w * length + at + len(logits), windows * length)
    arrays = {k: v for name, found in parts.items() for k, v in Positions.join(found).arrays(name).items()}
    np.savez(request.results, allow_pickle=False, **arrays)


def main() -> int:
    return child.serve(lambda asked, report: run(Request(**asked), report))


if __name__ == "__main__":
    sys.exit(main())
