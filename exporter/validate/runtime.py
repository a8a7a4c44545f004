"""Proves a GGUF: runs it in llama.cpp, in a child process, and compares it with the reference.

Two references: the arithmetic as released, and as this runtime computes it (it rounds the YaRN
range). An error of the export shows against the second; their distance from each other is a
property of the runtime and gets its own figures.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import ExporterError
from exporter.model.reference import I64, ReferenceLogits
from exporter.validate import child, llama_cpp, speed
from exporter.validate import text as texts
from exporter.validate.accuracy import Further, further_report
from exporter.validate.child import OnProgress
from exporter.validate.limits import Limit
from exporter.validate.llama_cpp import FlashAttention, KvType
from exporter.validate.llama_worker import Request
from exporter.validate.metrics import Positions, between, flips, summary
from exporter.validate.twins import PREFIX

SCRATCH_PREFIX = ".proof-"
_QUICK = {"generate": 0, "repeats": 1}


def prove_gguf(
    path: Path,
    *,
    tokens: I64,
    text: texts.Text,
    tokenizer_file: Path,
    release: ReferenceLogits,
    runtime: ReferenceLogits,
    threads: int,
    further: Further | None = None,
    limit: Limit | None = None,
    flash_attention: FlashAttention = "auto",
    kv_type: KvType = "f16",
    context: int = 0,
    quick: bool = False,
    time_limit: float = 4 * 3600,
    scratch: Path | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """The report on a GGUF (its first file, if split); `quick`: with next to nothing of its speed.

    `tokens` int64 [W, T] are what both references were computed on: `release` with the rope as
    released, `runtime` with `llama_cpp.runtime_rope`. `text` is what they are from; the runtime's
    token ids of pieces of it must equal tokenizer_file's. Speed and memory are measured with room
    for `context` tokens.

    Keys: export (against `runtime`), release, runtime_difference (`runtime` against `release`),
    each as metrics.summary gives; tokenizer_equal and tokenizer; speed; memory; runtime. `further` (its twins of
    `runtime`) adds what accuracy.further_report gives, and router.
    `scratch`: where a folder for the exchange with the worker is made; a killed run leaves it there.
    Raises ExporterError when the file cannot be run, or not within `time_limit` seconds.
    """
    if not (np.array_equal(tokens, release.tokens) and np.array_equal(tokens, runtime.tokens)):
        raise ValueError("the references are of another text")
    if not path.is_file():
        raise ExporterError(f"{path} is missing", hint="exporter quantize ... --overwrite makes it again")
    tokenizer = texts.load_tokenizer(tokenizer_file)
    pieces = texts.pieces(tokenizer, text)
    references = {"export": runtime, "release": release}
    settings: dict[str, Any] = {"flash_attention": flash_attention, "kv_type": kv_type, "context": context}
    settings |= _QUICK if quick else {"plan": replace(speed.proof_plan(), context=context)}
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=scratch) as folder:
        if further is not None:
            settings |= further.question(Path(folder))
        beside = settings.pop("twins", {})
        request = _request(path, Path(folder), references, beside, pieces=pieces, threads=threads, **settings)
        answer = run_worker(request, time_limit, on_progress=on_progress, limit=limit)
        found = {name: each for name, each in _results(request).items() if name in references}
        more = _further(request, further, release, found, answer) if further is not None else {}
    tokenizer_report = compare_ids(pieces, [texts.encode(tokenizer, p) for p in pieces], answer["ids"])
    return {
        **{name: summary(positions) for name, positions in found.items()},
        "runtime_difference": summary(between(release, runtime)),
        "tokenizer_equal": tokenizer_report["first_difference"] is None,
        "tokenizer": tokenizer_report,
        "speed": answer["speed"],
        "memory": {**answer["memory"], "file_bytes": _file_bytes(path)},
        "runtime": _runtime(answer, settings, threads),
        **more,
    }


def _runtime(answer: Mapping[str, Any], settings: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """What ran it, and how."""
    return {
        "name": "llama.cpp",
        "via": f"xllamacpp {llama_cpp.VERSION}",
        "version": answer["version"],
        "system": answer["system"],
        "threads": threads,
        "gpu_layers": 0,
        "flash_attention": settings["flash_attention"],
        "kv_type": settings["kv_type"],
        "load_average": answer["load_average"],
    }


def _further(
    request: Request,
    further: Further,
    release: ReferenceLogits,
    found: Mapping[str, Positions],
    answer: Mapping[str, Any],
) -> dict[str, Any]:
    with np.load(request.results, allow_pickle=False) as results:
        columns = {
            column: {name: Positions.of(results, f"{column}.{name}") for name in files}
            for column, files in request.columns.items()
        }
        beside = {name: Positions.of(results, PREFIX + name) for name in further.twins}
        routes = results.get("routes")
    report = further_report(further, (release, found["release"]), columns, found["export"], beside, answer["answers"])
    report["not_run"] = {**further.not_run, **report.get("not_run", {})}
    if routes is None:
        report["not_run"]["router"] = answer["no_routes"]
    elif further.routes is not None:
        report["router"] = {"choices": int(routes.shape[0] * routes.shape[1])}
        report["router"]["release"] = flips(further.routes, routes, found["release"])
    return report


def bench_gguf(
    path: Path,
    plan: speed.Plan,
    *,
    threads: int,
    time_limit: float = 3600,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Speed and memory of a GGUF on held-out text, by a plan alone: "speed" as speed.extended gives it.

    Also "memory", "version", "load_average", as in the report on a proof.
    """
    request = Request(
        model=str(path.absolute()),
        references={},
        results="",
        pieces=[],
        threads=threads,
        length=speed.PROMPT_TEXT,
        repeats=0,
        plan=plan,
    )
    return run_worker(request, time_limit, on_progress=on_progress)


def _request(
    path: Path, folder: Path, references: Mapping[str, ReferenceLogits], beside: Mapping[str, str], **settings: Any
) -> Request:
    """What the worker is asked, with the references laid into `folder` for it; those `beside` are there already."""
    files = {name: folder / f"{name}.npz" for name in references}
    for name, logits in references.items():
        logits.save(files[name])
    named = {name: str(file) for name, file in files.items()} | dict(beside)
    return Request(model=str(path.absolute()), references=named, results=str(folder / "results.npz"), **settings)


def _results(request: Request) -> dict[str, Positions]:
    """The comparison of every position with each reference, as the worker wrote it."""
    with np.load(request.results, allow_pickle=False) as results:
        return {name: Positions.of(results, name) for name in request.references}


def compare_ids(pieces: Sequence[str], expected: Sequence[list[int]], found: Sequence[list[int]]) -> dict[str, Any]:
    """How many ids were compared, and the first piece of text on which they differ (None: none)."""
    checked = {"pieces": len(pieces), "ids": sum(map(len, expected))}
    for piece, wanted, got in zip(pieces, expected, found, strict=True):
        if wanted != got:
            same = next((i for i, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b), -1)
            at = same if same >= 0 else min(len(wanted), len(got))
            near = {"text": piece[:200], "at": at, "expected": wanted[at : at + 8], "found": got[at : at + 8]}
            return {**checked, "first_difference": near}
    return {**checked, "first_difference": None}


def run_worker(
    request: Request,
    time_limit: float,
    command: Sequence[str] | None = None,
    on_progress: OnProgress | None = None,
    limit: Limit | None = None,
) -> dict[str, Any]:
    """The llama.cpp worker's answer; see `child.run_worker`."""
    return child.run_worker(
        request,
        "exporter.validate.llama_worker",
        time_limit,
        runtime="llama.cpp",
        subject=Path(request.model).name,
        command=command,
        on_progress=on_progress,
        limit=limit,
    )


def _file_bytes(path: Path) -> int:
    """Bytes of a GGUF, all its splits together (PREFIX-00001-of-00003.gguf)."""
    if split := re.fullmatch(r"(.*-)\d{5}(-of-(\d{5}))", path.stem):
        prefix, suffix, count = split.groups()
        parts = [path.with_name(f"{prefix}{i:05d}{suffix}{path.suffix}") for i in range(1, int(count) + 1)]
        return sum(part.stat().st_size for part in parts)
    return path.stat().st_size
