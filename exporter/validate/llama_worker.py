"""Runs one GGUF in llama.cpp, in a process of its own: `python -m exporter.validate.llama_worker`.

`child.py` says how it is asked and how it answers; the request is a `Request`. Per-position results are
an .npz that it names.
"""

from __future__ import annotations

import contextlib
import ctypes as ct
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import ExporterError, UsageError
from exporter.model.reference import I64, ReferenceLogits
from exporter.validate import child, speed
from exporter.validate import text as texts
from exporter.validate.child import OnProgress
from exporter.validate.llama_cpp import Context, FlashAttention, KvType, Model
from exporter.validate.llama_routes import Routing
from exporter.validate.metrics import Positions, compare_all

_LOGITS = 1 << 25  # logits that the library holds at once while comparing: 128 MiB
_BATCH = 512


@dataclass(frozen=True)
class Request:
    """What to run; paths are absolute.

    references: .npz files of model/reference.py by name, of the same windows or the first of them; the results for
    each are written to `results` as NAME.kl, NAME.same_top, ..., and the experts as routes. columns: the same of other
    texts, by column: COLUMN.NAME.kl, ... prompts: the likeliest `answer` tokens after each, up to one of `ends`.
    length: tokens of a window of held-out text, which speed is measured on where there are no references.
    pieces: texts to tokenize. Windows are prefilled at once; `generate` greedy tokens, 0 for none, come after
    `prompt` tokens of the first; both `repeats` times. `plan`: longer tests of the speed after these.
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
    plan: speed.Plan | None = None
    columns: dict[str, dict[str, str]] = field(default_factory=dict)
    prompts: list[list[int]] = field(default_factory=list)
    answer: int = 0
    ends: list[int] = field(default_factory=list)


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
        answer |= _speed(model, request, _tokens(model, request), report)
        answer["speed"] = {"load_seconds": load_seconds, **answer["speed"]}
        answer["load_average"] = child.load_average()
        if request.references:
            _compare(model, request, answer, report)
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
    rows = max(1, request.repeats)
    need, ids = request.length * rows, list[int]()
    for document in texts.standard_library().documents:
        ids += model.tokenize(document)
        if len(ids) >= need:
            return np.array(ids[:need], np.int64).reshape(rows, request.length)
    raise UsageError(
        f"the text has {len(ids):,} tokens, {need:,} are asked for", hint="a smaller --prompt or --repeats"
    )


def _speed(model: Model, request: Request, tokens: I64, report: OnProgress) -> dict[str, Any]:
    """`speed` and `memory`; see speed.measure. The greedy text beside the tokens."""
    room = speed.PIECE
    if request.repeats:
        room = max(request.context, tokens.shape[1], request.prompt + request.generate)
    plan = speed.Plan.of(request.plan)
    if plan and not plan.context:
        plan = replace(plan, context=_trained_context(model))
    runner = _Runner(model, request, room)
    with runner.opened:
        found = speed.measure(runner, plan, tokens, request.prompt, request.generate, request.repeats, report)
    if request.repeats:
        found["speed"] |= {"context": room, "greedy_text": model.text(found["speed"].pop("greedy_ids"))}
    return found


def _trained_context(model: Model) -> int:
    """Tokens that the file says the model takes."""
    tell = model.library.llama_model_n_ctx_train
    tell.restype, tell.argtypes = ct.c_int32, [ct.c_void_p]
    return max(0, int(tell(model.handle)))


class _Runner:
    """See speed.Runner. A context of llama.cpp holds memory for all the tokens it was made for."""

    def __init__(self, model: Model, request: Request, room: int) -> None:
        self.model, self.request, self.length = model, request, 0
        self.opened = contextlib.ExitStack()
        self.room(room)

    def room(self, tokens: int) -> None:
        if tokens <= self.length:
            return
        self.opened.close()  # never two of them: keys and values of 32,768 tokens take 0.8 GB in 20b
        context = _context(self.model, self.request, tokens, min(_BATCH, tokens), outputs=1)
        self.context, self.length = self.opened.enter_context(context), tokens

    def clear(self) -> None:
        self.context.clear()

    def prefill(self, tokens: Sequence[int] | I64) -> None:
        self.logits = self.context.prefill(tokens)[0]

    def first(self) -> int:
        return int(self.logits.argmax())

    def step(self, token: int) -> int:
        return int(self.context.decode([token], all_logits=False)[0].argmax())


# Against the reference


def _compare(model: Model, request: Request, answer: dict[str, Any], report: OnProgress) -> None:
    """The windows with every reference of theirs, then the other columns; answers after prompts."""
    routing = Routing(model.library)
    windows = _loaded(request.references)
    arrays = _column(model, request, windows, "compare", report, routing)
    try:
        arrays["routes"] = routing.experts(next(iter(windows.values())).tokens.size)
    except ExporterError as error:
        answer["no_routes"] = error.message
    for column, files in request.columns.items():
        arrays |= {f"{column}.{k}": v for k, v in _column(model, request, _loaded(files), column, report).items()}
    np.savez(request.results, allow_pickle=False, **arrays)
    answer["answers"] = _answers(model, request, report)


def _loaded(files: Mapping[str, str]) -> dict[str, ReferenceLogits]:
    return {name: ReferenceLogits.load(Path(path)) for name, path in files.items()}


def _column(
    model: Model,
    request: Request,
    references: Mapping[str, ReferenceLogits],
    stage: str,
    report: OnProgress,
    routing: Routing | None = None,
) -> dict[str, Any]:
    """Every position of windows that have references; one of them may have the first windows only."""
    tokens = max((r.tokens for r in references.values()), key=len)
    windows, length = tokens.shape
    batch = max(1, min(_BATCH, length, _LOGITS // model.vocab_size))
    parts: dict[str, list[Positions]] = {name: [] for name in references}
    with _context(model, request, length, batch, routing=routing) as context:
        for w in range(windows):
            context.clear()
            for at in range(0, length, batch):
                logits = context.decode(tokens[w, at : at + batch], all_logits=True)
                here = {name: r for name, r in references.items() if w < len(r.tokens)}
                for name, found in compare_all(here, w * length + at, logits).items():
                    parts[name].append(found)
                report(stage, w * length + at + len(logits), windows * length)
    joined = {name: Positions.join(each) for name, each in parts.items()}
    return {k: v for name, each in joined.items() for k, v in each.arrays(name).items()}


def _answers(model: Model, request: Request, report: OnProgress) -> list[list[int]]:
    """The likeliest tokens after each prompt, up to and with what ends a turn."""
    if not request.prompts:
        return []
    answers = []
    room = max(map(len, request.prompts)) + request.answer
    with _context(model, request, room, min(_BATCH, room), outputs=1) as context:
        for number, prompt in enumerate(request.prompts):
            context.clear()
            made = [int(context.prefill(prompt)[0].argmax())]
            while len(made) < request.answer and made[-1] not in request.ends:
                made.append(int(context.decode(made[-1:], all_logits=False)[0].argmax()))
            answers.append(made)
            report("answers", number + 1, len(request.prompts))
    return answers


def _context(model: Model, request: Request, length: int, batch: int, **settings: Any) -> Context:
    return Context(
        model,
        length,
        batch,
        request.threads,
        flash_attention=request.flash_attention,
        kv_type=request.kv_type,
        **settings,
    )


def main() -> int:
    return child.serve(lambda asked, report: run(Request(**asked), report))


if __name__ == "__main__":
    sys.exit(main())
