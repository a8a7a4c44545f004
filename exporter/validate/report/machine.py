"""Sections on the machine: speed, memory, hardware, and the device that the artifact is meant for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exporter.validate.report import figures, plots
from exporter.validate.report.blocks import Block, Cell, Picture, Section, Table, Text, make_table, section
from exporter.validate.report.plots import Bar
from exporter.validate.report.reading import flag, listed, number, table, words
from exporter.validate.report.words import thing

_PARTS = {
    "weights": "weights",
    "kv_full": "KV cache, full attention",
    "kv_sliding": "KV cache, windows",
    "logits": "logits",
    "scratch": "scratch",
    "runtime": "the runtime itself",
}
_KINDS = {"prompt": "Reading a prompt", "generate": "Writing an answer"}


def speed(report: Mapping[str, Any]) -> Section | None:
    tests = [each for each in listed(report, "speed.tests") if isinstance(each, Mapping)]
    blocks: list[Block | None] = [_summary(report), _tests(tests), *_speed_pictures(tests)]
    missed = [f"{words(name)} ({words(why)})" for name, why in list(table(report, "speed.not_run").items())[:10]]
    if missed:
        blocks.append(Text(f"Not run: {'; '.join(missed)}."))
    return section("speed", "Speed", blocks)


def _summary(report: Mapping[str, Any]) -> Text | None:
    found = table(report, "speed")
    parts = []
    for key, told, write in (
        ("load_seconds", "loaded in {}", figures.seconds),
        ("ttft_seconds", "first token after {}", figures.seconds),
        ("prefill_tokens_per_second", "a prompt at {} tokens/s", figures.rate),
        ("decode_tokens_per_second", "an answer at {} tokens/s", figures.rate),
    ):
        if (value := number(found, key)) is not None:
            parts.append(told.format(write(value)))
    if not parts:
        return None
    where = "" if flag(report, "runtime.executed_on_target") is not False else " This is not the target's speed."
    return Text(f"{'; '.join(parts)[:1].upper()}{'; '.join(parts)[1:]}.{where}")


def _tests(tests: list[Mapping[str, Any]]) -> Table | None:
    rows = [
        (
            words(test, "test"),
            figures.rate(number(test, "mean")) + figures.deviation(number(test, "sd")),
            figures.rate(number(test, "median")),
            f"{figures.rate(number(test, 'low'))} to {figures.rate(number(test, 'high'))}",
            figures.count(len(listed(test, "runs"))),
            _latency(test),
        )
        for test in tests
    ]
    columns = ("test", "tokens/s", "median", "slowest to fastest", "runs", "latency, ms (99%)")
    return make_table("pp: tokens of a prompt, tg: tokens generated; @ d: after so many", columns, rows, range(1, 6))


def _latency(test: Mapping[str, Any]) -> str:
    median, slow = number(test, "latency_ms.median"), number(test, "latency_ms.p99")
    return figures.NONE if median is None else f"{figures.plain(median)} ({figures.plain(slow)})"


def _speed_pictures(tests: list[Mapping[str, Any]]) -> list[Block]:
    found: list[Block] = []
    for kind, title in _KINDS.items():
        rows = [
            Bar(
                words(test, "test"),
                (mean,),
                f"{figures.rate(mean)} tokens/s",
                low=number(test, "low"),
                high=number(test, "high"),
            )
            for test in tests[:12]
            if words(test, "kind") == kind and (mean := number(test, "mean")) is not None and mean >= 0
        ]
        if svg := plots.amounts(f"{title}, tokens per second", rows, figures.count):
            found.append(
                Picture(title, "Mean of the runs, tokens per second; the thin line is slowest to fastest.", svg)
            )
    return found


def memory(report: Mapping[str, Any]) -> Section | None:
    """What was predicted beside what was measured."""
    predicted, measured = table(report, "predicted_memory"), table(report, "memory")
    lines = [
        (predicted, "total", "predicted", False),
        *[(predicted, key, name, True) for key, name in _PARTS.items()],
        (measured, "peak_rss_bytes", "measured, the process at its peak", False),
        (measured, "file_bytes", "of files that are mapped", True),
        (measured, "anonymous_bytes", "of its own", True),
        (measured, "device_peak_bytes", "measured on the device, at its peak", False),
        (measured, "limit_bytes", "limit that it ran under", False),
        (measured, "limit_peak_bytes", "its peak inside that limit, with mapped files", True),
        (measured, "limit_read_again_bytes", "of files that were dropped for it and read again", True),
        (predicted, "usable", "what the target can use", False),
    ]
    rows = [
        (Cell(name, "part" if part else "strong"), figures.size(value))
        for source, key, name, part in lines
        if (value := number(source, key)) is not None
    ]
    if not rows:
        return None
    return section("memory", "Memory", [_remark(report), make_table("", ("", "bytes"), rows, (1,)), *_pictures(report)])


def _remark(report: Mapping[str, Any]) -> Text | None:
    parts = []
    if (context := number(report, "predicted_memory.context")) is not None:
        parts.append(f"The prediction is for a context of {figures.count(context)} tokens.")
    if (held := number(report, "speed.context")) is not None:
        parts.append(f"The measurement held {figures.count(held)}.")
    if by := words(report, "memory.limit_by"):
        parts.append(f"The limit was kept by {by}.")
    return Text(" ".join(parts)) if parts else None


def _pictures(report: Mapping[str, Any]) -> list[Block]:
    predicted, measured = table(report, "predicted_memory"), table(report, "memory")
    rows = []
    parts = tuple(max(number(predicted, key) or 0.0, 0.0) for key in _PARTS)
    if sum(parts) > 0:
        cache = parts[1] + parts[2]
        rows.append(
            Bar("predicted: weights, cache, buffers", (parts[0], cache, sum(parts[3:])), figures.size(sum(parts)))
        )
    peak = number(measured, "peak_rss_bytes")
    if peak is not None and peak > 0:
        files = min(max(number(measured, "file_bytes") or 0.0, 0.0), peak)
        label = "measured: mapped files, the rest" if files else "measured"
        rows.append(Bar(label, (files, peak - files) if files else (peak,), figures.size(peak)))
    if (device := number(measured, "device_peak_bytes")) is not None and device > 0:
        rows.append(Bar("measured on the device", (device,), figures.size(device)))
    usable = number(measured, "limit_bytes") or number(predicted, "usable") or 0.0
    svg = plots.amounts("Memory predicted and measured, bytes", rows, figures.size, (usable, "the limit"))
    told = (
        ""
        if usable <= 4 * max((sum(row.parts) for row in rows), default=0)
        else f" The limit, {figures.size(usable)}, is far to the right."
    )
    return [Picture("Predicted and measured", told, svg)] if svg and len(rows) > 1 else []


def hardware(report: Mapping[str, Any]) -> Section | None:
    found = table(report, "hardware")
    rows = [(label, written) for label, written in _hardware_rows(report, found) if written]
    target = words(report, "target.statement", clip=600)
    if target and flag(report, "target.on_target") is False and not target.lower().startswith("not"):
        target = f"Not run on the target: {target}"
    shown = make_table("The machine that ran it", ("", ""), rows)
    return section("hardware", "Hardware and target", [Text(_sentence(target)) if target else None, shown])


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _hardware_rows(report: Mapping[str, Any], found: Mapping[str, Any]) -> list[tuple[str, str]]:
    cores, total = number(found, "cores"), number(found, "memory_bytes")
    runtime = " ".join(filter(None, (words(report, "runtime.name"), words(report, "runtime.version"))))
    threads, load = number(report, "runtime.threads"), number(found, "load_average")
    load = load if load is not None else number(report, "runtime.load_average")
    versions = [f"{words(k)} {words(v)}" for k, v in list(table(found, "versions").items())[:24]]
    return [
        ("runtime", f"{runtime}{f', {figures.count(threads)} threads' if threads and runtime else ''}"),
        ("processor", words(found, "cpu") + (f", {figures.count(cores)} cores" if cores else "")),
        ("memory", figures.size(total) if total else ""),
        *[("GPU", _gpu(gpu)) for gpu in listed(found, "gpus")[:8]],
        ("system", words(found, "system")),
        ("Python", words(found, "python")),
        ("load average", f"{load:.2f}" if load is not None else ""),
        ("versions", ", ".join(versions)),
    ]


def _gpu(gpu: Any) -> str:
    size, used = number(gpu, "memory_bytes"), number(gpu, "used_bytes")
    parts = [
        words(gpu, "name"),
        figures.size(size) if size else "",
        f"{figures.size(used)} in use before" if used else "",
        f"compute capability {words(gpu, 'compute_capability')}" if words(gpu, "compute_capability") else "",
        f"driver {words(gpu, 'driver')}" if words(gpu, "driver") else "",
    ]
    return ", ".join(filter(None, parts))


def texts(report: Mapping[str, Any]) -> Section | None:
    """What was read, and what it was compared with."""
    rows = []
    for name, column in table(report, "accuracy").items():
        if source := words(column, "source"):
            rows.append((thing(name), source, figures.count(number(column, "tokens")), ""))
    if source := words(report, "text.source"):
        windows = [figures.count(number(each)) for each in listed(report, "text.windows")]
        tokens = figures.count(number(report, "text.tokens")) + (f" ({' x '.join(windows)})" if windows else "")
        rows.append(("the proof's text", source, tokens, words(report, "text.sha256")[:16]))
    against = [
        words(report, "against.repo") or words(report, "against.name"),
        f"revision {words(report, 'against.revision')}" if words(report, "against.revision") else "",
        f"in {words(report, 'against.precision')}" if words(report, "against.precision") else "",
        f"on {words(report, 'against.device')}" if words(report, "against.device") else "",
    ]
    said = ", ".join(filter(None, against))
    if (kept := number(report, "against.top_k")) is not None:
        tail = number(report, "against.tail_mass")
        rest = f"; the rest holds {figures.share(tail)} on average" if tail is not None else ""
        said += f". The {figures.count(kept)} most likely tokens of each position are kept{rest}"
    shown = make_table("What was read", ("text", "source", "tokens", "SHA-256"), rows, (2,))
    return section("texts", "Texts and reference", [Text(f"Compared with {said}.") if said else None, shown])


def tokenizer(report: Mapping[str, Any]) -> Text | None:
    equal = flag(report, "tokenizer_equal")
    if equal is None:
        return None
    ids = number(report, "tokenizer.ids")
    told = f" ({figures.count(ids)} ids compared)" if ids is not None else ""
    return Text(f"The runtime's token ids {'equal' if equal else 'differ from'} the tokenizer's{told}.")
