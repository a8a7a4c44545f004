"""Runs one GGUF in llama.cpp, in a process of its own: `python -m exporter.validate.llama_worker`.

Native code can crash or hang, and memory can only be measured in a process that did nothing else.
A `Request` comes as JSON on stdin; JSON lines go to stdout (`runtime.py` starts the process and reads
them): progress, then one answer or error. Per-position results are an .npz that the request names.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import ExporterError
from exporter.model.reference import ReferenceLogits
from exporter.validate.llama_cpp import Context, FlashAttention, KvType, Model
from exporter.validate.metrics import Positions, compare

_LOGITS = 1 << 25  # logits that the library holds at once while comparing: 128 MiB
_SPEED_WINDOWS = 3
_REPEATS = 3
_PROMPT = 32
_PR_SET_PDEATHSIG = 1

Report = Callable[[str, int, int], None]  # (stage, done, total)


@dataclass(frozen=True)
class Request:
    """What to run; paths are absolute.

    references: .npz files of model/reference.py by name, all of the same tokens; the results for
    each are written to `results` as NAME.kl, NAME.same_top, ...
    pieces: texts to tokenize. generate: tokens of greedy text for the decode speed, 0 for none.
    """

    model: str
    references: dict[str, str]
    results: str
    pieces: list[str]
    threads: int
    flash_attention: FlashAttention = "auto"
    kv_type: KvType = "f16"
    gpu_layers: int = 0
    context: int = 0
    generate: int = 32


def run(request: Request, report: Report) -> dict[str, Any]:
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
        references = {name: ReferenceLogits.load(Path(p)) for name, p in request.references.items()}
        tokens = next(iter(references.values())).tokens
        if int(tokens.max()) >= model.vocab_size:
            raise ExporterError(
                f"the text has token {int(tokens.max())}, the file a vocabulary of {model.vocab_size}",
                hint="make the file and the reference from the same checkpoint",
            )
        del references
        answer["speed"] = {"load_seconds": load_seconds, **_speed(model, request, tokens, report)}
        answer["memory"] = _memory()
        answer["load_average"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        _compare(model, request, report)
    return answer


def _speed(model: Model, request: Request, tokens: Any, report: Report) -> dict[str, Any]:
    """Prefill and decode rates, tokens per second, medians; and the greedy text."""
    report("speed", 0, 1)
    length = tokens.shape[1]
    prompt = [int(t) for t in tokens[0, :_PROMPT]]
    room = max(request.context, length, len(prompt) + request.generate)
    prefill, decode, text = [], [], ""
    with Context(
        model,
        room,
        min(512, room),
        request.threads,
        flash_attention=request.flash_attention,
        kv_type=request.kv_type,
        outputs=1,
    ) as context:
        context.prefill(prompt)  # the first run reads the weights in
        for window in tokens[:_SPEED_WINDOWS]:
            context.clear()
            started = time.perf_counter()
            context.prefill(window)
            prefill.append(length / (time.perf_counter() - started))
        for _ in range(_REPEATS if request.generate else 0):
            context.clear()
            token = int(context.prefill(prompt)[0].argmax())
            made = [token]
            started = time.perf_counter()
            for _ in range(request.generate):
                token = int(context.decode([token], all_logits=False)[0].argmax())
                made.append(token)
            decode.append(request.generate / (time.perf_counter() - started))
            text = model.text(made)
    return {
        "prefill_tokens_per_second": statistics.median(prefill),
        "decode_tokens_per_second": statistics.median(decode) if decode else None,
        "prefill_length": length,
        "decode_length": request.generate,
        "context": room,
        "greedy_text": text,
    }


def _compare(model: Model, request: Request, report: Report) -> None:
    references = {name: ReferenceLogits.load(Path(p)) for name, p in request.references.items()}
    windows, length = next(iter(references.values())).tokens.shape
    tokens = next(iter(references.values())).tokens
    batch = max(1, min(512, length, _LOGITS // model.vocab_size))
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
    arrays = {
        f"{name}.{field}": values
        for name, found in parts.items()
        for field, values in dataclasses.asdict(Positions.join(found)).items()
    }
    np.savez(request.results, allow_pickle=False, **arrays)


def _memory() -> dict[str, int | None]:
    """Peak resident bytes of this process so far, and what of the present is not file pages.

    From /proc: ru_maxrss survives exec on Linux, so it may be the parent's peak.
    """
    fields: dict[str, int] = {}
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("VmHWM", "RssAnon"):
                fields[name] = int(value.split()[0]) * 1024
    except OSError:
        import psutil

        info = psutil.Process().memory_info()
        fields["VmHWM"] = getattr(info, "peak_wset", info.rss)
    return {"peak_rss_bytes": fields.get("VmHWM"), "anonymous_bytes": fields.get("RssAnon")}


def _die_with_parent() -> None:
    """A killed parent must not leave a model in memory. Linux only; elsewhere the run just ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    _die_with_parent()
    # Native code may print to stdout: keep the real one for the answer, give it stderr instead.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    try:
        request = Request(**json.load(sys.stdin))
        say({"answer": run(request, lambda *done: say({"progress": done}))})
    except ExporterError as error:
        say({"error": {"message": error.message, "hint": error.hint}})
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
