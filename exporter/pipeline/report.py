"""What people read beside report.json: report.md and report.html."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.pipeline.files import write_whole
from exporter.validate.report import html, markdown

PAGES = {"report.md": markdown, "report.html": html}


def write_pages(folder: Path, report: Mapping[str, Any]) -> list[Path]:
    """Write the pages of a report into its folder, each whole or not at all; the paths."""
    paths = []
    for name, render in PAGES.items():
        write_whole(folder / name, render(report))
        paths.append(folder / name)
    return paths


def add_tasks(folder: Path, tasks: Sequence[Mapping[str, Any]]) -> bool:
    """Put scores into the report of the artifact in `folder`, in place of those of the same tasks; False: no report.

    The verdict stays: no score of a few hundred questions can show what a quantization costs.
    """
    path = folder / "report.json"
    try:
        report = json.loads(path.read_bytes())
        known = [each for each in report.get("tasks", []) if each["task"] not in {new["task"] for new in tasks}]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False
    report["tasks"] = [*known, *tasks]
    write_whole(path, json.dumps(report, indent=1, allow_nan=False) + "\n")
    write_pages(folder, report)
    return True


def remove_pages(folder: Path) -> None:
    """Whatever they said, the artifact is judged anew."""
    for name in PAGES:
        (folder / name).unlink(missing_ok=True)
