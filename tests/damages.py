"""One thing spoiled at a time: every kind of bad input that a checkpoint folder can be."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

INDEX = "model.safetensors.index.json"


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file as JSON, and the bytes after it."""
    raw = path.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + n]), raw[8 + n :]


def write_raw(path: Path, header: dict[str, Any] | bytes, body: bytes) -> None:
    """A safetensors file with any header at all."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + body)


def edit_header(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    header, body = header_of(path)
    edit(header)
    write_raw(path, header, body)


def edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def _first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def _set_config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda c: c.update(values))


def _truncate(folder: Path) -> None:
    shard = _first_shard(folder)
    os.truncate(shard, shard.stat().st_size - 1000)


def _truncate_header(folder: Path) -> None:
    os.truncate(_first_shard(folder), 900)


def _missing_shard(folder: Path) -> None:
    _first_shard(folder).unlink()


def _index_names(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        edit_json(folder / INDEX, lambda i: i["weight_map"].update({"lm_head.weight": name}))

    return spoil


def _index_ghost(folder: Path) -> None:
    shard = _first_shard(folder).name
    edit_json(folder / INDEX, lambda i: i["weight_map"].update({"model.layers.9.ghost": shard}))


def _symlink_out(folder: Path) -> None:
    shard = _first_shard(folder)
    outside = folder.parent / (folder.name + "-elsewhere.safetensors")
    shard.rename(outside)
    shard.symlink_to(outside)


def _huge_header(folder: Path) -> None:
    shard = _first_shard(folder)
    raw = shard.read_bytes()
    shard.write_bytes(struct.pack("<Q", 2**63) + raw[8:])


def _header_cap(folder: Path) -> None:
    shard = _first_shard(folder)
    with shard.open("wb") as f:
        f.write(struct.pack("<Q", 100_000_001))
        f.truncate(8 + 100_000_001)  # sparse: no such bytes on disk


def _header_edit(edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    return lambda folder: edit_header(_first_shard(folder), edit)


def _shift(by: int) -> Callable[[dict[str, Any]], None]:
    def edit(header: dict[str, Any]) -> None:
        entry = header["model.embed_tokens.weight"]
        entry["data_offsets"] = [o + by for o in entry["data_offsets"]]

    return edit


def _resize(header: dict[str, Any]) -> None:
    header["lm_head.weight"]["shape"][0] += 1


def _bad_dtype(header: dict[str, Any]) -> None:
    header["lm_head.weight"]["dtype"] = "Q4"


def _negative(header: dict[str, Any]) -> None:
    header["lm_head.weight"]["shape"] = [-2048, -192]


def _duplicate_key(folder: Path) -> None:
    shard = _first_shard(folder)
    header, body = header_of(shard)
    text = json.dumps(header)
    entry = f'"lm_head.weight": {json.dumps(header["lm_head.weight"])}, '
    write_raw(shard, ("{" + entry + text[1:]).encode(), body)


def _trailing(folder: Path) -> None:
    with _first_shard(folder).open("ab") as f:
        f.write(b"PK\x03\x04")


def _nesting(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 200_000)


def _header_nesting(folder: Path) -> None:
    write_raw(_first_shard(folder), b'{"a":' + b"[" * 200_000, b"")


def _pickle(folder: Path) -> None:
    for f in folder.glob("*.safetensors*"):
        f.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def _adapter(folder: Path) -> None:
    for f in folder.glob("*.safetensors*"):
        f.unlink()
    (folder / "adapter_config.json").write_text("{}")
    save_file({"base_model.model.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")


def _no_weights(folder: Path) -> None:
    for f in folder.glob("*.safetensors*"):
        f.unlink()


def _lfs_pointer(folder: Path) -> None:
    _first_shard(folder).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def _fifo(folder: Path) -> None:
    shard = _first_shard(folder)
    shard.unlink()
    os.mkfifo(shard)


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated shard": _truncate,
    "truncated header": _truncate_header,
    "missing shard": _missing_shard,
    "index leaves the folder": _index_names("../model.safetensors"),
    "index leaves by a detour": _index_names("a/../../model.safetensors"),
    "index is absolute": _index_names("/etc/model.safetensors"),
    "index names another file type": _index_names("config.json"),
    "index names a ghost": _index_ghost,
    "index does not list": lambda f: edit_json(f / INDEX, lambda i: i["weight_map"].pop("lm_head.weight")),
    "symlink leaves the folder": _symlink_out,
    "header larger than the file": _huge_header,
    "header above the cap": _header_cap,
    "overlap": _header_edit(_shift(-64)),
    "hole": _header_edit(_shift(64)),
    "shape disagrees with bytes": _header_edit(_resize),
    "unknown dtype": _header_edit(_bad_dtype),
    "negative shape": _header_edit(_negative),
    "duplicate key": _duplicate_key,
    "trailing bytes": _trailing,
    "nesting bomb": _nesting,
    "nesting bomb in a header": _header_nesting,
    "pickle": _pickle,
    "adapter only": _adapter,
    "no weights": _no_weights,
    "git-lfs pointer": _lfs_pointer,
    "pipe": _fifo,
    "no config": _no_config,
    "absurd layers": _set_config(num_hidden_layers=400_000_000),
    "wrong layers": _set_config(num_hidden_layers=5, layer_types=None),
    "wrong experts": _set_config(num_local_experts=32),
    "not gpt-oss": _set_config(model_type="llama"),
}


def damage(folder: Path, kind: str) -> Path:
    """Spoil one thing in a folder that `copy` wrote. Returns the folder."""
    DAMAGES[kind](folder)
    return folder
