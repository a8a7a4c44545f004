"""Proves a GGUF: runs it in llama.cpp, in a child process, and compares it with the reference.

Two references: the arithmetic as released, and as this runtime computes it (it rounds the YaRN
range). An error of the export shows against the second; their distance from each other is a
property of the runtime and gets its own figures.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import ExporterError
from exporter.model.reference import I64, ReferenceLogits
from exporter.validate import llama_cpp, text
from exporter.validate.llama_cpp import FlashAttention, KvType
from exporter.validate.llama_worker import Request
from exporter.validate.metrics import Positions, between, summary

_STDERR_TAIL = 400  # characters of native output quoted in a message


def prove_gguf(
    path: Path,
    *,
    tokens: I64,
    sample: text.Text,
    tokenizer_file: Path,
    release: ReferenceLogits,
    runtime: ReferenceLogits,
    threads: int,
    flash_attention: FlashAttention = "auto",
    kv_type: KvType = "f16",
    context: int = 0,
    time_limit: float = 3600,
    worker: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The report on a GGUF (its first file, if split).

    `tokens` int64 [W, T] are what both references were computed on: `release` with the rope as
    released, `runtime` with `llama_cpp.runtime_rope`. `sample` is the text on which token ids are
    compared with tokenizer_file. Speed and memory are measured with room for `context` tokens.

    Keys: export (against `runtime`), release, runtime_difference (`runtime` against `release`),
    each as metrics.summary gives; tokenizer_equal and tokenizer; speed; memory; runtime.
    Raises ExporterError when the file cannot be run, or not within `time_limit` seconds.
    """
    if not (np.array_equal(tokens, release.tokens) and np.array_equal(tokens, runtime.tokens)):
        raise ValueError("the references are of another text")
    if not path.is_file():
        raise ExporterError(f"{path} is missing", hint="exporter export makes it again")
    tokenizer = text.load_tokenizer(tokenizer_file)
    pieces = text.pieces(tokenizer, sample)
    with tempfile.TemporaryDirectory(prefix="exporter-proof-") as folder:
        work = Path(folder)
        release.save(work / "release.npz")
        runtime.save(work / "export.npz")
        request = Request(
            model=str(path.absolute()),
            references={name: str(work / f"{name}.npz") for name in ("export", "release")},
            results=str(work / "results.npz"),
            pieces=pieces,
            threads=threads,
            flash_attention=flash_attention,
            kv_type=kv_type,
            context=context,
        )
        answer = run_worker(request, time_limit, worker)
        with np.load(work / "results.npz", allow_pickle=False) as results:
            found = {
                name: Positions(**{f: results[f"{name}.{f}"] for f in Positions.__dataclass_fields__})
                for name in request.references
            }
    tokenizer_report = compare_ids(pieces, [text.encode(tokenizer, p) for p in pieces], answer["ids"])
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


def run_worker(request: Request, time_limit: float, command: Sequence[str] | None = None) -> dict[str, Any]:
    """The worker's answer. Its crash, its error or a run beyond `time_limit` seconds is an ExporterError."""
    # -P: a folder called `exporter` in the working directory must not be imported.
    command = command or (sys.executable, "-P", "-m", "exporter.validate.llama_worker")
    name = Path(request.model).name
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        )
        try:
            out, _ = process.communicate(json.dumps(dataclasses.asdict(request)).encode(), timeout=time_limit)
        except subprocess.TimeoutExpired:
            raise ExporterError(
                f"{name} did not finish in llama.cpp within {time_limit:g} s",
                hint="fewer windows or a longer limit; more threads than free cores are slow",
            ) from None
        finally:  # also on Ctrl-C: nothing is left running
            if process.poll() is None:
                process.kill()
                process.communicate()
        errors.seek(0)
        tail = errors.read().decode("utf-8", "replace").strip()[-_STDERR_TAIL:]
    return _answer(name, process.returncode, out, tail)


def _answer(name: str, code: int, out: bytes, tail: str) -> dict[str, Any]:
    try:
        result = json.loads(out)
    except ValueError:
        result = {}
    if "error" in result:
        raise ExporterError(result["error"]["message"], hint=result["error"]["hint"])
    if code == 0 and "answer" in result:
        answer: dict[str, Any] = result["answer"]
        return answer
    how = f"exited with {code}"
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
    hint = "not enough memory?" if code == -signal.SIGKILL else "exporter doctor, then make the file again"
    raise ExporterError(f"llama.cpp {how} while running {name}" + (f": {tail}" if tail else ""), hint=hint)


def _file_bytes(path: Path) -> int:
    """Bytes of a GGUF, all its splits together."""
    stem, middle, count = path.stem.rpartition("-of-")
    if middle and stem[-5:].isdigit() and count.isdigit():
        return sum(p.stat().st_size for p in path.parent.glob(f"{stem[:-5]}?????-of-{count}{path.suffix}"))
    return path.stat().st_size
