"""What a proof found, as Markdown for a card: the words and figures of report.md, in few lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exporter.publish.card.markup import bullets, code, table, text
from exporter.validate.report import figures, sentence, words
from exporter.validate.report.reading import at, listed, number
from exporter.validate.report.reading import table as mapping
from exporter.validate.report.reading import words as said

_TASKS = 8
_COLUMNS = ("the text", "positions", "mean KL, nats", "95% interval", "99%", "99.9%", "same top token", "perplexity")
_GATES = ("", "gate", "value", "has to be", "name")


def proof(report: Mapping[str, Any]) -> str:
    """The verdict, gates, what was measured, on what, where, and what was not run."""
    parts = [
        text(sentence(report)),
        _gates(report),
        _accuracy(report),
        _others(report),
        _machine(report),
        _texts(report),
        _not_run(report),
    ]
    return "\n\n".join(filter(None, parts))


def _gates(report: Mapping[str, Any]) -> str:
    rows = [
        [
            "✓" if gate.passed else "**✗ FAILED**",
            text(gate.meaning),
            text(gate.value),
            text(gate.limit),
            code(gate.name),
        ]
        for gate in words.gates(report)
    ]
    return table(_GATES, rows, (2, 3)) if rows else ""


def _accuracy(report: Mapping[str, Any]) -> str:
    """One row for each column of text."""
    rows = []
    for key, label in words.COLUMNS.items():
        found = words.column_of(report, key)
        if number(found, "kl_mean") is None:
            continue
        rows.append(
            [
                text(label),
                figures.count(number(found, "positions")),
                figures.plain(number(found, "kl_mean")),
                figures.interval(at(found, "kl_ci95")) or figures.NONE,
                figures.plain(number(found, "kl_p99")),
                figures.plain(number(found, "kl_p999")),
                figures.share(number(found, "top1")),
                f"x {figures.ratio(number(found, 'ppl_ratio'))}",
            ]
        )
    if not rows:
        return ""
    against = words.reference_of(report)
    of = f", {text(against)}" if against else ""
    told = f"Predictions of the next token against the reference{of}, computed in float32; both read the same tokens:"
    return f"{told}\n\n{table(_COLUMNS, rows, range(1, 8))}"


def _others(report: Mapping[str, Any]) -> str:
    """What else says something, a line each."""
    lines = []
    tensors, equal = number(report, "digests.tensors"), number(report, "digests.equal")
    if tensors is not None and equal is not None:
        lines.append(f"{figures.count(equal)} of {figures.count(tensors)} tensors in the files are the ones stored.")
    if nearest := said(report, "twins.nearest"):
        lines.append(f"Of the reference and the same weights computed with known mistakes, nearest: {text(nearest)}.")
    if (floor := number(report, "floor.kl_mean")) is not None:
        lines.append(f"Noise floor: {figures.plain(floor)} nats, the reference in bfloat16 against itself in float32.")
    if controls := [each for each in listed(report, "controls") if at(each, "applies") is not False]:
        caught = sum(at(each, "caught") is True for each in controls)
        lines.append(f"Known-bad copies of it that a gate caught: {caught} of {len(controls)}.")
    lines += [
        f"{text(said(task, 'task'))}: {figures.share(number(task, 'score'))} of {figures.count(number(task, 'n'))}."
        for task in listed(report, "tasks")[:_TASKS]
    ]
    return bullets(lines)


def _machine(report: Mapping[str, Any]) -> str:
    statement = said(report, "target.statement", clip=600)
    runtime = runtime_of(report)
    parts = (f"Hardware: {text(statement)}." if statement else "", f"Runtime: {text(runtime)}." if runtime else "")
    return " ".join(filter(None, parts))


def runtime_of(report: Mapping[str, Any]) -> str:
    """ "llama.cpp 0.6.0-dev", "onnxruntime 1.32.0 and onnxruntime-genai 0.18.0"; "" for none."""
    name = " ".join(filter(None, (said(report, "runtime.name"), said(report, "runtime.version"))))
    genai = said(report, "genai.version")
    return " and ".join(filter(None, (name, f"onnxruntime-genai {genai}" if genai else "")))


def _texts(report: Mapping[str, Any]) -> str:
    lines = []
    for key, found in mapping(report, "accuracy").items():
        if source := said(found, "source"):
            sha = said(found, "sha256")
            tokens = figures.count(number(found, "tokens"))
            lines.append(f"{text(words.thing(str(key)))}: {text(source)}, {tokens} tokens{_hash(sha)}")
    if not lines and (source := said(report, "text.source")):
        lines.append(f"{text(source)}{_hash(said(report, 'text.sha256'))}")
    return f"What was read:\n\n{bullets(lines)}" if lines else ""


def _hash(sha: str) -> str:
    return f", SHA-256 {code(sha)}" if sha else ""


def _not_run(report: Mapping[str, Any]) -> str:
    lines = [
        f"**{text(words.thing(str(key)))}**: {text(said(why, clip=400) or 'no reason given')}"
        for key, why in mapping(report, "not_run").items()
    ]
    return f"What was not run:\n\n{bullets(lines)}" if lines else "Nothing was left out."


def sealed_proof(made: Mapping[str, Any]) -> str:
    """The verdict that is in manifest.json, for an artifact whose report is not there; "" without one."""
    gates = [each for each in listed(made, "proof.gates") if isinstance(each, Mapping)]
    rows = [
        ["✓" if at(gate, "passed") is True else "**✗ FAILED**", code(said(gate, "name")), _limit(at(gate, "limit"))]
        for gate in gates
    ]
    told = "This is the verdict in manifest.json. Its report is not here, so no value is known."
    return f"{told}\n\n{table(('', 'gate', 'limit'), rows)}" if rows else ""


def _limit(value: Any) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else figures.plain(number(value))
