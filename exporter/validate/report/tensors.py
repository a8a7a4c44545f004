"""Sections on what is in the files: digests, weights, graphs and engines; and on what the proof itself is worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exporter.validate.report import figures
from exporter.validate.report.blocks import ROWS, Block, Cell, Section, Table, Text, make_table, section, verdict, yes
from exporter.validate.report.reading import at, flag, listed, number, table, words

_NAMED = 20  # tensors that a list names


def weights(report: Mapping[str, Any]) -> Section | None:
    """Which numbers the files hold, against those of the checkpoint or of the store."""
    found = table(report, "weights")
    blocks: list[Block | None] = [
        _digests(report),
        _exactness(found),
        _groups(found),
        _worst(found),
        _different(report),
    ]
    return section("weights", "Weights", blocks)


def _digests(report: Mapping[str, Any]) -> Text | None:
    tensors, equal = number(report, "digests.tensors"), number(report, "digests.equal")
    if tensors is None or equal is None:
        return None
    all_equal = "Every tensor" if equal == tensors else f"{figures.count(equal)} of {figures.count(tensors)} tensors"
    head = {True: " Metadata and tensor tables are, byte for byte, those meant.", False: " The head of a file is not."}
    told = flag(report, "head_equal")
    return Text(
        f"{all_equal} unpacked from the files {'is' if equal == tensors else 'are'} the one that was stored "
        f"({figures.count(tensors)} compared by digest).{head[told] if told is not None else ''}"
    )


def _exactness(found: Mapping[str, Any]) -> Text | None:
    tensors, exact = number(found, "tensors"), number(found, "exact")
    if tensors is None or exact is None:
        return None
    kept = flag(found, "kept_exact")
    rest = {True: "Routers, norms, sinks and biases are all equal to the checkpoint's.", None: ""}
    told = rest.get(kept, "A router, norm, sink or bias is not equal to the checkpoint's.")
    counts = f"{figures.count(exact)} of {figures.count(tensors)} tensors"
    numbers, equal = number(found, "compared"), number(found, "equal")
    of = f", and {figures.share(equal)} of {figures.count(numbers)} numbers" if equal is not None else ""
    return Text(f"{counts} equal the checkpoint's to the last bit{of}. {told}".strip())


def _groups(found: Mapping[str, Any]) -> Table | None:
    rows = [
        (
            words(group, "group"),
            ", ".join(
                f"{words(form)} x {figures.count(number(n))}" for form, n in list(table(group, "stored").items())[:8]
            ),
            f"{figures.count(number(group, 'exact'))} of {figures.count(number(group, 'tensors'))}",
            figures.share(number(group, "relative_error")),
        )
        for group in listed(found, "groups")
        if isinstance(group, Mapping)
    ]
    columns = ("tensors", "stored as", "exact", "largest relative error")
    return make_table(
        "How each kind of tensor is stored. Error: RMS over RMS, of the worst tensor", columns, rows, (2, 3)
    )


def _worst(found: Mapping[str, Any]) -> Table | None:
    worst = listed(found, "worst")
    rows = [
        (
            Cell(words(each, "name"), "code"),
            words(each, "stored"),
            figures.share(number(each, "relative_error")),
            figures.share(number(each, "worst_block")),
            figures.share(number(each, "equal")),
        )
        for each in worst[:_NAMED]
        if isinstance(each, Mapping)
    ]
    columns = ("tensor", "stored as", "relative error", "worst block of 32", "equal numbers")
    return make_table("Tensors farthest from the checkpoint's", columns, rows, (2, 3, 4))


def _different(report: Mapping[str, Any]) -> Table | None:
    names = listed(report, "digests.different")
    rows = [(Cell(words(name), "code"),) for name in names[:_NAMED]]
    return make_table("Tensors that are not the ones stored", ("tensor",), rows, total=len(names))


def controls(report: Mapping[str, Any]) -> Section | None:
    """Known-bad variants of the artifact: a proof that lets one through proves nothing."""
    rows, caught, applied = [], 0, 0
    for each in listed(report, "controls")[:ROWS]:
        applies = flag(each, "applies") is not False
        found = flag(each, "caught")
        applied, caught = applied + applies, caught + (applies and found is True)
        gates = ", ".join(words(name) for name in listed(each, "gates_failed")[:6]) or words(each, "refused")
        how = "caught" if flag(each, "by_behaviour") is not False else "caught, by its bytes alone"
        told = Cell(how, "good") if found else Cell("MISSED", "bad") if found is False else verdict(None)
        rows.append(
            (
                Cell(words(each, "name"), "strong"),
                told if applies else Cell("does not apply", "none"),
                (gates if applies else words(each, "why_not")) or figures.NONE,
                figures.plain(number(each, "kl_mean")),
            )
        )
    if not rows:
        return None
    all_of = (
        f"{caught} of {applied} known-bad variants made a gate fail." if applied else "None of the variants applies."
    )
    columns = ("what was broken on purpose", "", "gates that failed", "mean KL, nats")
    return section("controls", "Known-bad controls", [Text(all_of), make_table("", columns, rows, (3,))])


def tasks(report: Mapping[str, Any]) -> Section | None:
    rows = [
        (
            words(each, "task"),
            _with_error(each),
            figures.count(number(each, "n")),
            _published(each),
            _points(number(each, "detects")),
            words(each, "verdict") or figures.NONE,
        )
        for each in listed(report, "tasks")
        if isinstance(each, Mapping)
    ]
    columns = ("task", "score", "questions", "published", "can show a loss of", "so")
    note = (
        "A run of so many questions cannot show a smaller difference than the one given: no small benchmark certifies."
    )
    shown = make_table("Scores of tasks, points of 100", columns, rows, (1, 2, 3, 4))
    return section("tasks", "Tasks", [shown and Text(note), shown])


def _with_error(each: Mapping[str, Any]) -> str:
    """Scores are of 1, and said of 100."""
    error = number(each, "stderr")
    return _points(number(each, "score")) + (f" ± {_points(error)}" if error is not None else "")


def _points(value: float | None) -> str:
    return figures.NONE if value is None else f"{100 * value:.1f}" if abs(value) < 1e6 else figures.plain(value)


def _published(each: Mapping[str, Any]) -> str:
    effort = words(each, "published_effort")
    return _points(number(each, "published")) + (f" ({effort})" if effort else "")


def graphs(report: Mapping[str, Any]) -> Section | None:
    """TensorRT's rules, engines; ONNX Runtime's second runtime."""
    findings = listed(report, "rules.findings")
    rows = [(Cell(_finding(each), "code"),) for each in findings[:_NAMED]]
    kept = flag(report, "rules.kept")
    rules = None if kept is None else Text(f"The graphs keep the rules of TensorRT's parser: {yes(kept)}.")
    found = make_table("Findings of TensorRT's rules", ("finding",), rows, total=len(findings))
    return section("graphs", "Graphs and engines", [rules, found, _engines(report), _genai(report)])


def _finding(each: Any) -> str:
    if isinstance(each, Mapping):
        return ": ".join(filter(None, (words(each, "graph"), words(each, "where"), words(each, "problem"))))
    return words(each)


def _engines(report: Mapping[str, Any]) -> Table | None:
    rows = [
        (
            words(each, "graph"),
            f"SM{words(each, 'sm')}",
            Cell("built", "good") if flag(each, "built") else Cell("NOT BUILT", "bad"),
            figures.size(number(each, "engine_bytes")),
            figures.share(number(each, "expansion")),
            yes(flag(each, "fused")),
            words(each, "error") or figures.NONE,
        )
        for each in listed(report, "engines.builds")
        if isinstance(each, Mapping)
    ]
    version = words(report, "engines.version")
    columns = ("graph", "GPU", "", "engine", "widened weights", "fused attention", "error")
    return make_table(f"Engines that TensorRT-RTX {version} was asked for".replace("  ", " "), columns, rows, (3, 4))


def _genai(report: Mapping[str, Any]) -> Text | None:
    genai = table(report, "genai")
    if not genai:
        return None
    parts = [f"onnxruntime-genai {words(genai, 'version')}".strip()]
    if (kl := number(genai, "kl_mean")) is not None:
        parts.append(f"mean KL {figures.plain(kl)} nats")
    for key, what in (("tokenizer_equal", "token ids equal"), ("chat_equal", "conversations rendered equally")):
        if at(genai, key) is not None:
            parts.append(f"{what}: {yes(flag(genai, key))}")
    return Text(", ".join(parts) + ".")
