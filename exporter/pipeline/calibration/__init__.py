"""Calibration text: from a setting to tokens. docs/calibration.md says which text to choose."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from exporter.checkpoint import Checkpoint
from exporter.checkpoint.hub import HubModel
from exporter.checkpoint.hub_dataset import SUFFIXES, HubDataset, fetch_text, list_texts, parse_dataset
from exporter.errors import BadCheckpoint, UsageError
from exporter.pipeline.calibration import corpus, written
from exporter.pipeline.calibration.rows import Row, read_rows
from exporter.pipeline.progress import Progress
from exporter.types.recipe import CalibrationSpec
from exporter.validate import text as texts
from exporter.validate.text import Windows

__all__ = ["Windows", "calibration_windows", "text_reader"]


def calibration_windows(
    setting: CalibrationSpec,
    checkpoint: Checkpoint,
    scratch: Path,
    device: str,
    progress: Progress,
    keep_bytes: int | None = None,
) -> Windows:
    """Tokens int64 [windows, length] of the text that `setting` names.

    `scratch` keeps what the model wrote itself (text "self"), for the next run; `keep_bytes` as in
    written.by_the_model. Raises UsageError (no such text, too short, not text), Refused (of another
    template), BadCheckpoint (no tokenizer or template), MissingExtra.
    """
    if checkpoint.tokenizer_file is None:
        raise BadCheckpoint(
            f"{checkpoint.path}: tokenizer.json is missing", hint="copy tokenizer.json from the source model"
        )
    count, length = setting.windows, setting.length
    if setting.text == "self":
        return written.by_the_model(checkpoint, count, length, scratch, device, progress, keep_bytes)
    if setting.text == "standard-library":
        return texts.windows(checkpoint.tokenizer_file, texts.standard_library("calibration"), count, length)
    reader, source = text_reader(setting.text, progress, '"standard-library", "self", ')
    return corpus.corpus_windows(checkpoint, reader, source, count, length)


def text_reader(setting: str, progress: Progress, words: str = "") -> tuple[corpus.Reader, str]:
    """Reads the rows of a file, a folder or a Hub dataset, and what to call it. Raises UsageError for no such text.

    words: what else a hint may name, "..., ".
    """
    path = Path(setting).expanduser()
    if path.exists():
        return corpus.files_reader(path), str(path)
    dataset = None if setting.endswith(SUFFIXES) and ":" not in setting else parse_dataset(setting)
    if dataset is None:
        raise UsageError(
            f"no text {setting}",
            hint=f"give {words}a file, a folder, or a Hub dataset (org/name[@revision][:file])",
        )
    pinned, names = list_texts(dataset)
    return _dataset_reader(pinned, names, progress), f"{HubDataset(pinned, dataset.part)} on the Hub"


def _dataset_reader(repo: HubModel, names: list[str], progress: Progress) -> corpus.Reader:
    """Rows file after file: a file is fetched when the ones before it were not enough."""

    def rows(characters: int) -> Iterator[Row]:
        for name in names:
            yield from read_rows(_fetch(repo, name, progress), f"{repo.repo}/{name}", characters)

    return rows


def _fetch(repo: HubModel, name: str, progress: Progress) -> Path:
    seen: int | None = None

    def on_progress(label: str, done: int, total: int) -> None:
        nonlocal seen
        if seen is None:
            progress.stage(f"fetch {repo.repo}", total)
            seen = 0
        progress.advance(done - seen, label)
        seen = done

    path = fetch_text(repo, name, on_progress=on_progress)
    progress.done()
    return path
