"""How fast an artifact runs here, and in how much memory: one run in each runtime that can, one after another."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
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
from exporter.validate.hardware import hardware
from exporter.validate.onnx_kernels import CPU
from exporter.validate.onnx_rules import require_runnable
from exporter.validate.onnx_session import import_onnxruntime
from exporter.validate.runtime import bench_gguf
from exporter.validate.speed import PROMPT_TEXT, Plan
from exporter.validate.text import I64

_CONFIG = "genai_config.json"
_CONFIG_CAP = 1 << 20  # bytes
_REPORT_CAP = 64 << 20  # bytes
_HOURS = 4 * 3600.0  # seconds that one runtime may take beside its tests
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
    """Prompts of so many tokens, then `generate` tokens at each of `depths`; see speed.Plan.

    seconds: for all the tests of one runtime. threads 0: as many as suit the machine.
    """

    prompts: Sequence[int] = (512, 2048)
    generate: int = 64
    depths: Sequence[int] = (0, 8192, 32768)
    repeats: int = 3
    seconds: float = 600.0
    threads: int = 0
    provider: str = "auto"

    def plan(self, context: int = 0) -> Plan:
        return Plan(self.prompts, self.generate, self.depths, self.repeats, self.seconds, context)


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

    A run: runtime, version, provider, load_seconds, ttft_seconds (from a prompt of `ttft_prompt` tokens to its first
    token), `tests` and `not_run` of speed.extended, the first prompt and the first generation of them as `prefill`
    and `decode` (median, low, high and every run, in tokens per second), peak_rss_bytes of all tests together, and
    predicted_memory_bytes where the artifact's report has what was planned for its profile.
    Raises the first reason where nothing runs.
    """
    _require_sound(subject, ask)
    threads = ask.threads or runtime_threads()
    report: dict[str, Any] = {
        "artifact": str(subject.graph),
        "format": subject.format,
        "prompt_tokens": ask.prompts[0],
        "prompts": list(ask.prompts),
        "generated_tokens": ask.generate,
        "depths": list(ask.depths),
        "repeats": ask.repeats,
        "seconds": ask.seconds,
        "threads": threads,
        "usable_cpus": usable_cpus(),
        "load_average_before": child.load_average(),
        "hardware": hardware(),
    }
    if predicted := _predicted(subject.folder):
        report["predicted_memory"] = predicted
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
    """Refuse what no runtime should be asked for: only more than the model takes, and data of ours that are not whole.

    What other tools made may lie behind links, as a cache of downloads does.
    """
    shortest = min([*ask.prompts, *(max(depth, 1) + ask.generate for depth in ask.depths)])
    if subject.context and shortest > subject.context:
        raise UsageError(
            f"{shortest:,} tokens are more than the {subject.context:,} that the model takes",
            hint="a smaller --prompt or --tokens",
        )
    if subject.format == "onnx" and (subject.folder / "manifest.json").is_file():
        for graph in dict.fromkeys((subject.graph, subject.genai or subject.graph)):
            read_initializers(graph, subject.folder)


def _predicted(folder: Path) -> dict[str, Any]:
    """`total` bytes and `context` of the plan that the artifact was made by; empty where no report says it."""
    path = folder / "report.json"
    try:
        if path.stat().st_size > _REPORT_CAP:
            return {}
        said = json.loads(path.read_bytes())["predicted_memory"]
        return {key: int(said[key]) for key in ("total", "context")}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}


Measure = Callable[[OnProgress], dict[str, Any]]


def _in_llama(subject: Subject, ask: Ask, threads: int) -> dict[str, Measure]:
    if ask.provider not in ("auto", "cpu"):
        raise UsageError(f"llama.cpp runs on the CPU here, not on {ask.provider}", hint="--provider cpu")

    def measure(on_progress: OnProgress) -> dict[str, Any]:
        answer = bench_gguf(
            subject.graph, ask.plan(), threads=threads, time_limit=_time_limit(ask), on_progress=on_progress
        )
        return _run(answer, "cpu", answer["speed"])

    return {"llama.cpp": measure}


def _in_onnx(subject: Subject, ask: Ask, threads: int) -> dict[str, Measure]:
    device, provider = _provider(subject, ask.provider)
    tokens = _tokens(subject)
    settings: dict[str, Any] = {"threads": threads, "time_limit": _time_limit(ask)}
    plan = ask.plan(subject.context)

    def plain(on_progress: OnProgress) -> dict[str, Any]:
        answer = onnxruntime.bench(
            subject.graph,
            tokens,
            plan,
            provider=provider,
            head_size=subject.head_size,
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
            subject.folder, tokens, plan, provider=own, on_progress=on_progress, **settings
        )
        return _run(answer, device if own else "as configured", answer)

    return {"onnxruntime": plain, "onnxruntime-genai": genai}


def _time_limit(ask: Ask) -> float:
    """Seconds after which a runtime is stopped: the tests have their own, loading and the last run are beside them."""
    return _HOURS + 2 * ask.seconds


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


def _tokens(subject: Subject) -> I64:
    """int64 [1, n]: held-out text, or numbers where the folder has no tokenizer."""
    tokenizer = subject.folder / "tokenizer.json"
    if tokenizer.is_file():
        return text.windows(tokenizer, text.standard_library(), 1, PROMPT_TEXT).tokens
    return np.random.default_rng(0).integers(1, _IDS, (1, PROMPT_TEXT))


def _run(answer: Mapping[str, Any], provider: str, speed: Mapping[str, Any]) -> dict[str, Any]:
    tests = speed["tests"]
    return {
        "version": answer["version"],
        "provider": provider,
        "load_seconds": answer.get("load_seconds", speed.get("load_seconds")),
        **{key: speed[key] for key in ("ttft_seconds", "ttft_prompt", "prompts_are") if key in speed},
        "prefill": _spread(tests, "prompt"),
        "decode": _spread(tests, "generate"),
        "tests": tests,
        "not_run": speed["not_run"],
        "peak_rss_bytes": answer["memory"]["peak_rss_bytes"],
    }


def _spread(tests: Sequence[Mapping[str, Any]], kind: str) -> dict[str, Any] | None:
    """Tokens per second of the first test of a kind."""
    found = [test for test in tests if test["kind"] == kind]
    return {key: found[0][key] for key in ("median", "low", "high", "runs")} if found else None
