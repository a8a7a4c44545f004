"""Proves a GGUF: runs it in llama.cpp, in a child process, and compares it with the reference.

Two references: the arithmetic as released, and as this runtime computes it (it rounds the YaRN
range). An error of the export shows against the second; their distance from each other is a
property of the runtime and gets its own figures.
"""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from exporter.errors import ExporterError
from exporter.model.reference import I64, ReferenceLogits
from exporter.validate import llama_cpp
from exporter.validate import text as texts
from exporter.validate.llama_cpp import FlashAttention, KvType
from exporter.validate.llama_worker import Request
from exporter.validate.metrics import Positions, between, summary

SCRATCH_PREFIX = ".proof-"
# (stage, done, total), as the worker gets on.
OnProgress = Callable[[str, int, int], None]


def prove_gguf(
    path: Path,
    *,
    tokens: I64,
    text: texts.Text,
    tokenizer_file: Path,
    release: ReferenceLogits,
    runtime: ReferenceLogits,
    threads: int,
    flash_attention: FlashAttention = "auto",
    kv_type: KvType = "f16",
    context: int = 0,
    time_limit: float = 3600,
    scratch: Path | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """The report on a GGUF (its first file, if split).

    `tokens` int64 [W, T] are what both references were computed on: `release` with the rope as
    released, `runtime` with `llama_cpp.runtime_rope`. `text` is what they are from; the runtime's
    token ids of pieces of it must equal tokenizer_file's. Speed and memory are measured with room
    for `context` tokens.

    Keys: export (against `runtime`), release, runtime_difference (`runtime` against `release`),
    each as metrics.summary gives; tokenizer_equal and tokenizer; speed; memory; runtime.
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
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=scratch) as folder:
        request = _request(path, Path(folder), references, pieces=pieces, threads=threads, **settings)
        answer = run_worker(request, time_limit, on_progress=on_progress)
        found = _results(request)
    tokenizer_report = compare_ids(pieces, [texts.encode(tokenizer, p) for p in pieces], answer["ids"])
    return {
        **{name: summary(positions) for name, positions in found.items()},
        "runtime_difference": summary(between(release, runtime)),
        "tokenizer_equal": tokenizer_report["first_difference"] is None,
        "tokenizer": tokenizer_report,
        "speed": answer["speed"],
        "memory": {**answer["memory"], "file_bytes": _file_bytes(path)},
        "runtime": {
            "name": "llama.cpp",
            "via": f"xllamacpp {llama_cpp.VERSION}",
            "version": answer["version"],
            "system": answer["system"],
            "threads": threads,
            "gpu_layers": 0,
            "flash_attention": flash_attention,
            "kv_type": kv_type,
            "load_average": answer["load_average"],
        },
    }


def _request(path: Path, folder: Path, references: Mapping[str, ReferenceLogits], **settings: Any) -> Request:
    """What the worker is asked, with the references laid into `folder` for it."""
    files = {name: folder / f"{name}.npz" for name in references}
    for name, logits in references.items():
        logits.save(files[name])
    named = {name: str(file) for name, file in files.items()}
    return Request(model=str(path.absolute()), references=named, results=str(folder / "results.npz"), **settings)


def _results(request: Request) -> dict[str, Positions]:
    """The comparison of every position with each reference, as the worker wrote it."""
    with np.load(request.results, allow_pickle=False) as results:
        return {
            name: Positions(**{f: results[f"{name}.{f}"] for f in Positions.__dataclass_fields__})
            for name in request.references
        }


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
) -> dict[str, Any]:
    """The worker's answer. Its crash, its error or a run beyond `time_limit` seconds is an ExporterError.

    `on_progress` is called from another thread.
    """
    # -P: a folder called `exporter` in the working directory must not be imported.
    command = command or (sys.executable, "-P", "-m", "exporter.validate.llama_worker")
    name = Path(request.model).name
    with tempfile.TemporaryFile() as question, tempfile.TemporaryFile() as errors:
        question.write(json.dumps(dataclasses.asdict(request)).encode())
        question.seek(0)
        with subprocess.Popen(
            command, stdin=question, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        ) as process:
            result: dict[str, Any] = {}
            reader = threading.Thread(target=_listen, args=(process.stdout, result, on_progress), daemon=True)
            reader.start()
            try:
                process.wait(time_limit)
            except subprocess.TimeoutExpired:
                raise ExporterError(
                    f"{name} did not finish in llama.cpp within {time_limit:g} s",
                    hint="fewer windows or a longer limit; more threads than free cores are slow",
                ) from None
            finally:  # also on Ctrl-C: nothing is left running
                process.kill()
                process.wait()
                reader.join()
        errors.seek(0)
        said = errors.read().decode("utf-8", "replace")
    return _answer(name, process.returncode, result, said)


def _listen(lines: IO[bytes], result: dict[str, Any], on_progress: OnProgress | None) -> None:
    """Read JSON lines until the worker ends; the last that is not progress is the result."""
    for line in lines:
        try:
            message = json.loads(line)
        except ValueError:
            continue
        if not isinstance(message, dict):
            continue
        if "progress" not in message:
            result.update(message)
        elif on_progress:
            on_progress(*message["progress"])


def _answer(name: str, code: int, result: dict[str, Any], said: str) -> dict[str, Any]:
    if "error" in result:
        raise ExporterError(result["error"]["message"], hint=result["error"]["hint"])
    if code == 0 and "answer" in result:
        answer: dict[str, Any] = result["answer"]
        return answer
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
    hint = "not enough memory?" if code == -signal.SIGKILL else "exporter doctor, then make the file again"
    reason = _last_words(said)
    raise ExporterError(f"llama.cpp {how} while running {name}" + (f": {reason}" if reason else ""), hint=hint)


def _last_words(said: str) -> str:
    """The line of native output that tells most: the last that speaks of an error, else the last."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if "rror" in line or "GGML_ASSERT" in line]
    return (telling or lines or [""])[-1][:300]


def _file_bytes(path: Path) -> int:
    """Bytes of a GGUF, all its splits together (PREFIX-00001-of-00003.gguf)."""
    if split := re.fullmatch(r"(.*-)\d{5}(-of-(\d{5}))", path.stem):
        prefix, suffix, count = split.groups()
        parts = [path.with_name(f"{prefix}{i:05d}{suffix}{path.suffix}") for i in range(1, int(count) + 1)]
        return sum(part.stat().st_size for part in parts)
    return path.stat().st_size
