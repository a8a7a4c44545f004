"""exporter compare: find reports, and read them within bounds; anyone may have written them."""

from __future__ import annotations

import json
import os
import shlex
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from exporter.errors import ExporterError, UsageError
from exporter.pipeline.files import write_whole
from exporter.validate.report.comparison import Comparison, Entry, compare, page, picture
from exporter.validate.report.html import alone, written
from exporter.validate.report.reading import number, table, words
from exporter.validate.report.words import name_of

SCHEMA = 2
_NAME = "report.json"
_CAP = 16 << 20  # bytes of a report; ours have less than one million
_DEPTH = 3  # OUT/<model>/<profile>/<artifact>
_FOLDERS = 20_000  # looked into
_AGAIN = "exporter validate ARTIFACT writes it anew"


def compare_reports(paths: Sequence[Path]) -> Comparison:
    """Compare what the paths lead to: artifacts, their reports, or folders of artifacts.

    Raises UsageError where there is no report, ExporterError for one that cannot be read.
    """
    found: dict[str, Path] = {}
    for path in paths:
        for each in find_reports(path):
            found.setdefault(os.path.realpath(each), each)
    entries = [(path, read_report(path)) for path in found.values()]
    labels = _labels(entries)
    return compare([Entry(labels[i], _said(path.parent), report) for i, (path, report) in enumerate(entries)])


def find_reports(path: Path) -> list[Path]:
    """The report that a path is or holds, or those of the artifacts in folders below it, at most three deep."""
    if not path.exists():
        raise UsageError(
            f"{_said(path)} does not exist", hint="an artifact's folder, a report.json, or a folder of artifacts"
        )
    if not path.is_dir():
        return [path]
    if (path / _NAME).exists():
        return [path / _NAME]
    found = list(_below(path))
    if not found:
        raise UsageError(f"{_said(path)}: no {_NAME} there or at most three folders below", hint=_AGAIN)
    return found


def _below(top: Path) -> Iterator[Path]:
    for seen, (folder, names, files) in enumerate(os.walk(top)):
        if seen >= _FOLDERS:
            raise UsageError(f"{_said(top)}: more than {_FOLDERS:,} folders", hint="name the folders of the artifacts")
        here = Path(folder)
        if _NAME in files:
            yield here / _NAME
        deep = len(here.relative_to(top).parts) >= _DEPTH
        names[:] = [] if deep or _NAME in files else sorted(name for name in names if not name.startswith("."))


def read_report(path: Path) -> dict[str, Any]:
    """A report.json. One of the first schema gets its `subject` from the manifest beside it."""
    report = _json(path)
    if not isinstance(report, dict) or not ({"gates", "status"} & report.keys()):
        raise UsageError(
            f"{_said(path)} is no report of exporter's", hint="a report.json of exporter validate or verify"
        )
    schema = report.get("schema", 1)
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise ExporterError(f"{_said(path)} is damaged: schema {words(schema) or 'of no kind'}", hint=_AGAIN)
    if schema > SCHEMA:
        raise UsageError(
            f"{_said(path)} is of schema {words(schema)}, and this exporter reads up to {SCHEMA}",
            hint="a newer exporter reads it",
        )
    if not table(report, "subject"):
        report["subject"] = _subject(path.parent)
    return report


def _json(path: Path) -> Any:
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as f:  # a pipe would wait for its writer
        status = os.fstat(f.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{_said(path)} is no file", hint="a report.json")
        if status.st_size > _CAP:
            raise ExporterError(f"{_said(path)} is no report: it has {status.st_size:,} bytes", hint=_AGAIN)
        raw = f.read(_CAP + 1)
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise ExporterError(f"{_said(path)} is damaged: no JSON", hint=_AGAIN) from None


def _subject(folder: Path) -> dict[str, Any]:
    """What the manifest says of an artifact; its name alone where there is none."""
    name = folder.resolve().name
    try:
        made = _json(folder / "manifest.json")
    except (ExporterError, OSError):
        return {"name": name}
    sizes = [number(each, "bytes") for each in table(made, "files").values()]
    whole = [size for size in sizes if size is not None]
    return {
        "name": name,
        "format": words(made, "format"),
        "recipe": words(made, "recipe.name"),
        "target": words(made, "target"),
        **({"bytes": sum(whole)} if whole and len(whole) == len(sizes) else {}),
    }


def write_html(path: Path, found: Comparison) -> None:
    """A page of its own."""
    _write(path, written(page(found)))


def write_svg(path: Path, found: Comparison) -> None:
    """The picture alone. Raises ExporterError where there is nothing to draw."""
    drawn = picture(found)
    if not drawn:
        raise ExporterError(
            "nothing to draw: fewer than two artifacts have a size and a KL that can be compared",
            hint="without --svg, the table shows what there is",
        )
    _write(path, alone(drawn))


def _write(path: Path, text: str) -> None:
    if not path.parent.is_dir():
        raise UsageError(f"{_said(path.parent)} is no folder", hint=f"mkdir -p {shlex.quote(str(path.parent))}")
    if path.name == _NAME:
        raise UsageError(f"{_said(path)} is the name of a report", hint=f"another name than {_NAME}")
    write_whole(path, text)


def _said(path: Path) -> str:
    """A path as one line: a name below a folder may be anything."""
    return words(str(path), clip=1000)


def _labels(entries: Sequence[tuple[Path, dict[str, Any]]]) -> list[str]:
    """Names, made longer by their folders where two are the same."""
    labels = [_label(path, report) for path, report in entries]
    for parts in range(1, 4):
        twice = {label for label, n in Counter(labels).items() if n > 1}
        for i, (path, report) in enumerate(entries):
            if labels[i] in twice:
                above = path.resolve().parent.parts[-parts:]
                own = _label(path, report)
                labels[i] = words("/".join((*above, own) if above[-1:] != (own,) else above))
    return labels


def _label(path: Path, report: dict[str, Any]) -> str:
    return name_of(report) if words(report, "subject.name") else words(path.resolve().parent.name)
