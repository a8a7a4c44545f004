"""Proves a TensorRT folder without a GPU: its graphs in ONNX Runtime, and engines of them by TensorRT-RTX.

ONNX Runtime says whether the graphs compute what they should, on the very bytes of the folder; TensorRT-RTX whether
they become engines on each GPU, with weights as packed as they were and attention in one kernel. What an engine
computes only the GPU can say: where one is found that the folder is for, engines run on it; else the report says that
none ran.

A model too large to compute whole here is cut after its first layers, of every kind one.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import ExporterError, MissingExtra
from exporter.model.reference import ReferenceLogits
from exporter.model.torch import import_torch
from exporter.validate import onnx_twin, onnx_worker, tensorrt, tensorrt_gpu_worker
from exporter.validate import text as texts
from exporter.validate.child import OnProgress, run_worker
from exporter.validate.genai import few
from exporter.validate.metrics import Positions, summary
from exporter.validate.onnx_kernels import CPU
from exporter.validate.onnxruntime import Exchange, Expected, ask, compare_tokenizers, in_modes
from exporter.validate.runtime import SCRATCH_PREFIX
from exporter.validate.tensorrt_rules import lint

GRAPHS = ("decode", "prefill")
WORDS = 2048  # of the vocabulary, in engines of a model that is cut: the head is one product however long it is
_COMPUTED = ("arithmetic", "cached", "long", "router", "optimizer")  # what ONNX Runtime's run of the graphs gives
_AGAIN = "exporter quantize ... --overwrite makes it again"
_PROFILES_CAP = 16 << 20


@dataclass(frozen=True)
class Limits:
    """For one engine: seconds, and resident bytes of the process that builds it."""

    seconds: float
    memory: int


def prove_tensorrt(
    folder: Path,
    expected: Expected,
    *,
    layers: int,
    of_layers: int,
    steps: int,
    text: texts.Text,
    tokenizer_file: Path,
    threads: int,
    limits: Limits,
    time_limit: float = 4 * 3600,
    scratch: Path | None = None,
    on_progress: OnProgress | None = None,
    left_out: str = "",
) -> dict[str, Any]:
    """The report on the graphs of a folder, `layers` of the model's `of_layers` of them.

    `left_out`: why they are not computed in ONNX Runtime, "" where they are.

    `expected`: of a model of as many layers; `steps`: tokens to decode one by one, 0 for the usual number.
    Keys as of `onnxruntime.prove_onnx` without speed and genai, and
    rules     {"kept", "findings"}: what the parser's rules say of the graphs
    engines   see `build_engines`
    optimizer {"relative_difference"} in each mode: between ONNX Runtime with and without its rewriting of the graphs
    """
    rules = check_rules(folder)
    tokenizer = texts.load_tokenizer(tokenizer_file)
    pieces = texts.pieces(tokenizer, text)
    cut = layers if layers < of_layers else 0
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=scratch) as exchange:
        files = Exchange(Path(exchange), expected)
        asked = ask(folder / "prefill.onnx", expected, files, CPU, threads)
        single = str((folder / "decode.onnx").absolute())
        asked = replace(asked, single=single, optimizer=True, layers=cut)
        if steps:
            prefill, steps = _around_the_window(expected, steps)
            asked = replace(asked, prefill=prefill, steps=steps)
        report: dict[str, Any] = {
            "not_run": dict.fromkeys(_COMPUTED, left_out),
            "runtime": {"name": "exporter reference"},
        }
        if not left_out:
            report = in_modes(asked, expected, files, time_limit, on_progress)
        report |= compare_tokenizers(tokenizer, texts.load_tokenizer(folder / "tokenizer.json"), pieces)
        report |= {"rules": rules, "depth": {"layers": layers, "of": of_layers}}
        try:
            report["engines"] = build_engines(folder, cut, limits, scratch, on_progress)
            asked = replace(asked, arithmetic=str(files.arithmetic))
            report["gpu"] = run_engines(folder, cut, asked, files.folder, limits, on_progress)
        except MissingExtra as missing:
            report["not_run"]["engines"] = f"no engine was built: {missing.message} ({missing.hint})"
            report["not_run"]["gpu"] = "no engine was executed: none was built"
        except _NotRun as reason:
            report["not_run"]["gpu"] = f"no engine was executed: {reason}"
    executed = "gpu" in report and "error" not in report["gpu"]
    report["runtime"] |= {"executed_on_target": executed, "executed_on_gpu": executed}
    return report


def _around_the_window(expected: Expected, steps: int) -> tuple[int, int]:
    """Tokens at once and then one by one, few: half of these while a window sees all that came before, half after."""
    length = expected.release.tokens.shape[1]
    prefill = max(1, min(expected.window - steps // 2, length - steps))
    return prefill, min(steps, length - prefill)


def check_rules(folder: Path) -> dict[str, Any]:
    """Whether the graphs keep the rules of TensorRT's parser on every GPU that they are for, and what was found."""
    sms, _ = read_profiles(folder)
    findings, kept = [], True
    for graph in GRAPHS:
        for found in lint(folder / f"{graph}.onnx"):
            broken = sorted(set(found.sms) & set(sms)) if found.fatal else []
            kept &= not broken
            if broken or not found.fatal:
                what = {"rule": found.rule, "where": found.where, "problem": found.problem}
                findings.append({"graph": graph, **what, "sms": broken})
    return {"kept": kept, "findings": findings}


def read_profiles(folder: Path) -> tuple[list[int], dict[str, tensorrt.Shapes]]:
    """Compute capabilities and shapes by graph, from profiles.json. Raises ExporterError where it is no such file."""
    path = folder / "profiles.json"
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        if path.stat().st_size > _PROFILES_CAP:
            raise ValueError("it is too large")
        body = json.loads(path.read_text())
        sms = [int(sm) for sm in body["sms"]]
        shapes = {
            graph: {name: tuple(list(map(int, each[k])) for k in ("min", "opt", "max")) for name, each in found.items()}
            for graph, found in body["graphs"].items()
        }
        if not sms:
            raise ValueError("it names no compute capability")
        if set(shapes) != set(GRAPHS):
            raise ValueError(f"it has no {' and '.join(GRAPHS)}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ExporterError(f"{path}: no shapes for engines in it ({error})", hint=_AGAIN) from error
    return sms, shapes  # type: ignore[return-value]


def build_engines(
    folder: Path, cut: int, limits: Limits, scratch: Path | None, on_progress: OnProgress | None
) -> dict[str, Any]:
    """Every graph for every compute capability of profiles.json, each in a process of its own.

    "built": whether all were; "expansion": the largest share of quantized weights that one of them holds in more bits
    than the file; "fused": whether each computes the attention of every layer in a fused kernel; "builds": each with
    what `tensorrt.build` gives; "version"; "layers" that were built, and the "vocabulary" where it was cut.
    `cut`: only the first layers, 0 for all.
    Raises as `tensorrt.version` does.
    """
    version, (sms, shapes) = tensorrt.version(), read_profiles(folder)
    builds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=scratch) as made:
        for graph, path, layers in _graphs(folder, cut, Path(made)):
            inputs = {name: each for name, each in shapes[graph].items() if onnx_twin.cache_layer(name) < layers}
            for sm in sms:
                if on_progress:
                    on_progress(f"{graph} engine for SM{sm}", len(builds), len(sms) * len(GRAPHS))
                build = tensorrt.build(path, inputs, sm, time_limit=limits.seconds, memory_limit=limits.memory)
                fused = build["built"] and build["fused_attention"] >= layers
                builds.append({"graph": graph, **build, **({"fused": fused} if build["built"] else {})})
    built = all(b["built"] for b in builds)
    return {
        "version": version,
        "layers": layers,
        "vocabulary": WORDS if cut else None,
        "built": built,
        "expansion": max(b["expansion"] for b in builds) if built else None,
        "fused": built and all(b["fused"] for b in builds),
        "seconds": sum(b.get("cpu_seconds", 0.0) for b in builds),
        "peak_rss_bytes": max((b.get("peak_rss_bytes") or 0 for b in builds), default=0),
        "builds": builds,
    }


def run_engines(
    folder: Path, cut: int, asked: onnx_worker.Request, made: Path, limits: Limits, on_progress: OnProgress | None
) -> dict[str, Any]:
    """What engines for the GPU of this machine compute on it, against our own forward on the same weights.

    Figures of the windows; "cached" ones; "layers" of them; "decode_buffer_bytes" and "prefill_buffer_bytes" beside
    weights and cache. "error" in their place where engines for it do not build or run. `asked`: what ONNX Runtime was
    asked to compare. Raises _NotRun where there is no GPU that the engines are for, or no way to feed it.
    """
    found = tensorrt.gpu()
    if found is None:
        raise _NotRun("there is no NVIDIA GPU here")
    (name, sm), (sms, shapes) = found, read_profiles(folder)
    if sm not in sms:
        raise _NotRun(f"the engines are for SM{', SM'.join(map(str, sms))}, and {name} is SM{sm}")
    if not import_torch().cuda.is_available():
        raise _NotRun("torch here has no CUDA, through which engines are fed")
    of: dict[str, Any] = {"name": name, "sm": sm}
    engines = {}
    for graph, path, layers in _graphs(folder, cut, made, words=0):
        engines[graph] = made / f"{graph}.engine"
        inputs = {each: shapes[graph][each] for each in shapes[graph] if onnx_twin.cache_layer(each) < layers}
        build = tensorrt.build(
            path, inputs, sm, time_limit=limits.seconds, memory_limit=limits.memory, keep=engines[graph]
        )
        if not build["built"]:
            return {**of, "error": f"{graph}: {build['error']}"}
    room = shapes["decode"]["past_key_values.0.key"][2][2] + 1
    length = min(room, ReferenceLogits.load(Path(asked.arithmetic)).tokens.shape[1])
    first = max(1, min(asked.prefill, length - asked.steps))
    request = tensorrt_gpu_worker.Request(
        prefill=str(engines["prefill"]),
        decode=str(engines["decode"]),
        expected=asked.arithmetic,
        results=str(made / "gpu.npz"),
        sm=sm,
        chunk=shapes["prefill"]["input_ids"][2][1],
        length=length,
        first=first,
        steps=min(asked.steps, length - first),
    )
    try:
        answer = run_worker(
            request,
            "exporter.validate.tensorrt_gpu_worker",
            limits.seconds,
            runtime="TensorRT-RTX",
            subject=f"the engines on {name}",
            environment={"CUDA_DEVICE_ORDER": "PCI_BUS_ID"},  # nvidia-smi's
            on_progress=on_progress,
        )
    except ExporterError as error:
        return {**of, "error": error.message}
    with np.load(request.results, allow_pickle=False) as results:
        windows, cached = (Positions.of(results, each) for each in ("windows", "cached"))
    return {**of, "layers": layers, **summary(windows), "cached": few(cached), **answer}


class _NotRun(Exception):
    """Why engines were not executed."""


def _graphs(folder: Path, cut: int, made: Path, words: int = WORDS) -> Iterator[tuple[str, Path, int]]:
    """Name, file and layers of each graph; those that are cut lie in `made`, beside links to the weights.

    They are cut to `words` of the vocabulary as well, 0 for all.
    """
    import onnx

    for graph in GRAPHS:
        path = folder / f"{graph}.onnx"
        model = onnx.load(str(path), load_external_data=False)
        layers = sum(value.name.endswith(".key") for value in model.graph.output)
        if not cut:
            yield graph, path, layers
            continue
        onnx_twin.cut(model, cut)
        if words:
            onnx_twin.cut_vocabulary(model, words)
        for name in {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}:
            if not (made / name).exists():
                os.symlink((folder / name).absolute(), made / name)
        onnx.save(model, str(made / path.name))
        yield graph, made / path.name, cut
