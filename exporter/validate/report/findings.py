"""What is wrong, in one place: for those who read no further than the verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from exporter.validate.report.accuracy import behaviour
from exporter.validate.report.blocks import ROWS, Section, make_table, section
from exporter.validate.report.reading import at, flag, listed, number, words
from exporter.validate.report.words import RELEASED

_EACH = 20  # of a kind
_TAIL = 0.05  # of the mass: what it hides of a KL is about that share


def findings(report: Mapping[str, Any]) -> Section | None:
    """A row for each thing that was found wrong; None where there is none."""
    rows = list(_found(report))
    return section("findings", "What was found", [make_table("", ("", "finding"), rows[:ROWS], total=len(rows))])


def _found(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    kinds = (
        ("config_differs", "what the file says of the model"),
        ("chat.differs", "conversations"),
        ("weights.problems", "weights"),
    )
    for key, what in kinds:
        lines = listed(report, key)
        for line in lines[:_EACH]:
            yield what, words(line, clip=300)
        if len(lines) > _EACH:
            yield what, f"and {len(lines) - _EACH:,} more, in report.json"
    tail = number(report, "against.tail_mass")
    if tail is not None and tail > _TAIL:
        yield "the reference", f"its kept tokens have {1 - tail:.0%} of the mass only: every KL here is too low"
    if words(report, "twins.nearest") not in ("", RELEASED):
        yield "behaviour", behaviour(report)
    if flag(report, "tokenizer_equal") is False:
        yield "tokenizer", _tokenizer(at(report, "tokenizer.first_difference"))
    for each in listed(report, "controls")[:ROWS]:
        if flag(each, "caught") is False:
            yield "a gate that is too wide", f"it let this mistake through: {words(each, 'name')}"
    for each in listed(report, "engines.builds")[:ROWS]:
        if flag(each, "built") is False:
            yield f"engine for SM{words(each, 'sm')}", f"{words(each, 'graph')}: {words(each, 'error', clip=300)}"


def _tokenizer(first: Any) -> str:
    """The first difference as validate.runtime.compare_ids has it."""
    if not isinstance(first, Mapping):
        return f"its ids differ from the checkpoint's{f': {words(first)}' if words(first) else ''}"
    found, wanted = (", ".join(words(each) for each in listed(first, key)[:8]) for key in ("found", "expected"))
    return f'of "{words(first, "text", clip=60)}" its ids are {found or "none"} where they should be {wanted or "none"}'
