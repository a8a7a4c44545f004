"""Runs a folder in onnxruntime-genai, in a process of its own: `python -m exporter.validate.genai_worker`.

`child.py` says how it is asked and how it answers; the request is a `Request`. Results of every position
are an .npz that it names: "prefill", windows of the text at once; "cached", the first of them up to shortly
before the attention window is full, then one token at a time, in the cache that the folder's own
configuration asks for.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import ExporterError, MissingExtra
from exporter.model.reference import I64, ReferenceLogits
from exporter.numerics.floats import F32
from exporter.validate import child, speed
from exporter.validate.child import OnProgress
from exporter.validate.metrics import Positions, compare
from exporter.validate.onnx_session import require_environment

_PIECE = 512  # tokens of one call: 400 MiB of logits for gpt-oss


@dataclass(frozen=True)
class Request:
    """What to run; paths are absolute.

    provider: "cpu" runs on the CPU whatever the folder's configuration names, "" as it says.
    context: tokens that there is room for; at least the attention window, which its kernels insist on.
    chat: messages, to render with the folder's template; empty for none.
    windows: an .npz of model/reference.py, "" for none, of which the first `count` are compared.
    speed: `prompt`, tokens that come before `generate` greedy ones, `repeats` times. `plan`: longer tests after
    these, with prompts from `text`.
    """

    folder: str
    threads: int
    context: int
    provider: str = ""
    pieces: list[str] | None = None
    chat: list[dict[str, str]] | None = None
    prompt: list[int] | None = None
    generate: int = 32
    repeats: int = 3
    plan: speed.Plan | None = None
    text: list[int] | None = None
    windows: str = ""
    count: int = 2
    prefill: int = 96
    steps: int = 64
    results: str = ""


def run(request: Request, report: OnProgress) -> dict[str, Any]:
    """Load, tokenize, measure speed and memory, then compare. In this order: comparing needs memory of its own."""
    report("genai: load", 0, 1)
    started = time.perf_counter()
    model = _Model(request)
    answer: dict[str, Any] = {"version": model.version, "load_seconds": time.perf_counter() - started}
    tokenizer = model.tokenizer()
    answer["ids"] = [[int(i) for i in tokenizer.encode(piece)] for piece in request.pieces or []]
    answer["chat"] = _chat(tokenizer, request.chat) if request.chat else None
    if request.prompt and request.repeats:
        answer |= _speed(model, request, report)
        answer["greedy_text"] = str(tokenizer.decode(np.array(answer["greedy_ids"], np.int32)))
    answer["memory"] = child.memory()
    if plan := speed.Plan.of(request.plan):
        known = {"tests": answer.get("tests", [])}
        text = np.array(request.text or request.prompt, np.int64)
        answer |= speed.extended(_Runner(model), plan, text, known, report, memory=child.peak)
        answer["memory"] = answer["memory"] if known["tests"] else child.memory()
    if request.windows:
        arrays = _compare(model, request, ReferenceLogits.load(Path(request.windows)), report)
        np.savez(request.results, allow_pickle=False, **arrays)
    return answer


class _Model:
    """The folder, loaded. Raises ExporterError with what the runtime says against it."""

    def __init__(self, request: Request) -> None:
        try:
            import onnxruntime_genai
        except ModuleNotFoundError as missing:
            raise MissingExtra("onnxruntime-genai", "onnx", "running an ONNX folder as a chat model") from missing
        require_environment("shipped")
        self.library: Any = onnxruntime_genai
        self.version, self.request = str(onnxruntime_genai.__version__), request
        session = {"intra_op_num_threads": request.threads, "log_severity_level": 3}
        try:
            config = self.library.Config(request.folder)
            config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
            if request.provider == "cpu":
                config.clear_providers()
            self.model = self.library.Model(config)
        except Exception as error:  # RuntimeError, and what json or the file system raise inside
            raise self.failure("load", error) from error

    def tokenizer(self) -> Any:
        try:
            return self.library.Tokenizer(self.model)
        except Exception as error:
            raise self.failure("read the tokenizer of", error) from error

    def generator(self, room: int = 0) -> Any:
        """An empty sequence that decodes greedily, with room for so many tokens, or for as many as the request says."""
        params = self.library.GeneratorParams(self.model)
        params.set_search_options(max_length=max(room, self.request.context), do_sample=False)
        return self.library.Generator(self.model, params)

    def failure(self, doing: str, error: Exception) -> ExporterError:
        """What the runtime said, as one line."""
        said = " ".join(str(error).split())[:400]
        return ExporterError(
            f"onnxruntime-genai {self.version} cannot {doing} {self.request.folder}: {said}",
            hint="exporter quantize ... --overwrite makes it again",
        )


def _chat(tokenizer: Any, messages: list[dict[str, str]]) -> dict[str, str]:
    """What its template makes of a conversation, or why it makes nothing."""
    try:
        text = tokenizer.apply_chat_template(messages=json.dumps(messages), add_generation_prompt=False)
    except Exception as error:  # RuntimeError of the template engine
        return {"error": " ".join(str(error).split())[:300]}
    return {"text": str(text)}


def _speed(model: _Model, request: Request, report: OnProgress) -> dict[str, Any]:
    """Greedy tokens, as many as come before the model ends its answer, and the rate, a median."""
    rates: list[float] = []
    latencies: list[float] = []
    greedy: list[int] = []
    for repeat in range(request.repeats):
        report("genai: speed", repeat, request.repeats)
        try:
            generator = model.generator()
            generator.append_tokens(np.array(request.prompt, np.int32))
            generator.generate_next_token()  # of the prompt's own logits
            greedy = [int(generator.get_next_tokens()[0])]
            times = [time.perf_counter()]
            while len(greedy) <= request.generate and not generator.is_done():
                generator.generate_next_token()
                greedy.append(int(generator.get_next_tokens()[0]))
                times.append(time.perf_counter())
        except Exception as error:
            raise model.failure("generate with", error) from error
        if len(greedy) > 1:
            rates.append((len(greedy) - 1) / (times[-1] - times[0]))
            latencies += [after - before for before, after in pairwise(times)]
    report("genai: speed", request.repeats, request.repeats)
    made, after = len(greedy) - 1, len(request.prompt or ())
    name = speed.generate_test(made, after)
    return {
        "decode_tokens_per_second": statistics.median(rates) if rates else None,
        "decode_runs": rates,
        "greedy_ids": greedy,
        "tests": [speed.summary(name, "generate", made, after, rates, latencies)] if rates else [],
    }


class _Runner:
    """See speed.Runner. The runtime chooses the tokens itself, and may end the answer: then it is fed the last."""

    def __init__(self, model: _Model) -> None:
        self.model, self.length = model, 0
        self.generator: Any = None

    def room(self, tokens: int) -> None:
        self.length = max(self.length, tokens)

    def clear(self) -> None:
        # One at a time: each holds keys and values for its whole length.
        self.generator = None
        self.generator = self.model.generator(self.length + 1)

    def prefill(self, tokens: Sequence[int] | I64) -> None:
        try:
            self.generator.append_tokens(np.asarray(tokens, np.int32))
        except Exception as error:
            raise self.model.failure("generate with", error) from error

    def first(self) -> int:
        try:
            self.generator.generate_next_token()  # of the prompt's own logits; later ones run the model first
            return int(self.generator.get_next_tokens()[0])
        except Exception as error:
            raise self.model.failure("generate with", error) from error

    def step(self, token: int) -> int:
        if self.generator.is_done():
            self.prefill([token])
        return self.first()


def _compare(model: _Model, request: Request, reference: ReferenceLogits, report: OnProgress) -> dict[str, Any]:
    windows, length = reference.tokens.shape
    count = min(request.count, windows)
    whole = [min(_PIECE, length - at) for at in range(0, length, _PIECE)]
    prefill: list[Positions] = []
    cached: list[Positions] = []
    for w in range(count):
        for at, logits in _logits(model, reference.tokens[w], whole):
            prefill.append(compare(reference, w * length + at, logits))
            report("genai: compare", w * length + at + len(logits), count * length + request.steps)
    pieces = [request.prefill] + [1] * request.steps
    for at, logits in _logits(model, reference.tokens[0], pieces):
        if at >= request.prefill:
            cached.append(compare(reference, at, logits))
    report("genai: compare", count * length + request.steps, count * length + request.steps)
    return {**Positions.join(prefill).arrays("prefill"), **Positions.join(cached).arrays("cached")}


def _logits(model: _Model, tokens: I64, pieces: list[int]) -> Iterator[tuple[int, F32]]:
    """Logits float32 [n, V] of each piece of a sequence, and where it starts."""
    generator, at = model.generator(), 0
    for count in pieces:
        try:
            generator.append_tokens(tokens[at : at + count].astype(np.int32))
            logits: F32 = generator.get_output("logits")[0].astype(np.float32, copy=False)
        except Exception as error:
            raise model.failure(f"run {count} tokens at {at} of", error) from error
        yield at, logits
        at += count


def main() -> int:
    return child.serve(lambda asked, report: run(Request(**asked), report))


if __name__ == "__main__":
    sys.exit(main())
