"""ONNX graphs of anyone, judged by the rules of TensorRT's parser; engines of them where their shapes are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from exporter.errors import ExporterError, MissingExtra, UsageError
from exporter.pipeline.progress import Progress, worker_stages
from exporter.pipeline.prove_tensorrt import engine_limits
from exporter.validate.onnx_file import AGAIN
from exporter.validate.tensorrt_graph import SMS
from exporter.validate.tensorrt_prove import GRAPHS, build_engines, read_profiles
from exporter.validate.tensorrt_rules import lint

_PROFILES = "profiles.json"


def find_graphs(path: Path) -> list[Path] | None:
    """The graph at `path`, or those of a folder that exporter did not make; None for an artifact of ours.

    Raises UsageError where there is neither.
    """
    hint = "a folder that `exporter quantize` made, an .onnx file, or a folder with some"
    if path.is_dir():
        if (path / "manifest.json").exists():
            return None
        if (path / "SHA256SUMS").exists() and (path / "profiles.json").exists():
            again = "download it again, or exporter quantize ... --overwrite makes it again"
            raise ExporterError(f"{path / 'manifest.json'} is missing", hint=again)
        found = sorted([*path.glob("*.onnx"), *path.glob("onnx/*.onnx")])
        what = "has no manifest.json and no .onnx file"
        below = sorted(path.glob("*/manifest.json"))
    else:
        found = [path] if path.is_file() and path.suffix == ".onnx" else []
        what = "is no .onnx file" if path.exists() else "does not exist"
        if path.is_symlink() and not path.exists():
            what = "is a symbolic link that leads nowhere"
        below = [path.parent / "manifest.json"] if path.is_file() and (path.parent / "manifest.json").exists() else []
    if not found:
        raise UsageError(f"{path} {what}", hint=f"exporter validate {below[0].parent}" if below else hint)
    return found


def judge(path: Path, graphs: Sequence[Path], sms: Sequence[int], engines: bool, progress: Progress) -> dict[str, Any]:
    """What TensorRT's rules say of graphs on each compute capability that is asked for.

    sms        as asked, else those of the folder's profiles.json, else all that are known
    graphs     each {"graph", "sms": [{"sm", "builds", "reason"}], "findings": [fields of Finding]}
    engines    what `build_engines` gives; empty without `engines`, and `not_run` says so
    status     "passed", or "gate failed" where a graph breaks a rule or does not become an engine

    Raises UsageError for a capability that nobody has rules for, MissingExtra without onnx or TensorRT-RTX.
    """
    if unknown := set(sms) - set(SMS):
        raise UsageError(
            f"the rules for SM{min(unknown)} are not known", hint=f"--sm N, one of {', '.join(map(str, SMS))}"
        )
    if engines:
        _require_shapes(path, sms)
    asked = sorted(set(sms)) or _intended(path)
    found = [_judge(path, graph, asked, alone=len(graphs) == 1) for graph in graphs]
    passed = all(each["builds"] for graph in found for each in graph["sms"])
    report: dict[str, Any] = {"path": str(path), "sms": asked, "graphs": found, "engines": {}, "not_run": {}}
    if engines:
        report["engines"] = build_engines(path, 0, engine_limits(), None, worker_stages(progress, "TensorRT-RTX"))
        progress.done()
        passed &= report["engines"]["built"]
        report["not_run"]["gpu"] = "no engine was executed: only the proof of an artifact does that"
    else:
        report["not_run"]["engines"] = "no engine was built: this is what the rules of TensorRT's parser say"
    return report | {"status": "passed" if passed else "gate failed"}


def _judge(path: Path, graph: Path, sms: Sequence[int], alone: bool) -> dict[str, Any]:
    """The verdict on one graph. One that cannot be read is an error where it is `alone`, else a verdict too."""
    name = str(graph.relative_to(path)) if graph != path else graph.name
    try:
        found = lint(graph)
    except MissingExtra:
        raise
    except ExporterError as error:
        if not alone:
            verdicts = [{"sm": sm, "builds": False, "reason": error.message} for sm in sms]
            return {"graph": name, "sms": verdicts, "findings": []}
        if error.hint == AGAIN:
            linked = "link" in error.message  # as in the Hub's cache
            again = "the tool that wrote it has to write it again"
            error.hint = "copy the folder with its files, not their links (cp -RL)" if linked else again
        raise
    findings = [
        {**asdict(each), "sms": sorted(set(each.sms) & set(sms))}
        for each in found
        if not each.fatal or set(each.sms) & set(sms)
    ]
    return {"graph": name, "sms": [_verdict(findings, sm) for sm in sms], "findings": findings}


def _verdict(findings: Sequence[Mapping[str, Any]], sm: int) -> dict[str, Any]:
    first = next((each for each in findings if each["fatal"] and sm in each["sms"]), None)
    return {"sm": sm, "builds": first is None, "reason": f"{first['where']}: {first['problem']}" if first else None}


def _intended(path: Path) -> list[int]:
    """The compute capabilities that the folder says its graphs are for; all where it says none that are known."""
    try:
        sms = read_profiles(path)[0] if (path / _PROFILES).is_file() else []
    except ExporterError:
        sms = []  # another tool's file of that name
    return [sm for sm in SMS if sm in sms] or list(SMS)


def _require_shapes(path: Path, sms: Sequence[int]) -> None:
    """Raises UsageError where nobody knows of which shapes engines are to be."""
    missing = next((n for n in (_PROFILES, *(f"{g}.onnx" for g in GRAPHS)) if not (path / n).is_file()), None)
    if missing:
        raise UsageError(f"{path} has no {missing}, so there are no engines to build", hint="without --engines")
    if sms:
        raise UsageError(f"--engines builds for those in {path / _PROFILES}", hint="without --sm, or without --engines")
