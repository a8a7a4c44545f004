"""Proves an ONNX folder: in ONNX Runtime and in onnxruntime-genai, each in child processes, against the reference.

Twice in ONNX Runtime: as shipped ("release"), where CPU kernels round activations to int8, and with the
same weights and float32 activations ("export"), where an error of the export cannot hide in that rounding.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from exporter.model.reference import I64, U16, ReferenceLogits
from exporter.validate import child, genai_worker, onnx_worker
from exporter.validate import text as texts
from exporter.validate.accuracy import LONG, Further, further_report
from exporter.validate.child import OnProgress
from exporter.validate.genai import Chat, Plain, few, in_genai, run_genai
from exporter.validate.limits import Limit
from exporter.validate.metrics import Positions, flips, summary
from exporter.validate.onnx_kernels import CPU
from exporter.validate.onnx_rules import require_runnable
from exporter.validate.onnx_session import Activations, environment
from exporter.validate.runtime import SCRATCH_PREFIX, compare_ids
from exporter.validate.speed import Plan, proof_plan
from exporter.validate.twins import PREFIX

MODES: Mapping[str, Activations] = {"release": "shipped", "export": "float32"}

_SPEED_WINDOWS = 3
_PROMPT, _GENERATE = 32, 32
_BEFORE, _STEPS = 32, 64  # cached decoding starts this far before the attention window is full, and its tokens
_GENAI_WINDOWS = 2
_GENAI_ROOM = 256  # its kernels want room for the attention window


@dataclass(frozen=True, eq=False)
class Expected:
    """What the reference says. `window`: keys that a sliding layer sees; `trained`: length that the rope was made for.

    release     of the windows
    routes      uint16 [layers, N, top_k], the experts of the windows' tokens
    arithmetic  of the windows, by our own forward on the weights in the files
    long        of one sequence [1, T] that goes beyond `trained`; None where the model does not
    further     what else is asked; None for nothing
    """

    release: ReferenceLogits
    routes: U16
    window: int
    trained: int
    arithmetic: ReferenceLogits
    long: ReferenceLogits | None
    further: Further | None = None


def prove_onnx(
    folder: Path,
    graph: Path,
    expected: Expected,
    *,
    provider: str,
    text: texts.Text,
    tokenizer_file: Path,
    chat: Chat | str,
    threads: int,
    limit: Limit | None = None,
    quick: bool = False,
    time_limit: float = 4 * 3600,
    scratch: Path | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """The report on the plain `graph` of an artifact's folder, and on the folder in onnxruntime-genai.

    `chat` is a conversation, or why there is none. Keys: export, release and arithmetic (as export, but
    against our own forward on the weights in the files: no rounding of theirs is in it), as metrics.summary gives;
    cached, chunked, long and router with figures under "export" and "release"; genai; tokenizer_equal and
    tokenizer (of the folder's own file); speed; memory; runtime; not_run: what could not be done and why,
    by key. cached.logit_difference is the largest that decoding or prefill in pieces makes to a logit of
    prefill at once, with float32 activations. `quick`: neither speed nor onnxruntime-genai.
    Raises ExporterError when the graph cannot be run, or not within `time_limit` seconds a process.
    """
    for each in sorted(graph.parent.glob("*.onnx")):  # onnxruntime-genai runs another one
        require_runnable(each, provider)
    tokenizer = texts.load_tokenizer(tokenizer_file)
    pieces = texts.pieces(tokenizer, text)
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=scratch) as exchange:
        files = Exchange(Path(exchange), expected)
        asked = ask(graph, expected, files, provider, threads)
        asked = asked if quick else replace(asked, **_speed(expected))
        report = in_modes(asked, expected, files, time_limit, on_progress, limit)
        report |= compare_tokenizers(tokenizer, texts.load_tokenizer(folder / "tokenizer.json"), pieces)
        if quick:
            report["not_run"]["genai"] = "left out"
            return report
        speed = report["speed"]
        speed["greedy_text"] = tokenizer.decode(speed["greedy_ids"], skip_special_tokens=False)
        question = genai_worker.Request(
            folder=str(folder.absolute()),
            threads=threads,
            context=max(expected.release.tokens.shape[1], expected.window, asked.prefill + asked.steps) + 1,
            provider="cpu" if provider == CPU else "",
            pieces=[p for p in pieces if "\0" not in p],
            chat=chat.messages if isinstance(chat, Chat) else None,
            prompt=(asked.speed or [[]])[0][:_PROMPT],
            plan=asked.plan,
            text=[token for window in asked.speed or [] for token in window],
            windows=asked.windows,
            count=_GENAI_WINDOWS,
            prefill=asked.prefill,
            steps=asked.steps,
            results=str(files.folder / "genai.npz"),
        )
        plain = Plain(files.release(_GENAI_WINDOWS), speed["greedy_ids"])
        kept = limit if provider == CPU else None  # on another device it is not this process that holds the weights
        report |= in_genai(question, tokenizer, chat, plain, report["not_run"], time_limit, on_progress, kept)
    report["memory"]["file_bytes"] = file_bytes(graph)
    return report


def prove_foreign(
    graph: Path,
    expected: Expected,
    *,
    provider: str,
    head_size: int,
    text: texts.Text,
    tokenizer_file: Path,
    own_tokenizer: Path | None,
    threads: int,
    limit: Limit | None = None,
    time_limit: float = 4 * 3600,
    scratch: Path | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """The report on a plain graph that any tool wrote, in ONNX Runtime: as `prove_onnx`, but nothing of its weights.

    Its experts' choices are compared where it has an operator for experts. `head_size`: where the graph leaves it open;
    `own_tokenizer`: the artifact's, None where it has none.
    """
    require_runnable(graph, provider)
    tokenizer = texts.load_tokenizer(tokenizer_file)
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=scratch) as exchange:
        files = Exchange(Path(exchange), expected)
        asked = replace(ask(graph, expected, files, provider, threads), **_speed(expected), head_size=head_size)
        report = in_modes(asked, expected, files, time_limit, on_progress, limit)
    report.pop("arithmetic")
    speed = report["speed"]
    speed["greedy_text"] = tokenizer.decode(speed["greedy_ids"], skip_special_tokens=False)
    if own_tokenizer is not None:
        report |= compare_tokenizers(tokenizer, texts.load_tokenizer(own_tokenizer), texts.pieces(tokenizer, text))
    report["memory"]["file_bytes"] = file_bytes(graph)
    return report


def bench(
    graph: Path,
    tokens: I64,
    plan: Plan,
    *,
    threads: int,
    provider: str = CPU,
    head_size: int = 0,
    time_limit: float = 3600,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Speed and memory of a plain graph as shipped: "speed", "memory", "version", "provider", "load_average".

    tokens int64 [1, n] are what prompts are cut from. `head_size`: of keys and values, where the graph leaves it open.
    """
    require_runnable(graph, provider)
    request = onnx_worker.Request(
        graph=str(graph.absolute()),
        threads=threads,
        provider=provider,
        speed=tokens.tolist(),
        repeats=0,
        plan=plan,
        head_size=head_size,
    )
    return _run(request, time_limit, on_progress)


def bench_genai(
    folder: Path,
    tokens: I64,
    plan: Plan,
    *,
    threads: int,
    provider: str = "",
    time_limit: float = 3600,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """The same of a folder in onnxruntime-genai; see `genai_worker.Request`."""
    request = genai_worker.Request(
        folder=str(folder.absolute()),
        threads=threads,
        context=_GENAI_ROOM,
        provider=provider,
        repeats=0,
        plan=plan,
        text=tokens[0].tolist(),
    )
    return run_genai(request, time_limit, on_progress)


def file_bytes(graph: Path) -> int:
    """Bytes of a graph and of its weights beside it (model.onnx.data, model.onnx_data_1)."""
    return sum(p.stat().st_size for p in graph.parent.iterdir() if p.name.startswith(graph.name))


# ONNX Runtime


class Exchange:
    """References laid into a folder for the workers; its results come there too."""

    def __init__(self, folder: Path, expected: Expected) -> None:
        self.folder = folder
        self.windows, self.arithmetic, self.long = (folder / f"{n}.npz" for n in ("windows", "arithmetic", "long"))
        expected.release.save(self.windows)
        expected.arithmetic.save(self.arithmetic)
        if expected.long is not None:
            expected.long.save(self.long)
        self.length = expected.release.tokens.shape[1]
        self.asked = expected.further.question(folder) if expected.further is not None else {}
        self.asked.get("columns", {}).pop(LONG, None)  # it is asked for in pieces, in both modes

    def of_mode(self, mode: str) -> dict[str, Any]:
        """What one mode is asked further: texts and answers as shipped, known mistakes where nothing is rounded."""
        shipped = ("columns", "prompts", "answer", "ends")
        return {k: v for k, v in self.asked.items() if (k in shipped) == (mode == "release")}

    def results(self, mode: str) -> Path:
        return self.folder / f"{mode}.npz"

    def release(self, windows: int) -> Positions:
        """As shipped: the first windows, then decoding with the cache."""
        with np.load(self.results("release"), allow_pickle=False) as results:
            first = Positions.of(results, "windows").take(slice(0, windows * self.length))
            return Positions.join([first, Positions.of(results, "cached")])


def ask(graph: Path, expected: Expected, files: Exchange, provider: str, threads: int) -> onnx_worker.Request:
    """What every mode is asked: comparisons, no speed."""
    tokens = expected.release.tokens
    prefill = max(1, min(expected.window - _BEFORE, tokens.shape[1] - 1))
    return onnx_worker.Request(
        graph=str(graph.absolute()),
        threads=threads,
        provider=provider,
        windows=str(files.windows),
        long=str(files.long) if expected.long is not None else "",
        prefill=prefill,
        steps=min(_STEPS, tokens.shape[1] - prefill),
        top_k=expected.routes.shape[2],
    )


def _speed(expected: Expected) -> dict[str, Any]:
    """The part of a request that is about speed."""
    windows = expected.release.tokens[:_SPEED_WINDOWS].tolist()
    whole = proof_plan()
    plan = replace(whole, seconds=whole.seconds / 2)  # onnxruntime-genai has the other half
    return {"speed": windows, "prompt": _PROMPT, "generate": _GENERATE, "plan": plan}


def _run(
    request: onnx_worker.Request, time_limit: float, on_progress: OnProgress | None, limit: Limit | None = None
) -> dict[str, Any]:
    request, limit = onnx_worker.under(request, limit)
    return child.run_worker(
        request,
        "exporter.validate.onnx_worker",
        time_limit,
        runtime="onnxruntime",
        subject=Path(request.graph).name,
        environment=environment(request.activations),
        on_progress=on_progress,
        limit=limit,
    )


def in_modes(
    asked: onnx_worker.Request,
    expected: Expected,
    files: Exchange,
    time_limit: float,
    on_progress: OnProgress | None,
    limit: Limit | None = None,
) -> dict[str, Any]:
    """The part of the report that ONNX Runtime alone gives; speed and memory, if asked, are of the graph as shipped.

    `limit`: of the memory of the process that runs it as shipped.
    """
    steps = {"prefill": asked.prefill, "steps": asked.steps}
    report: dict[str, Any] = {
        **dict.fromkeys(("export", "release", "arithmetic")),
        "cached": {**steps, "crosses_window": asked.prefill + asked.steps > expected.window},
        "chunked": {},
        "router": {"choices": int(expected.routes.shape[0] * expected.routes.shape[1])},
        "not_run": {},
    }
    if expected.long is None:
        report["not_run"]["long"] = f"the model takes no more than the {expected.trained:,} tokens it was trained on"
    else:
        report["long"] = {"tokens": expected.long.tokens.size, "trained": expected.trained}
    answers: dict[str, Any] = {}
    for mode, activations in MODES.items():
        request = replace(asked, activations=activations, results=str(files.results(mode)), **files.of_mode(mode))
        if mode != "release":
            request = replace(request, speed=None, arithmetic=str(files.arithmetic))
        answer = _run(request, time_limit, _labelled(on_progress, mode), limit if mode == "release" else None)
        with np.load(request.results, allow_pickle=False) as results:
            _add_mode(report, mode, answer, results, expected)
        if "optimizer_difference" in answer:
            apart = {"relative_difference": _finite(answer["optimizer_difference"])}
            report["optimizer"] = {**report.get("optimizer", {}), mode: apart}
        if mode == "release":
            report |= {key: answer[key] for key in ("speed", "memory") if key in answer}
            report["runtime"] = {
                "name": "onnxruntime",
                "version": answer["version"],
                "provider": answer["provider"],
                "threads": asked.threads,
                "accuracy_level": answer["accuracy_level"],
                "load_average": answer.get("load_average"),
            }
        answers |= {mode: answer.get("answers")}
    if expected.further is not None:
        more = _further(expected, expected.further, files, answers["release"])
        report["not_run"] |= {**expected.further.not_run, **more.pop("not_run", {})}
        report |= more
    differences = [report[name]["export"]["logit_difference"] for name in ("cached", "chunked")]
    report["cached"]["logit_difference"] = None if None in differences else max(differences)
    return report


def _further(expected: Expected, further: Further, files: Exchange, answers: list[list[int]] | None) -> dict[str, Any]:
    """See `further_report`."""
    with np.load(files.results("release"), allow_pickle=False) as results:
        plain = expected.release, Positions.of(results, "windows")
        columns = {
            column.name: {"release": Positions.of(results, LONG if column.name == LONG else f"{column.name}.release")}
            for column in further.columns
        }
    with np.load(files.results("export"), allow_pickle=False) as results:
        base = Positions.of(results, "windows")
        beside = {name: Positions.of(results, PREFIX + name) for name in further.twins}
    return further_report(further, plain, columns, base, beside, answers)


def _labelled(on_progress: OnProgress | None, mode: str) -> OnProgress | None:
    if on_progress is None or mode == "release":
        return on_progress
    tell = on_progress
    return lambda stage, done, total: tell(f"{stage}, float32 activations", done, total)


def _add_mode(
    report: dict[str, Any], mode: str, answer: Mapping[str, Any], results: Mapping[str, Any], expected: Expected
) -> None:
    windows = Positions.of(results, "windows")
    report[mode] = summary(windows)
    if mode == "export":
        report["arithmetic"] = summary(Positions.of(results, "arithmetic"))
    for name in ("cached", "chunked"):
        figures = few(Positions.of(results, name))
        report[name][mode] = {**figures, "logit_difference": _finite(answer[f"{name}_difference"])}
    if "routes" in results:
        report["router"][mode] = flips(expected.routes, results["routes"], windows)
    else:
        report.pop("router", None)
        report["not_run"]["router"] = "the graph has no operator for experts whose choices could be read"
    if expected.long is not None:
        positions = Positions.of(results, "long")
        before = summary(positions.take(slice(0, expected.trained)))
        report["long"][mode] = {**summary(positions.take(slice(expected.trained, None))), "before": before}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def compare_tokenizers(tokenizer: Any, found: Any, pieces: Sequence[str]) -> dict[str, Any]:
    """tokenizer_equal and tokenizer: whether `found` gives the ids that `tokenizer` gives."""
    ids = [[texts.encode(t, piece) for piece in pieces] for t in (tokenizer, found)]
    report = compare_ids(pieces, *ids)
    return {"tokenizer_equal": report["first_difference"] is None, "tokenizer": report}
