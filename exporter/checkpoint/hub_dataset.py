"""Text of a dataset repository on the Hugging Face Hub, file by file, checked as model files are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from exporter.checkpoint.hub import HubModel, Job, Progress, opened
from exporter.errors import UsageError
from exporter.hub.files import RemoteFile

SUFFIXES = (".jsonl", ".json", ".txt", ".parquet", ".jsonl.gz", ".json.gz", ".txt.gz")
# Files of the datasets library about a dataset, not of it.
_ABOUT = ("dataset_infos.json", "dataset_dict.json", "dataset_info.json", "state.json")
_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<part>.+))?", re.ASCII)


@dataclass(frozen=True)
class HubDataset:
    """`part` names a file, a folder or a split ("train"); None: the split "train", or all where there is none."""

    repo: HubModel
    part: str | None = None

    def __str__(self) -> str:
        return str(self.repo) + (f":{self.part}" if self.part else "")


def parse_dataset(text: str) -> HubDataset | None:
    """What "org/name[@revision][:part]" means; None when it is not spelt so."""
    match = _ID.fullmatch(text)
    if match is None or ".." in match["repo"] or "--" in match["repo"]:
        return None
    return HubDataset(HubModel(match["repo"], match["revision"], "dataset"), match["part"])


def list_texts(
    dataset: HubDataset, *, cache_dir: Path | None = None, endpoint: str | None = None
) -> tuple[HubModel, list[str]]:
    """The repository at its commit, and the names of the text files that `dataset` means, sorted.

    Raises UsageError when there are none, and as `hub.fetch` does.
    """
    with opened(dataset.repo, cache_dir, endpoint, _text_files) as job:
        names = sorted(job.record.files)
        pinned = HubModel(dataset.repo.repo, job.revision, "dataset")
    chosen = choose(names, dataset.part)
    if not chosen:
        has = f"it has {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else "it has none"
        what = f"no text files called {dataset.part}" if dataset.part and names else "no text files"
        raise UsageError(
            f"{dataset}: {what} ({has})",
            hint=f"text files end in {', '.join(SUFFIXES[:4])}; choose with org/name:FILE",
        )
    return pinned, chosen


def fetch_text(
    repo: HubModel,
    name: str,
    *,
    on_progress: Progress | None = None,
    cache_dir: Path | None = None,
    endpoint: str | None = None,
) -> Path:
    """One file of what `list_texts` gave, downloaded where missing and checked. Raises as `hub.fetch` does."""
    with opened(repo, cache_dir, endpoint, _text_files) as job:
        return job.ensure([job.record.files[name]], on_progress).path / name


def _text_files(job: Job) -> dict[str, RemoteFile]:
    found = job.client.files(job.revision, recursive=True)
    return {f.name: f for f in found if f.name.endswith(SUFFIXES) and Path(f.name).name not in _ABOUT}


def choose(names: list[str], part: str | None) -> list[str]:
    """The files that `part` means among `names`."""
    if part in names:
        return [n for n in names if n == part]
    word = re.compile(rf"(?<![a-z0-9]){re.escape(part or 'train')}(?![a-z0-9])")
    found = [n for n in names if word.search(n)]
    return found or (names if part is None else [])
