"""What somebody was given: a folder, or a repository on the Hub; every artifact of exporter's in it, checked."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from exporter.checkpoint.hub import HubModel, Job, LocalModel, opened, parse_model
from exporter.errors import ExporterError, UsageError
from exporter.hub import client
from exporter.hub.files import RemoteFile, recall_revision
from exporter.pipeline.integrity import (
    BESIDE,
    SUMS,
    Checked,
    check_artifact,
    find_artifacts,
    is_ours,
    is_picture,
    names_in,
)
from exporter.pipeline.progress import Progress
from exporter.pipeline.seal import OWN_CAP, OWN_FILES, SIGNATURE, proof_of
from exporter.pipeline.sign import check_signature, is_file_name, load_public_key, signed_files, unlike_signed

_FILES = (".gguf", ".onnx", ".safetensors")
_LISTS = ("manifest.json", SUMS)


@dataclass(frozen=True)
class Artifact:
    """One artifact that was looked at. name: its folder in the place, "" for the place itself.

    signature: "none", "not checked" (there is one, and no key to check it with), "good", "bad".
    """

    name: str
    checked: Checked
    signature: str
    problems: tuple[ExporterError, ...]


@dataclass(frozen=True)
class Delivery:
    """revision: the commit on the Hub, "" for a folder. beside: files that are of no artifact, and not expected."""

    place: str
    path: Path
    revision: str
    artifacts: tuple[Artifact, ...]
    beside: tuple[str, ...]


@dataclass(frozen=True)
class _Fetched:
    """listed: names by artifact of all files that the repository has. wrong: what its listing already shows."""

    path: Path
    revision: str = ""
    listed: Mapping[str, Collection[str]] = field(default_factory=dict)
    wrong: Mapping[str, tuple[ExporterError, ...]] = field(default_factory=dict)
    beside: tuple[str, ...] = ()


def hub_model(text: str) -> HubModel | None:
    """What "org/name[@revision]" means, where nothing on this machine is spelt so; None for a path."""
    if Path(text).exists() or text.lower().endswith(_FILES):
        return None
    model = parse_model(text)
    return None if isinstance(model, LocalModel) else model


def look(place: Path | HubModel, progress: Progress, *, folder: str = "", public_key: Path | None = None) -> Delivery:
    """Check every artifact in a place, or the one in `folder` of it; downloads what is missing of a repository.

    Raises UsageError where there is none, and as downloads do. What is wrong with an artifact is among its problems.
    """
    if public_key is not None:
        load_public_key(public_key)  # a wrong file is said before hours of work
    found = _fetch(place, folder, progress) if isinstance(place, HubModel) else _local(place)
    names = list(found.listed) or [_name(found.path, path) for path in find_artifacts(found.path)]
    chosen = [name for name in names if not folder or name == folder]
    if not chosen:
        raise _nothing(str(place), folder, names)
    artifacts = tuple(_look_at(found, name, found.wrong.get(name, ()), public_key, progress) for name in chosen)
    return Delivery(str(place), found.path, found.revision, artifacts, found.beside)


def _name(place: Path, folder: Path) -> str:
    return "" if folder == place else folder.relative_to(place).as_posix()


def _look_at(
    found: _Fetched, name: str, wrong: tuple[ExporterError, ...], public_key: Path | None, progress: Progress
) -> Artifact:
    folder = found.path / name
    checked = Checked(folder, problems=wrong) if wrong else check_artifact(folder, progress, found.listed.get(name))
    there = "not checked" if (folder / SIGNATURE).exists() else "none"
    if checked.problems:  # whatever was signed, it is not this
        return Artifact(name, checked, there, checked.problems)
    try:
        if public_key is not None:
            check_signature(folder, public_key, checked.hashes, progress)
            return Artifact(name, checked, "good", ())
        unlike = tuple(unlike_signed(folder, signed_files(folder) or {}, checked.hashes)) if there != "none" else ()
        return Artifact(name, checked, "bad" if unlike else there, unlike)
    except UsageError:  # the key, not the artifact
        raise
    except ExporterError as error:
        return Artifact(name, checked, "bad" if there != "none" else there, (error,))


def _nothing(place: str, folder: str, names: list[str]) -> UsageError:
    if folder and names:
        there = (
            "leave --folder out: its artifact is at the root" if names == [""] else f"it has {', '.join(names)[:300]}"
        )
        return UsageError(f"{place} has no artifact in {folder}", hint=there)
    return UsageError(
        f"{place} has no artifact of exporter's: no manifest.json with {SUMS}",
        hint="a file that others made: exporter verify FILE --against MODEL",
    )


# A folder


def _local(path: Path) -> _Fetched:
    if not path.is_dir():
        raise UsageError(f"{path} is no folder", hint="an artifact's folder, or a Hub id (org/name)")
    if is_ours(path) or not (path / "README.md").exists():
        return _Fetched(path)  # no repository: what else lies here is nobody's business
    artifacts = [each.relative_to(path).as_posix() for each in find_artifacts(path)]
    return _Fetched(path, beside=_beside(names_in(path), artifacts))


def _beside(names: Iterator[str] | Collection[str], artifacts: Collection[str]) -> tuple[str, ...]:
    """Files in no artifact's folder that the root of a repository does not have anyway."""
    inside = tuple(f"{artifact}/" for artifact in artifacts)
    return tuple(sorted(n for n in names if not n.startswith(inside) and n not in BESIDE and not is_picture(n)))


# A repository


def _fetch(model: HubModel, folder: str, progress: Progress) -> _Fetched:
    client.require()
    if client.offline():
        return _cached(model)
    # No choice of files is recorded for the commit: it can be opened as a checkpoint too.
    with opened(model, None, None, lambda job: {}) as job:
        remote = {f.name: f for f in job.client.files(job.revision, recursive=True) if is_file_name(f.name)}
        names = _artifacts(remote)
        chosen = [name for name in names if not folder or name == folder]
        if not chosen:
            raise _nothing(str(model), folder, names)
        listed = {name: _below(remote, name) for name in chosen}
        own = [listed[name][each] for name in chosen for each in sorted(OWN_FILES & listed[name].keys())]
        large = next((file for file in own if file.size > OWN_CAP), None)
        if large:
            raise ExporterError(f"{model}: {large.name} has {large.size:,} bytes", hint="it is none of exporter's")
        _ensure(job, own, f"fetch the lists of {model}", progress)
        wrong = {name: tuple(_unlike_listing(job.snapshot / name, listed[name], str(model))) for name in chosen}
        data = [
            listed[name][each]
            for name in chosen
            if not wrong[name]
            for each in sorted(_named(job.snapshot / name) & listed[name].keys())
        ]
        _ensure(job, data, f"fetch {model}", progress)
        beside = () if "" in names else _beside(remote.keys(), names)
        return _Fetched(job.snapshot, job.revision, listed, wrong, beside)


def _cached(model: HubModel) -> _Fetched:
    """What an earlier run left in the cache; without its listing, the artifact's own lists say whether it is whole."""
    cache = client.default_cache().resolve()
    storage = cache / f"models--{model.repo.replace('/', '--')}"
    asked = model.revision or "main"
    revision = recall_revision(storage, asked) or asked
    path = storage / "snapshots" / revision
    if not path.is_dir():
        raise ExporterError(
            f"offline, and {model} is not in the cache ({cache})", hint="unset HF_HUB_OFFLINE and run again"
        )
    return _Fetched(path, revision)


def _artifacts(names: Collection[str]) -> list[str]:
    """Folders with an artifact of ours, or what is left of one; the root alone where that is one."""
    lists, sums = ({PurePosixPath(n).parent.as_posix() for n in names if PurePosixPath(n).name == of} for of in _LISTS)
    if not lists & sums:
        return []  # either name is common, and in a repository of others says nothing
    found = lists | sums
    if "." in found:
        return [""]
    return sorted(n for n in found if not any(n.startswith(f"{other}/") for other in found))


def _below(remote: Mapping[str, RemoteFile], folder: str) -> dict[str, RemoteFile]:
    start = f"{folder}/" if folder else ""
    return {name.removeprefix(start): file for name, file in remote.items() if name.startswith(start)}


def _ensure(job: Job, files: list[RemoteFile], stage: str, progress: Progress) -> None:
    seen = 0

    def on_progress(name: str, done: int, total: int) -> None:
        nonlocal seen
        progress.advance(done - seen, name)
        seen = done

    progress.stage(stage, sum(file.size for file in files))
    job.ensure(files, on_progress)
    progress.done()


def _manifest(folder: Path) -> Mapping[str, Any]:
    """manifest.json as it came; nothing where it cannot be read, which `check_artifact` says."""
    with suppress(OSError, ValueError, RecursionError):
        body = json.loads((folder / "manifest.json").read_bytes())
        if isinstance(body, dict) and isinstance(body.get("files"), dict):
            return body
    return {}


def _named(folder: Path) -> set[str]:
    """Names of the files that an artifact's lists and its signature name."""
    named = set(_manifest(folder).get("files", {}))
    with suppress(ExporterError):
        named |= (signed_files(folder) or {}).keys()
    return named


def _unlike_listing(folder: Path, listed: Mapping[str, RemoteFile], place: str) -> Iterator[ExporterError]:
    """Data files that the Hub lists with another hash than manifest.json: seen before they are downloaded."""
    for name, each in _manifest(folder).get("files", {}).items():
        file, digest = listed.get(name), each.get("sha256") if isinstance(each, dict) else None
        if file is None:
            yield ExporterError(f"{place}: {name} is not there: manifest.json names it", hint="tell who published it")
        elif file.algorithm == "sha256" and file.digest != digest:
            yield ExporterError(
                f"{place}: {file.name} is not the file that its manifest.json names", hint="tell who published it"
            )


# In words


def source_of(checked: Checked) -> str:
    """What an artifact was made of: "openai/gpt-oss-20b@6cee5e81"."""
    if checked.made is None:
        return ""
    made = checked.made
    return f"{made.repo}@{made.revision[:8]}" if made.repo else made.model


def gates_of(checked: Checked) -> tuple[int, list[str]]:
    """How many gates the sealed verdict has, and the names of those that failed."""
    proof = proof_of(checked.made.body) if checked.made else None
    gates = proof.get("gates", []) if proof else []
    return len(gates), [str(gate["name"]) for gate in gates if not gate["passed"]]
