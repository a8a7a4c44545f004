"""Runs one graph in ONNX Runtime, in a process of its own: `python -m exporter.validate.onnx_worker`.

`child.py` says how it is asked and how it answers; the request is a `Request`. Results of every position
are an .npz that it names:

windows     each window of the text at once, 512 tokens at most
arithmetic  the same against another forward's logits
chunked     the start of the first window in two pieces
cached      the same window up to shortly before the attention window is full, then one token at a time
long        one sequence to beyond the length that the rope was trained on, in pieces, the end one at a time
routes      the experts of every token of the windows, uint16 [layers, N, top_k]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import ExporterError
from exporter.model.reference import I64, ReferenceLogits
from exporter.validate import child, hardware
from exporter.validate.child import OnProgress
from exporter.validate.limits import Limit
from exporter.validate.metrics import Positions, compare, compare_all
from exporter.validate.onnx_kernels import CUDA
from exporter.validate.onnx_session import Activations, Decoding, Graph
from exporter.validate.onnx_ties import Computed, largest_difference, relative_difference
from exporter.validate.speed import Plan, measure

_WINDOW = 512  # tokens of a window that go in at once: 400 MiB of logits for gpt-oss
_PIECE = 256  # tokens of one call of the long sequence
_SINGLE = 32  # tokens at its end that go in alone
_ALONE = 4  # tokens that go in alone with and without ONNX Runtime's rewriting
CHUNKS = 100


@dataclass(frozen=True)
class Request:
    """What to run; paths are absolute.

    speed: windows of tokens to measure the speed on, empty to leave it out; `prompt` tokens of the first
    come before `generate` tokens of greedy text. plan: longer tests of it after these.
    windows, arithmetic, long: .npz files of model/reference.py, "" for none, the first two of one text;
    results of comparing with each go to `results`.
    prefill, steps: tokens of the first window at once, then one by one. top_k: experts of a token.
    single: another graph for tokens that come alone, "" for none. layers, head_size, device_limit: see `Graph`.
    optimizer: also run the start of the first window as the graph is, without ONNX Runtime's rewriting.
    twins: .npz files by name, of the first windows, compared as windows are: NAME.kl, ... columns: of other texts, by
    column: COLUMN.NAME.kl, ... prompts: the likeliest `answer` tokens after each, up to one of `ends`.
    """

    graph: str
    threads: int
    provider: str
    activations: Activations = "shipped"
    speed: list[list[int]] | None = None
    prompt: int = 32
    generate: int = 32
    repeats: int = 3
    plan: Plan | None = None
    windows: str = ""
    arithmetic: str = ""
    long: str = ""
    results: str = ""
    prefill: int = 96
    steps: int = 64
    top_k: int = 0
    head_size: int = 0
    single: str = ""
    layers: int = 0
    optimizer: bool = False
    device_limit: int = 0
    twins: dict[str, str] = field(default_factory=dict)
    columns: dict[str, dict[str, str]] = field(default_factory=dict)
    prompts: list[list[int]] = field(default_factory=list)
    answer: int = 0
    ends: list[int] = field(default_factory=list)


def under(request: Request, limit: Limit | None) -> tuple[Request, Limit | None]:
    """On a CUDA device a limit is the runtime's to keep: what to ask, and what is left to enforce from outside."""
    if limit is None or request.provider != CUDA:
        return request, limit
    return replace(request, device_limit=limit.device), None


def run(request: Request, report: OnProgress) -> dict[str, Any]:
    """Load, measure speed and memory, then compare. In this order: comparing needs memory of its own."""
    report("load", 0, 1)
    started = time.perf_counter()
    graph = _load(request, request.graph)
    single = _load(request, request.single) if request.single else None
    load_seconds = time.perf_counter() - started
    answer: dict[str, Any] = {
        "version": graph.version,
        "provider": graph.provider,
        "vocab_size": graph.vocab_size,
        "accuracy_level": graph.accuracy_levels,
    }
    if request.speed:
        answer |= _speed(graph, request, np.array(request.speed, np.int64), report)
        answer["speed"] = {"load_seconds": load_seconds, **answer["speed"]}
        if request.provider == CUDA:
            answer["memory"] |= _on_device(request.device_limit)
        answer["load_average"] = child.load_average()
    arrays: dict[str, Any] = {}
    if request.windows:
        answer |= _windows(graph, single, request, arrays, report)
        for column, files in request.columns.items():
            for name, path in files.items():
                found = _column(graph, ReferenceLogits.load(Path(path)), column, report)
                arrays |= found.arrays(f"{column}.{name}")
        answer["answers"] = _answers(graph, single, request, report)
    if request.long:
        arrays |= _long(graph, single, ReferenceLogits.load(Path(request.long)), report).arrays("long")
    if request.optimizer:
        rewritten = _start(Decoding(graph, single), request)
        del graph, single  # their weights: those of a large model are there once
        report("without rewriting", 0, 1)
        untouched = _start(_untouched(request), request)
        answer["optimizer_difference"] = relative_difference(rewritten, untouched)
        report("without rewriting", 1, 1)
    if request.results:
        np.savez(request.results, allow_pickle=False, **arrays)
    return answer


def _on_device(limit: int) -> dict[str, Any]:
    """What this process holds of the device. The runtime's arenas only grow, so after the work it is the peak.

    Weights that a kernel packs anew are outside the arena that the runtime's limit is for: seen with FP4 experts,
    23.4 GB under a limit of 16.3.
    """
    taken = hardware.device_bytes()
    found: dict[str, Any] = {} if taken is None else {"device_peak_bytes": taken}
    if limit:
        found |= {"limit_bytes": limit, "limit_by": "cuda"}
        if taken is not None:
            found["limit_held"] = taken <= limit
    return found


def _load(request: Request, path: str, optimize: bool = True) -> Graph:
    return Graph(
        Path(path),
        threads=request.threads,
        provider=request.provider,
        activations=request.activations,
        inspect=bool(request.windows),
        head_size=request.head_size,
        optimize=optimize,
        layers=request.layers,
        device_limit=request.device_limit,
    )


def _require_vocabulary(graph: Graph, tokens: I64) -> None:
    if int(tokens.max()) >= graph.vocab_size:
        raise ExporterError(
            f"the text has token {int(tokens.max())}, the graph a vocabulary of {graph.vocab_size}",
            hint="make the graph and the reference from the same checkpoint",
        )


# Speed


def _speed(graph: Graph, request: Request, windows: I64, report: OnProgress) -> dict[str, Any]:
    """`speed` and `memory`; see speed.measure."""
    _require_vocabulary(graph, windows)
    return measure(_Runner(graph), request.plan, windows, request.prompt, request.generate, request.repeats, report)


class _Runner:
    """See speed.Runner. Keys and values grow as tokens come: there is nothing to make room for."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.clear()

    def room(self, tokens: int) -> None:
        pass

    def clear(self) -> None:
        self.logits = np.zeros((0, 0), np.float32)  # no longer needed, and large
        self.decoding = Decoding(self.graph)

    def prefill(self, tokens: Sequence[int] | I64) -> None:
        self.logits = self.decoding.append(tokens)

    def first(self) -> int:
        return int(self.logits[-1].argmax())

    def step(self, token: int) -> int:
        return int(self.decoding.append([token])[0].argmax())


# Against the reference


def _windows(
    graph: Graph, single: Graph | None, request: Request, arrays: dict[str, Any], report: OnProgress
) -> dict[str, Any]:
    """Compare the windows, and the first of them in pieces as well; what differs between the two."""
    reference = ReferenceLogits.load(Path(request.windows))
    _require_vocabulary(graph, reference.tokens)
    windows, length = reference.tokens.shape
    others = {"windows": reference}
    files = {**({"arithmetic": request.arithmetic} if request.arithmetic else {}), **request.twins}
    others |= {name: ReferenceLogits.load(Path(path)) for name, path in files.items()}
    found: dict[str, list[Positions]] = {name: [] for name in others}
    routes = []
    kept: list[Computed] = []  # the start of the first window
    for w, window in enumerate(reference.tokens):
        decoding = Decoding(graph)
        for at in range(0, length, _WINDOW):
            logits = decoding.append(window[at : at + _WINDOW])
            here = {name: other for name, other in others.items() if w < len(other.tokens)}  # some have the first only
            for name, positions in compare_all(here, w * length + at, logits).items():
                found[name].append(positions)
            if graph.routers:
                routes.append(decoding.routes(request.top_k))
            if w == 0 and at < max(2 * CHUNKS, request.prefill + request.steps):
                start = Computed.last(decoding, logits, request.top_k)
                kept.append(start[: max(2 * CHUNKS, request.prefill + request.steps) - at])
            report("compare", w * length + at + len(logits), windows * length)
    for name, parts in found.items():
        arrays |= Positions.join(parts).arrays(name)
    if routes:
        arrays["routes"] = np.concatenate(routes, axis=1)
    whole = Computed.join(kept)
    pieces = {
        "chunked": [CHUNKS] * (min(2 * CHUNKS, length) // CHUNKS) or [length],
        "cached": [request.prefill] + [1] * request.steps,
    }
    apart = {}
    for name, counts in pieces.items():
        first = request.prefill if name == "cached" else 0
        decoding = Decoding(graph, single)
        positions, computed = _in_pieces(decoding, reference, counts, first, request.top_k)
        apart[f"{name}_difference"] = largest_difference(computed, whole[first : first + len(computed.logits)])
        arrays |= positions.arrays(name)
    return apart


def _column(graph: Graph, reference: ReferenceLogits, stage: str, report: OnProgress) -> Positions:
    """Every position of the windows of another text."""
    _require_vocabulary(graph, reference.tokens)
    windows, length = reference.tokens.shape
    found = []
    for w, window in enumerate(reference.tokens):
        decoding = Decoding(graph)
        for at in range(0, length, _WINDOW):
            logits = decoding.append(window[at : at + _WINDOW])
            found += [compare(reference, w * length + at, logits)]
        report(stage, (w + 1) * length, windows * length)
    return Positions.join(found)


def _answers(graph: Graph, single: Graph | None, request: Request, report: OnProgress) -> list[list[int]]:
    """The likeliest tokens after each prompt, up to and with what ends a turn."""
    answers = []
    for number, prompt in enumerate(request.prompts):
        decoding = Decoding(graph, single)
        made = [int(decoding.append(np.array(prompt))[-1].argmax())]
        while len(made) < request.answer and made[-1] not in request.ends:
            made.append(int(decoding.append(np.array(made[-1:]))[0].argmax()))
        answers.append(made)
        report("answers", number + 1, len(request.prompts))
    return answers


def _in_pieces(
    decoding: Decoding, reference: ReferenceLogits, counts: list[int], first: int, top_k: int
) -> tuple[Positions, Computed]:
    """The first window in pieces of `counts` tokens: positions from `first` on, and what was computed for them."""
    found, computed = [], []
    for count in counts:
        at = decoding.position
        logits = decoding.append(reference.tokens[0, at : at + count])
        if at >= first:
            found.append(compare(reference, at, logits))
            computed.append(Computed.last(decoding, logits, top_k))
    return Positions.join(found), Computed.join(computed)


def _untouched(request: Request) -> Decoding:
    """In graphs that ONNX Runtime does not rewrite."""
    single = _load(request, request.single, optimize=False) if request.single else None
    return Decoding(_load(request, request.graph, optimize=False), single)


def _start(decoding: Decoding, request: Request) -> Computed:
    """The start of the first window: a prompt at once, then some tokens one by one."""
    tokens = ReferenceLogits.load(Path(request.windows)).tokens[0, : request.prefill + _ALONE]
    pieces = (tokens[: request.prefill], *tokens[request.prefill :, None])
    return Computed.join([Computed.last(decoding, decoding.append(each), request.top_k) for each in pieces])


def _long(graph: Graph, single: Graph | None, reference: ReferenceLogits, report: OnProgress) -> Positions:
    """Every position of one long sequence."""
    tokens = reference.tokens[0]
    _require_vocabulary(graph, tokens)
    together = max(0, len(tokens) - _SINGLE)
    pieces = [min(_PIECE, together - at) for at in range(0, together, _PIECE)] + [1] * min(_SINGLE, len(tokens))
    decoding, found = Decoding(graph, single), []
    for count in pieces:
        at = decoding.position
        found.append(compare(reference, at, decoding.append(tokens[at : at + count])))
        report("long text", decoding.position, len(tokens))
    return Positions.join(found)


def main() -> int:
    return child.serve(lambda asked, report: run(Request(**asked), report))


if __name__ == "__main__":
    sys.exit(main())
