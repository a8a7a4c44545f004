"""A checkpoint from the Hugging Face Hub: one commit, only the files needed, every byte checked.

The Hub client accepts a file with one wrong byte as long as its length is right, so each file is
hashed here against the Hub's own listing and, for the releases, against hashes that exporter carries.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from exporter.errors import BadCheckpoint, ExporterError, Refused, UsageError, did_you_mean
from exporter.hub.client import HubClient, Kind, default_cache, offline, partial_path, require
from exporter.hub.failures import explained
from exporter.hub.files import (
    FileDigest,
    Record,
    RemoteFile,
    discard,
    hash_file,
    recall_revision,
    remember_revision,
)
from exporter.model.released import KNOWN_SHA256, RELEASED
from exporter.types.sizes import format_size

# (name of the file in work, bytes arrived so far of all files, bytes of all files). May be called
# from another thread.
Progress = Callable[[str, int, int], None]

INDEX = "model.safetensors.index.json"
METADATA = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "LICENSE",
    "README.md",
    INDEX,
)
_METADATA_CAP = 256 << 20  # bytes; tokenizer.json of the release is 28 MB
_HEADER_CAP = 100_000_000  # bytes; the limit of the safetensors format
_PICKLE = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*")
_HUB_ID = re.compile(r"([A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95})(?:@([A-Za-z0-9_][\w./-]*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class LocalModel:
    """A folder on this machine."""

    path: Path


@dataclass(frozen=True)
class HubModel:
    """A repository on the Hub; `revision` None means main."""

    repo: str
    revision: str | None = None
    kind: Kind = "model"

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class HubListing:
    """What a download of `revision` (a full commit id) takes. `missing`: bytes not yet on this disk."""

    repo: str
    revision: str
    files: tuple[RemoteFile, ...]
    missing: int

    @property
    def total(self) -> int:
        return sum(f.size for f in self.files)


@dataclass(frozen=True)
class HubSnapshot:
    """Checked files of one commit. `path` holds them, as links into the Hub cache."""

    path: Path
    repo: str
    revision: str
    files: dict[str, FileDigest]
    bytes_downloaded: int


def parse_model(text: str) -> LocalModel | HubModel:
    """What MODEL on the command line means: a folder, or "org/name[@revision]" on the Hub.

    An existing folder wins over a Hub id of the same spelling. Raises UsageError.
    """
    path = Path(text).expanduser()
    if text and path.is_dir():
        return LocalModel(path)
    if path.is_file():
        raise UsageError(f"{text} is a file", hint=f"give the folder: {path.parent}")
    if text.startswith(("/", ".", "~")) or "\\" in text:
        raise UsageError(f"no folder {text}", hint="give a folder with config.json, or a Hub id (org/name)")
    if "://" in text:
        guess = text.split("://", 1)[1].split("/")[1:3]
        raise UsageError(f"{text} is an address", hint=f"give the Hub id: {'/'.join(guess) or 'org/name'}")
    match = _HUB_ID.fullmatch(text)
    if match and ".." not in text and "--" not in match[1] and not (match[2] or "").endswith("/"):
        return HubModel(match[1], match[2])
    short = {repo.split("/")[1]: repo for repo in RELEASED}
    near = short.get(text)
    maybe = f' Did you mean "{near}"?' if near else did_you_mean(text, [*RELEASED, *short])
    raise UsageError(
        f'"{text}" is neither a folder nor a Hub id.{maybe}', hint="a Hub id is org/name or org/name@revision"
    )


def list_files(model: HubModel, *, cache_dir: Path | None = None, endpoint: str | None = None) -> HubListing:
    """The files that `fetch` would bring, with sizes and hashes; downloads the shard index only."""
    with opened(model, cache_dir, endpoint) as job:
        files = tuple(job.files)
        missing = sum(f.size for f in files if not (job.snapshot / f.name).exists())
        return HubListing(model.repo, job.revision, files, missing)


def fetch(
    model: HubModel,
    *,
    on_progress: Progress | None = None,
    cache_dir: Path | None = None,
    endpoint: str | None = None,
) -> HubSnapshot:
    """Everything that a conversion needs, downloaded where missing and checked.

    The revision is resolved once. A second call with an unchanged cache asks the Hub for the
    revision only, or nothing at all when `model.revision` is a full commit id or HF_HUB_OFFLINE is
    set. Raises ExporterError: UsageError (no such model or revision), Refused (no access, no space,
    only pickle files), BadCheckpoint (index), and others that a second run can cure.
    """
    with opened(model, cache_dir, endpoint) as job:
        return job.ensure(job.files, on_progress)


def fetch_metadata(model: HubModel, *, cache_dir: Path | None = None, endpoint: str | None = None) -> HubSnapshot:
    """Configuration, tokenizer, index and card only: what `plan` reads. Raises as `fetch` does."""
    with opened(model, cache_dir, endpoint) as job:
        return job.ensure([f for f in job.files if f.name in METADATA], None)


def fetch_headers(model: HubModel, *, cache_dir: Path | None = None, endpoint: str | None = None) -> dict[str, bytes]:
    """The header of each shard as it lies in the file, its 8 length bytes included.

    Two ranged requests a shard at most, so that a plan needs no weights. Not hashed: a header is
    checked as part of its shard when that is fetched. Raises as `fetch` does.
    """
    with opened(model, cache_dir, endpoint) as job:
        return {f.name: job.header(f) for f in job.files if f.name.endswith(".safetensors")}


# --- one request ----------------------------------------------------------------------------------


class Job:
    """One commit of one repository, with the files selected."""

    def __init__(self, client: HubClient, storage: Path, record: Record) -> None:
        self.client, self.storage, self.record = client, storage, record
        self.revision = record.revision
        self.snapshot = storage / "snapshots" / record.revision
        self.downloaded = 0

    @property
    def files(self) -> list[RemoteFile]:
        return sorted(self.record.files.values(), key=lambda f: (f.name not in METADATA, f.name))

    def model_files(self) -> dict[str, RemoteFile]:
        """What a conversion needs, from the Hub's listing and the shard index."""
        root = {f.name: f for f in self.client.files(self.revision)}
        chosen = [root[n] for n in METADATA if n in root and _wanted(root[n])]
        index = root.get(INDEX)
        if index:
            self.ensure([index], None)
        names = shard_names((self.snapshot / INDEX).read_bytes() if index else None, root, self.client.repo)
        files = {f.name: f for f in [*chosen, *(root[n] for n in names)]}
        known = KNOWN_SHA256.get((self.client.repo, self.revision), {})
        for f in files.values():
            if f.algorithm == "sha256" and known.get(f.name, f.digest) != f.digest:
                raise self._unlike_release(f.name)
        return files

    def ensure(self, files: Iterable[RemoteFile], on_progress: Progress | None) -> HubSnapshot:
        """Download what is missing of `files` and check all of them."""
        files = list(files)
        self._check_room(files)
        total, arrived = sum(f.size for f in files), 0
        digests: dict[str, FileDigest] = {}
        for file in files:
            path, started = self.snapshot / file.name, arrived

            def advance(n: int, name: str = file.name) -> None:
                nonlocal arrived
                arrived += n
                self.downloaded += max(n, 0)
                if on_progress:
                    on_progress(name, min(arrived, total), total)

            if not path.exists():
                arrived += _existing(partial_path(self.storage, file))
                self.client.fetch(file, self.revision, self.storage, advance)
            digests[file.name] = self._checked(path, file)
            arrived = started + file.size
            if on_progress:
                on_progress(file.name, arrived, total)
        return HubSnapshot(self.snapshot, self.client.repo, self.revision, digests, self.downloaded)

    def _checked(self, path: Path, file: RemoteFile) -> FileDigest:
        digest = self.record.known(path, file)
        if digest is None:
            digest = hash_file(path, file)
            if digest is None:
                self.record.forget(file)
                discard(path, self.client.cache)
                raise ExporterError(
                    f"{self.client.repo}: {file.name} is damaged: its bytes are not those that the Hub lists",
                    hint="it has been removed from the cache; run the same command again",
                )
            self.record.remember(path, file, digest)
        known = KNOWN_SHA256.get((self.client.repo, self.revision), {})
        if known.get(file.name, digest.sha256) != digest.sha256:
            discard(path, self.client.cache)
            raise self._unlike_release(file.name)
        return digest

    def _unlike_release(self, name: str) -> ExporterError:
        return Refused(
            f"{self.client.repo}@{self.revision[:8]}: {name} is not the released file, whose hash is known",
            hint="check HF_ENDPOINT: a mirror may serve altered files",
        )

    def _check_room(self, files: Iterable[RemoteFile]) -> None:
        absent = [f for f in files if not (self.snapshot / f.name).exists()]
        if absent and offline():
            raise _offline(f"{self.client.repo} lacks {absent[0].name} in the cache ({self.client.cache})")
        need = sum(f.size - min(f.size, _existing(partial_path(self.storage, f))) for f in absent)
        folder = self.storage
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if need > free:
            raise Refused(
                f"{self.client.repo} needs {format_size(need)} more on the disk of {self.client.cache}, "
                f"which has {format_size(free)} free",
                hint="free space, or set HF_HOME to a larger disk",
            )

    def header(self, file: RemoteFile) -> bytes:
        path, where = self.snapshot / file.name, f"{self.client.repo}: {file.name}"
        first = min(file.size, 1 << 18)

        def start(stop: int) -> bytes:
            if path.exists():
                with path.open("rb") as f:
                    return f.read(stop)
            return self.client.header_bytes(file, self.revision, stop)

        raw = start(first)
        length = 8 + int.from_bytes(raw[:8], "little")
        if len(raw) < 8 or length > min(file.size, _HEADER_CAP):
            raise BadCheckpoint(
                f"{where} has a header of {length:,} bytes in a file of {file.size:,}",
                hint="the repository is damaged: use another revision",
            )
        raw = raw[:length] if length <= first else start(length)
        if len(raw) != length:
            raise ExporterError(f"{where}: its header arrived incomplete", hint="run the same command again")
        return raw


@contextmanager
def opened(
    model: HubModel,
    cache_dir: Path | None,
    endpoint: str | None,
    select: Callable[[Job], dict[str, RemoteFile]] = Job.model_files,
) -> Iterator[Job]:
    """One commit of a repository; `select` chooses its files when it is met for the first time."""
    require()
    cache = (cache_dir or default_cache()).resolve()
    client = HubClient(model.repo, cache, endpoint, model.kind)
    storage = cache / f"{model.kind}s--{model.repo.replace('/', '--')}"
    with explained(str(model), client):
        asked = model.revision or "main"
        if _COMMIT.fullmatch(asked):
            revision = asked
        elif offline():
            revision = recall_revision(storage, asked) or ""
        else:
            revision = client.resolve(asked)
            remember_revision(storage, asked, revision)
        job = Job(client, storage, Record.load(storage, revision))
        if not job.record.files:
            if offline():
                raise _offline(f"{model} is not in the cache ({cache})")
            job.record.files = select(job)
            job.record.save()
        yield job


def _offline(problem: str) -> ExporterError:
    return ExporterError(
        f"offline, and {problem}",
        hint="unset HF_HUB_OFFLINE and run again, or give a folder that holds the checkpoint",
    )


# --- which files ----------------------------------------------------------------------------------


def shard_names(index: bytes | None, root: Iterable[str], where: str) -> list[str]:
    """Names of the weight files among `root`, the names at the root of `where`.

    With an index, exactly the files that it names: released shard names are off by one, so no
    pattern is trusted. Without one, every *.safetensors at the root. Raises BadCheckpoint, Refused.
    """
    names = set(root)
    if "config.json" not in names:
        if "adapter_config.json" in names:
            raise Refused(f"{where} is an adapter, not a model", hint="merge it into its base model first")
        raise BadCheckpoint(f"{where} has no config.json", hint="is it a gpt-oss model?")
    if index is not None:
        return _indexed(index, names, where)
    shards = sorted(n for n in names if n.endswith(".safetensors"))
    bad = [n for n in shards if not _PLAIN.fullmatch(n)]
    if bad:
        raise BadCheckpoint(f"{where} has a file called {bad[0]!r}", hint="rename it in the repository")
    if not shards:
        pickles = sorted(n for n in names if n.endswith(_PICKLE))
        if pickles:
            raise Refused(
                f"{where} has its weights as pickle files only ({pickles[0]}), which can run code when read",
                hint="use a revision or repository with safetensors",
            )
        raise BadCheckpoint(f"{where} has no *.safetensors at its root", hint="use a repository with weights")
    return shards


def _indexed(index: bytes, names: set[str], where: str) -> list[str]:
    hint = "the repository is damaged: use another revision"
    try:
        weight_map = json.loads(index)["weight_map"]
        shards = sorted(set(weight_map.values()))
        good = bool(shards) and all(isinstance(n, str) for n in shards)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good, shards = False, []
    if not good:
        raise BadCheckpoint(f"{where}: {INDEX} is not a shard index", hint=hint)
    for name in shards:
        if not _PLAIN.fullmatch(name) or not name.endswith(".safetensors"):
            raise BadCheckpoint(
                f"{where}: {INDEX} names {name!r}, which is not a safetensors file beside it", hint=hint
            )
        if name not in names:
            raise BadCheckpoint(f"{where}: {INDEX} names {name}, which is not there", hint=hint)
    return shards


def _wanted(file: RemoteFile) -> bool:
    if file.size <= _METADATA_CAP:
        return True
    raise Refused(f"{file.name} has {file.size / 1e6:,.0f} MB, above anything plausible", hint="use another revision")


def _existing(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
