"""A checkpoint folder: which files are in use, and that none of them lies outside it.

The index decides which shards count, never their names: the released shards are called
`model-00000-of-00002` to `model-00002-of-00002`, three of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.checkpoint.headers import read_header, read_json, read_small, shown, shown_list
from exporter.errors import BadCheckpoint
from exporter.types import TensorRef

INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(?P<stem>.+?)-{1,2}(?P<number>\d+)-of-(?P<of>\d+)\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SMALL = 4 << 20  # bytes; a config or a template


@dataclass(frozen=True)
class Folder:
    """Files of a checkpoint, with the headers of its shards read and checked.

    `root` is the folder asked for, `weights` the one that holds the shards (`root` or `root/original`).
    `index_total` is `metadata.total_size` of the index, in bytes. `notes` are remarks for a person.
    """

    root: Path
    weights: Path
    shards: list[Path]
    refs: dict[str, TensorRef]
    index_total: int | None = None
    sizes: dict[Path, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def find(self, name: str) -> Path | None:
        """A small file beside the weights, in the folder asked for, or in the parent of `original/`."""
        return find_beside(self.root, self.weights, name)


def find_beside(root: Path, weights: Path, name: str) -> Path | None:
    """Path of `name` in one of the folders that belong to this checkpoint; links must stay inside."""
    places = [weights, root] if weights != root else [root]
    if root.name == "original":
        places.append(root.parent)
    for place in places:
        path = place / name
        if path.is_symlink() or path.exists():
            return inside(path, place)
    return None


def inside(path: Path, folder: Path) -> Path:
    """`path`, when it and what it links to lie in `folder`. Raises BadCheckpoint.

    The Hub's cache links snapshots/REVISION/file to ../../blobs/HASH: links are allowed as far as
    the `models--...` folder that holds both.
    """
    home = folder.resolve()
    allowed = [home]
    for parent in (home, *home.parents):
        if parent.parent.name == "snapshots" and parent.parent.parent.name.startswith("models--"):
            allowed.append(parent.parent.parent)
            break
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # a link that leads to itself
        raise BadCheckpoint(f"{path} is a link that leads nowhere", "copy the file itself here") from None
    if not any(target.is_relative_to(a) for a in allowed):
        raise BadCheckpoint(
            f"{path} is a link to {target}, outside the checkpoint's folder",
            "copy the file itself into the folder, or give the folder that holds it",
        )
    return path


def open_folder(root: Path) -> Folder:
    """Find the weights under `root` and read every header. Raises BadCheckpoint."""
    weights = find_weights(root)
    index = _index_file(weights)
    if index is not None:
        return _with_index(root, weights, index)
    shards = [inside(p, weights) for p in _safetensors(weights)]
    missing = _gap(shards)
    if missing:
        raise BadCheckpoint(f"{weights}: shards are missing: {shown_list(missing)}", "download the missing files")
    notes = ["several shards and no index: the headers of all of them are used"] if len(shards) > 1 else []
    return _union(root, weights, shards, notes=notes)


def find_weights(root: Path) -> Path:
    """The folder of the safetensors files: `root`, or `root/original`. Raises BadCheckpoint."""
    if not root.is_dir():
        if root.is_file():
            raise BadCheckpoint(f"{root} is a file, not a checkpoint folder", f"give its folder: {root.parent}")
        raise BadCheckpoint(f"{root}: no such folder", "give a checkpoint folder or a Hub id (org/name)")
    original = root / "original"
    for place in (root, original):
        if place.is_dir() and (_safetensors(place) or _index_file(place) is not None):
            return root if place == root else inside(place, root)
    names = sorted(p.name for p in root.iterdir())
    if "adapter_config.json" in names:
        raise BadCheckpoint(
            f"{root}: a LoRA adapter without the model it belongs to",
            "merge it first (peft: merge_and_unload, then save_pretrained) and give the merged folder",
        )
    pickles = [n for n in names if n.endswith(_PICKLES)]
    if pickles:
        raise BadCheckpoint(
            f"{root}: weights are pickle files ({shown_list(pickles)}), which can run code and are never loaded",
            "save the model as safetensors (save_pretrained does so by default)",
        )
    gguf = [n for n in names if n.endswith(".gguf")]
    if gguf:
        raise BadCheckpoint(
            f"{root}: holds GGUF files ({shown_list(gguf)}), which are a result and not a source",
            "give the safetensors checkpoint they were made from",
        )
    raise BadCheckpoint(f"{root}: no safetensors files", "give a checkpoint folder or a Hub id (org/name)")


def _safetensors(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.iterdir() if p.suffix == ".safetensors" and not p.name.startswith((".", "adapter_model"))
    )


def _index_file(folder: Path) -> Path | None:
    if (folder / INDEX).is_file() or (folder / INDEX).is_symlink():
        return inside(folder / INDEX, folder)
    others = sorted(folder.glob("*.safetensors.index.json"))
    if len(others) > 1:
        raise BadCheckpoint(
            f"{folder}: several indexes: {shown_list(p.name for p in others)}", f"keep one, named {INDEX}"
        )
    return inside(others[0], folder) if others else None


def _with_index(root: Path, weights: Path, index: Path) -> Folder:
    raw = read_json(index)
    weight_map = _weight_map(index, raw)
    names = sorted(set(weight_map.values()))
    gone = [n for n in names if not (weights / n).exists()]
    if gone:
        others = len(_safetensors(weights))
        raise BadCheckpoint(
            f"{weights}: shards named by {index.name} are missing: {shown_list(gone)}",
            "download the missing files"
            + (f", or delete {index.name} if another save left it there" if others else ""),
        )
    folder = _union(root, weights, [inside(weights / n, weights) for n in names], _total(raw))
    absent = [n for n, f in weight_map.items() if n not in folder.refs or folder.refs[n].path.name != f]
    if absent:
        raise BadCheckpoint(
            f"{index}: names tensors that their shard does not hold: {shown_list(absent)}",
            "the index belongs to another save: take the one of these shards, or delete it",
        )
    unlisted = [n for n in folder.refs if n not in weight_map]
    if unlisted:
        raise BadCheckpoint(
            f"{index}: does not list tensors that the shards hold: {shown_list(unlisted)}",
            "the index belongs to another save: take the one of these shards, or delete it",
        )
    spare = [p.name for p in _safetensors(weights) if p.name not in names]
    if spare:
        folder.notes.append(f"not in the index, not used: {shown_list(spare)}")
    return folder


def _weight_map(index: Path, raw: dict[str, Any]) -> dict[str, str]:
    weight_map = raw.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadCheckpoint(f"{index}: has no weight_map", "download or copy this file again")
    for tensor, name in weight_map.items():
        # One plain name: "..", absolute paths, drives, subfolders and other kinds of file all stop here.
        plain = isinstance(name, str) and name.isprintable() and not set(name) & set("/\\:")
        if not plain or not name.endswith(".safetensors") or name.startswith("."):
            raise BadCheckpoint(
                f'{index}: {shown(tensor)} is said to lie in "{shown(name)}", '
                "which is not a safetensors file of this folder",
                "download or copy this file again from a source you trust",
            )
    return weight_map


def _total(raw: dict[str, Any]) -> int | None:
    metadata = raw.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if isinstance(total, float) and total.is_integer():  # some savers write 1.376e10
        total = int(total)
    return total if isinstance(total, int) and not isinstance(total, bool) else None


def _union(
    root: Path, weights: Path, shards: list[Path], total: int | None = None, notes: list[str] | None = None
) -> Folder:
    folder = Folder(root, weights, shards, {}, total, {}, notes or [])
    for shard in shards:
        header = read_header(shard)
        folder.sizes[shard] = header.file_bytes
        twice = folder.refs.keys() & header.refs.keys()
        if twice:
            first = min(twice)
            raise BadCheckpoint(
                f"{weights}: tensors are in two files: {shown_list(sorted(twice))} "
                f"({folder.refs[first].path.name} and {shard.name})",
                "keep the files of one save in the folder",
            )
        folder.refs.update(header.refs)
    if numbered_from_zero(shards):
        folder.notes.append("shard names count from 00000 (off by one, as OpenAI released them)")
    return folder


def _numbers(shards: list[Path]) -> tuple[set[int], int, str] | None:
    """(numbers present, the N of "-of-N", a name to vary) when every file follows one pattern."""
    found = [_SHARD.fullmatch(p.name) for p in shards]
    matches = [m for m in found if m is not None]
    if not matches or len(matches) != len(shards) or len({(m["stem"], m["of"]) for m in matches}) != 1:
        return None
    return {int(m["number"]) for m in matches}, int(matches[0]["of"]), matches[0][0]


def numbered_from_zero(shards: list[Path]) -> bool:
    """Whether names run from 0 to N of "-of-N": N + 1 files."""
    numbers = _numbers(shards)
    return numbers is not None and numbers[0] == set(range(numbers[1] + 1))


def _gap(shards: list[Path]) -> list[str]:
    """Names of shards that the pattern of the others asks for."""
    numbers = _numbers(shards)
    if numbers is None or numbers[1] > 10_000:
        return []
    have, of, name = numbers
    if have in (set(range(of)), set(range(of + 1))):
        return []
    m = _SHARD.fullmatch(name)
    assert m is not None
    begin, end = m.span("number")
    width = end - begin
    return [f"{name[:begin]}{i:0{width}}{name[end:]}" for i in range(1, of + 1) if i not in have]


def read_text(path: Path) -> str:
    """A small text file in UTF-8. Raises BadCheckpoint."""
    try:
        return read_small(path, _SMALL).decode("utf-8")
    except UnicodeDecodeError:
        raise BadCheckpoint(f"{path}: not UTF-8 text", "download or copy this file again") from None
