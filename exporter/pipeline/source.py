"""From what the user typed to an opened checkpoint, or to a configuration alone where that is enough."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.checkpoint.hub import (
    HubModel,
    HubSnapshot,
    LocalModel,
    fetch,
    fetch_headers,
    fetch_metadata,
    list_files,
    parse_model,
)
from exporter.errors import UsageError
from exporter.model import ModelConfig
from exporter.model.released import RELEASED, released_repo
from exporter.pipeline.files import file_stamp
from exporter.pipeline.plan import released_scheme
from exporter.pipeline.progress import Progress
from exporter.types import Scheme, TensorSpec


def fingerprint(checkpoint: Checkpoint, hashes: Mapping[str, str]) -> str:
    """Changes when the weights or the configuration do.

    Hashes where the Hub gave them; otherwise sizes, times and inodes, which cost nothing. The time of the
    last change of the inode cannot be set by a copy or a touch, as the modification time can.
    """
    h = hashlib.sha256(json.dumps(checkpoint.config_raw, sort_keys=True).encode())
    for path in checkpoint.shards:
        known = hashes.get(path.name) or file_stamp(path)
        h.update(f"{path.name} {known}\n".encode())
    return h.hexdigest()


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint ready to be read. `hashes`: SHA-256 by file name where they are known already."""

    name: str
    checkpoint: Checkpoint
    hashes: dict[str, str]

    @property
    def config(self) -> ModelConfig:
        return self.checkpoint.config

    @property
    def named(self) -> str:
        """Its Hub id and revision, or the name of its folder."""
        repo, revision = self.checkpoint.repo, self.checkpoint.revision
        return (f"{repo}@{revision}" if revision else repo) if repo else self.name

    def scheme_of(self, spec: TensorSpec) -> Scheme:
        return self.checkpoint.scheme(spec.name)

    def fingerprint(self) -> str:
        return fingerprint(self.checkpoint, self.hashes)


@dataclass(frozen=True)
class ModelOutline:
    """Enough for a plan: no weight is there, or none was read."""

    name: str
    config: ModelConfig
    scheme_of: Callable[[TensorSpec], Scheme]
    source: str


def model_name(model: LocalModel | HubModel) -> str:
    """The folder and file name of a model's artifacts: the last part of its path or Hub id."""
    name = model.repo.split("/")[-1] if isinstance(model, HubModel) else model.path.resolve().name
    if not name.isprintable() or not _utf8(name):
        raise UsageError(f"the folder name {name!a} cannot name an artifact", hint="rename the folder, or link to it")
    return name or "model"


def _utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def open_model(text: str, progress: Progress) -> OpenedModel:
    """Open a folder, or fetch and check a Hub model and open that."""
    model = _meant(text)
    if isinstance(model, LocalModel):
        return OpenedModel(model_name(model), open_checkpoint(model.path), {})
    snapshot = _fetch(model, progress)
    checkpoint = open_checkpoint(snapshot.path, repo=snapshot.repo, revision=snapshot.revision)
    hashes = {name: digest.sha256 for name, digest in snapshot.files.items()}
    return OpenedModel(model_name(model), checkpoint, hashes)


def local_folder(text: str, progress: Progress) -> Path:
    """The folder that `text` means, a Hub model fetched and checked; whatever it holds."""
    model = _meant(text)
    return model.path if isinstance(model, LocalModel) else _fetch(model, progress).path


def _fetch(model: HubModel, progress: Progress) -> HubSnapshot:
    started, seen = False, 0

    def on_progress(name: str, done: int, total: int) -> None:
        nonlocal started, seen
        if not started:
            progress.stage(f"fetch {model}", total)
            started = True
        progress.advance(done - seen, name)
        seen = done

    snapshot = fetch(model, on_progress=on_progress)
    progress.done()
    return snapshot


def _meant(text: str) -> LocalModel | HubModel:
    """A folder, a Hub id, or the short name of a released model."""
    repo = None if Path(text).is_dir() else released_repo(text)
    return HubModel(repo) if repo else parse_model(text)


def must_download(text: str) -> bool:
    """Whether `text` means a Hub model of which weights are still to come."""
    model = _meant(text)
    return isinstance(model, HubModel) and list_files(model).missing > 0


def outline_model(text: str) -> ModelOutline:
    """What `plan` and `fit` need: headers of a folder, or the configuration of a Hub model.

    The released models are known, so "openai/gpt-oss-20b", "gpt-oss-120b" or "20b" ask nobody.
    """
    model = _meant(text)
    if isinstance(model, HubModel) and model.repo in RELEASED and model.revision is None:
        return ModelOutline(model_name(model), RELEASED[model.repo], released_scheme, "the released configuration")
    return (
        replace(_outline_folder(model.path), name=model_name(model))
        if isinstance(model, LocalModel)
        else _outline_hub(model)
    )


def _outline_folder(path: Path) -> ModelOutline:
    with open_checkpoint(path) as checkpoint:
        schemes = {s.name: checkpoint.scheme(s.name) for s in checkpoint.specs}
        return ModelOutline("", checkpoint.config, lambda s: schemes[s.name], checkpoint.layout)


def _outline_hub(model: HubModel) -> ModelOutline:
    """From the real headers of the shards, by two small requests each, so that what is planned is what is there.

    They are laid beside the small files as sparse files of the right size, and opened like any folder.
    """
    headers, listing = fetch_headers(model), list_files(model)
    snapshot = fetch_metadata(model)
    sizes = {f.name: f.size for f in listing.files}
    with tempfile.TemporaryDirectory(prefix="exporter-plan-") as folder:
        for name in snapshot.files:
            shutil.copyfile(snapshot.path / name, Path(folder) / name)
        for name, header in headers.items():
            with open(Path(folder) / name, "wb") as f:
                f.write(header)
                f.truncate(sizes[name])
        outline = _outline_folder(Path(folder))
    return replace(outline, name=model_name(model), source=f"{outline.source} at {snapshot.revision[:8]}")
