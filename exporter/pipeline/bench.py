"""How fast an artifact runs here, and in how much memory: one run in each runtime that can, one after another."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import ExporterError, Refused, UsageError, did_you_mean
from exporter.formats.onnx.external import read_initializers
from exporter.pipeline.machine import runtime_threads, usable_cpus
from exporter.pipeline.progress import Progress, worker_stages
from exporter.pipeline.prove_onnx import PROVIDERS, missing_provider
from exporter.validate import child, onnxruntime, text
from exporter.validate.child import OnProgress
from exporter.validate.onnx_kernels import CPU
from exporter.validate.onnx_rules import require_runnable
from exporter.validate.onnx_session import import_onnxruntime
from exporter.validate.runtime import bench_gguf
from exporter.validate.text import I64

_CONFIG = "genai_config.json"
_CONFIG_CAP = 1 << 20  # bytes
_HOURS = 4 * 3600.0  # seconds that one runtime may take
_IDS = 1000  # made-up tokens are below this


@dataclass(frozen=True)
class Subject:
    """What to run. graph: the plain graph, or the GGUF. folder: where its tokenizer and genai_config.json are.

    genai: the graph that genai_config.json names, None without one. device: what it was made for. head_size: of keys
    and values, context: tokens that the model takes, as it says; 0 where it does not.
    """

    format: str
    folder: Path
    graph: Path
    genai: Path | None = None
    device: str = "cpu"
    head_size: int = 0
    context: int = 0


@dataclass(frozen=True)
class Ask:
    """`prompt` tokens at once, then `generate` greedy ones, `repeats` times. threads 0: as many as suit the machine."""

    prompt: int = 512
    generate: int = 64
    repeats: int = 3
    threads: int = 0
    provider: str = "auto"


def find_subject(path: Path) -> Subject:
    """The artifact at `path`: a folder of ours, a folder with genai_config.json, a graph or a GGUF."""
    if path.is_file() and path.suffix == ".gguf":
        return Subject("gguf", path.parent, path)
    if path.is_file() and path.suffix == ".onnx":
        folder = path.parent.parent if path.parent.name == "onnx" else path.parent
        return _onnx(folder, path)
    if not path.is_dir():
        what = "is not an artifact" if path.exists() else "does not exist"
        raise UsageError(f"{path} {what}", hint="a folder that `exporter quantize` made, a .gguf or an .onnx file")
    plain, web = path / "model.onnx", sorted(path.glob("onnx/*.onnx"))
    if plain.is_file():  # genai_config.json may name another graph, with another cache
        return _onnx(path, plain)
    if (path / _CONFIG).is_file() or len(web) == 1:
        return _onnx(path, web[0] if len(web) == 1 else None)
    files = sorted(path.glob("*.gguf"))
    if len(web) > 1 and not files:
        raise UsageError(f"{path / 'onnx'} has several graphs", hint=f"one of them: {web[0]}")
    if not files or (len(files) > 1 and "-00001-of-" not in files[0].name):
        if (path / "decode.onnx").exists():
            raise Refused(
                f"{path} is for TensorRT, which runs on an NVIDIA GPU only", hint="its README.md has the command lines"
            )
        what = "several GGUF files" if files else "no .onnx and no .gguf file"
        raise UsageError(f"{path} has {what}", hint="a folder that `exporter quantize` made, or one file")
    return Subject("gguf", path, files[0])


def _onnx(folder: Path, graph: Path | None) -> Subject:
    config = _genai_config(folder)
    named = config.get("filename")
    genai = folder / named if isinstance(named, str) else None
    graph = graph or genai
    if graph is None:
        raise UsageError(f"{folder / _CONFIG} names no graph", hint="model.decoder.filename is where it should be")
    devices = [name.lower() for each in config.get("providers", []) for name in each]
    device = next((d for d in devices if d in PROVIDERS), "cpu")
    size, context = (_count(config.get(key)) for key in ("head_size", "context_length"))
    return Subject("onnx", folder, graph, genai, device, size, context)


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _genai_config(folder: Path) -> dict[str, Any]:
    """context_length; filename, head_size and providers of its decoder; empty without the file."""
    path = folder / _CONFIG
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > _CONFIG_CAP:
            raise ValueError
        model = json.loads(path.read_bytes())["model"]
        decoder = model["decoder"]
        options = decoder.get("session_options", {}).get("provider_options", [])
        known = {key: decoder.get(key) for key in ("filename", "head_size")}
        known["context_length"] = model.get("context_length")
        return {**known, "providers": [o for o in options if isinstance(o, dict)]}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UsageError(f"{path} cannot be read", hint="it is no configuration of onnxruntime-genai") from None


def bench(subject: Subject, ask: Ask, progress: Progress) -> dict[str, Any]:
    """`runs`, one for each runtime, and `not_run`: the others, with the reason.

    A run: runtime, version, provider, load_seconds, prefill and decode (median, low, high and every run, in
    tokens per second; None where it does not say), peak_rss_bytes.
    Raises the first reason where nothing runs.
    """
    _require_sound(subject, ask)
    threads = ask.threads or runtime_threads()
    report: dict[str, Any] = {
        "artifact": str(subject.graph),
        "format": subject.format,
        "prompt_tokens": ask.prompt,
        "generated_tokens": ask.generate,
        "repeats": ask.repeats,
        "threads": threads,
        "usable_cpus": usable_cpus(),
        "load_average_before": child.load_average(),
    }
    runtimes = _in_llama(subject, ask, threads) if subject.format == "gguf" else _in_onnx(subject, ask, threads)
    runs: list[dict[str, Any]] = []
    failed: dict[str, ExporterError] = {}
    for name, measure in runtimes.items():
        try:
            runs.append({"runtime": name, **measure(worker_stages(progress, name))})
        except ExporterError as error:
            failed[name] = error
        progress.done()
    if not runs:
        raise next(iter(failed.values()))
    return {**report, "runs": runs, "not_run": {name: error.message for name, error in failed.items()}}


def _require_sound(subject: Subject, ask: Ask) -> None:
    """Refuse what no runtime should be asked for: more than the model takes, and data of ours that are not whole.

    What other tools made may lie behind links, as a cache of downloads does.
    """
    if subject.context and ask.prompt + ask.generate > subject.context:
        raise UsageError(
            f"{ask.prompt:,} and {ask.generate:,} tokens are more than the {subject.context:,} that the model takes",
            hint="a smaller --prompt or --tokens",
        )
    if subject.format == "onnx" and (subject.folder / "manifest.json").is_file():
        for graph in dict.fromkeys((subject.graph, subject.genai or subject.graph)):
            read_initializers(graph, subject.folder)


Measure = Callable[[OnProgress], dict[str, Any]]


def _in_llama(subject: Subject, ask: Ask, threads: int) -> dict[str, Measure]:
    if ask.provider not in ("auto", "cpu"):
        raise UsageError(f"llama.cpp runs on the CPU here, not on {ask.provider}", hint="--provider cpu")

    def measure(on_progress: OnProgress) -> dict[str, Any]:
        answer = bench_gguf(
            subject.graph,
            threads=threads,
            prompt=ask.prompt,
            generate=ask.generate,
            repeats=ask.repeats,
            time_limit=_HOURS,
            on_progress=on_progress,
        )
        return _run(answer, "cpu", answer["speed"])

    return {"llama.cpp": measure}


def _in_onnx(subject: Subject, ask: Ask, threads: int) -> dict[str, Measure]:
    device, provider = _provider(subject, ask.provider)
    tokens = _tokens(subject, ask)
    settings: dict[str, Any] = {"threads": threads, "generate": ask.generate, "repeats": ask.repeats}

    def plain(on_progress: OnProgress) -> dict[str, Any]:
        answer = onnxruntime.bench(
            subject.graph,
            tokens,
            provider=provider,
            prompt=ask.prompt,
            head_size=subject.head_size,
            time_limit=_HOURS,
            on_progress=on_progress,
            **settings,
        )
        return _run(answer, device, answer["speed"])

    def genai(on_progress: OnProgress) -> dict[str, Any]:
        if subject.genai is None:
            raise Refused(f"{subject.folder} has no {_CONFIG}", hint="exporter quantize ... writes one")
        require_runnable(subject.genai, provider)
        own = "cpu" if provider == CPU else ""
        answer = onnxruntime.bench_genai(
            subject.folder,
            tokens[:1],
            provider=own,
            context=max(ask.prompt + ask.generate + 1, 256),  # its kernels want room for the attention window
            time_limit=_HOURS,
            on_progress=on_progress,
            **settings,
        )
        return _run(answer, device if own else "as configured", answer)

    return {"onnxruntime": plain, "onnxruntime-genai": genai}


def _provider(subject: Subject, asked: str) -> tuple[str, str]:
    """(device, the runtime's name of its provider): as asked; by itself, the artifact's own where it is here."""
    if asked != "auto" and asked not in PROVIDERS:
        raise UsageError(
            f'no provider "{asked}".{did_you_mean(asked, PROVIDERS)}', hint=f"auto, {', '.join(PROVIDERS)}"
        )
    here = import_onnxruntime().get_available_providers()
    if asked == "auto":
        asked = subject.device if PROVIDERS[subject.device] in here else "cpu"
    elif PROVIDERS[asked] not in here:
        raise Refused(missing_provider(asked), hint="--provider cpu")
    return asked, PROVIDERS[asked]


def _tokens(subject: Subject, ask: Ask) -> I64:
    """int64 [repeats, prompt]: held-out text, or numbers where the folder has no tokenizer."""
    tokenizer = subject.folder / "tokenizer.json"
    if tokenizer.is_file():
        return text.windows(tokenizer, text.standard_library(), ask.repeats, ask.prompt).tokens
    return np.random.default_rng(0).integers(1, _IDS, (ask.repeats, ask.prompt))


def _run(answer: Mapping[str, Any], provider: str, speed: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "version": answer["version"],
        "provider": provider,
        "load_seconds": speed["load_seconds"],
        "prefill": _spread(speed.get("prefill_runs")),
        "decode": _spread(speed.get("decode_runs")),
        "peak_rss_bytes": answer["memory"]["peak_rss_bytes"],
    }


def _spread(runs: list[float] | None) -> dict[str, Any] | None:
    """Tokens per second of some runs."""
    return {"median": statistics.median(runs), "low": min(runs), "high": max(runs), "runs": runs} if runs else None
