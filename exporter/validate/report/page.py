"""A report as a document: which sections there are, and in which order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from exporter.validate.report import accuracy, figures, findings, machine, plots, tensors, words
from exporter.validate.report.blocks import (
    Block,
    Cell,
    Command,
    Document,
    Picture,
    Section,
    Text,
    make_table,
    section,
    verdict,
)
from exporter.validate.report.reading import listed, number, table
from exporter.validate.report.reading import words as said

_FILES = 12  # named; the rest is in report.json


def document(report: Mapping[str, Any]) -> Document:
    """What report.md, report.html and the terminal say of a report, in that order."""
    made = table(report, "made")
    foot = ", ".join(
        filter(
            None,
            (
                f"exporter {said(made, 'exporter')}" if said(made, "exporter") else "exporter",
                said(made, "date"),
                f"Python {said(made, 'python')}" if said(made, "python") else "",
                said(made, "platform"),
            ),
        )
    )
    sections = (
        _gates(report),
        findings.findings(report),
        accuracy.accuracy(report),
        accuracy.arithmetics(report),
        accuracy.twins(report),
        accuracy.generation(report),
        accuracy.router(report),
        tensors.weights(report),
        tensors.controls(report),
        tensors.tasks(report),
        tensors.graphs(report),
        machine.speed(report),
        machine.memory(report),
        machine.hardware(report),
        machine.texts(report),
        _subject(report),
        _again(report),
        _not_run(report),
    )
    return Document(
        kind=words.format_of(report) or "artifact",
        title=words.name_of(report),
        passed=words.passed(report),
        sentence=words.sentence(report),
        facts=words.facts(report),
        sections=tuple(each for each in sections if each),
        foot=foot,
    )


def _gates(report: Mapping[str, Any]) -> Section | None:
    gates = words.gates(report)
    rows = [(verdict(g.passed), Cell(_meaning(g)), g.value, g.limit, Cell(g.name, "code")) for g in gates]
    shown = make_table("", ("", "gate", "value", "has to be", "name"), rows, (2, 3))
    shown = shown and replace(shown, kind="gates")
    shares = [(g.name, g.share, g.passed) for g in gates if g.share is not None]
    svg = plots.shares_of_limits(shares[:30])
    caption = (
        "How much of what its limit allows each value takes, on a logarithmic scale: of a least share, of the errors "
        "that it leaves; of a ratio, of what it may be over 1."
    )
    blocks: list[Block | None] = [shown, Picture("Values against limits", caption, svg, "wide") if svg else None]
    return section("gates", "Gates", [*blocks, machine.tokenizer(report)])


def _meaning(gate: words.Gate) -> str:
    return f"{gate.meaning}; {gate.note}" if gate.note else gate.meaning


def _subject(report: Mapping[str, Any]) -> Section | None:
    """What the files are, by their own word and by ours."""
    found = table(report, "subject")
    rows = [
        ("format", words.format_of(report)),
        ("recipe", said(found, "recipe")),
        ("target", said(found, "target")),
        ("made by", said(found, "tool")),
        ("class", words.CLASSES.get(said(found, "class"), said(found, "class"))),
        ("profile", said(report, "profile.name")),
    ]
    files = [each for each in listed(found, "files") if isinstance(each, Mapping)]
    shown = [
        (Cell(said(f, "name"), "code"), figures.size(number(f, "bytes")), said(f, "sha256")) for f in files[:_FILES]
    ]
    return section(
        "files",
        "The artifact",
        [
            make_table("What it is", ("", ""), [row for row in rows if row[1]]),
            make_table("Files", ("file", "size", "SHA-256"), shown, (1,), total=len(files)),
        ],
    )


def _again(report: Mapping[str, Any]) -> Section:
    told = Text("The same figures, from the same files, in the same way:")
    return Section("again", "How to run this again", (told, Command(words.again(report))))


def _not_run(report: Mapping[str, Any]) -> Section | None:
    missed = table(report, "not_run")
    rows = [
        (Cell(words.thing(str(key)), "strong"), said(why, clip=400) or "no reason given") for key, why in missed.items()
    ]
    return section("not-run", "What was not run", [make_table("Not run, and why", ("", "reason"), rows)])
