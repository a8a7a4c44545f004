"""The doctor's findings, and what each format says of the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from exporter.checkpoint.doctor import Diagnosis, diagnose
from exporter.checkpoint.findings import LEVELS, Finding
from exporter.checkpoint.vocabulary import read_tokenizer
from exporter.errors import ExporterError
from exporter.formats import all_formats


def examine(folder: Path, deep: bool, on_progress: Callable[[int, int], None] | None) -> Diagnosis:
    """`diagnose`, with a warning for every format that would refuse this model or its tokenizer."""
    found = diagnose(folder, deep=deep, on_progress=on_progress)
    checkpoint = found.checkpoint
    if checkpoint is None:
        return found
    findings = list(found.findings)
    for name, fmt in all_formats().items():
        reason = fmt.refuse_model(checkpoint.config)
        if reason is None and checkpoint.tokenizer_file is not None:
            try:
                reason = fmt.refuse_tokenizer(read_tokenizer(checkpoint.tokenizer_file), checkpoint.config)
            except ExporterError:
                continue  # said already
        if reason:
            findings.append(Finding("warning", f"no {name} can be made of it: {reason}", str(folder)))
    return replace(found, findings=sorted(findings, key=lambda f: LEVELS.index(f.level)))
