"""A gpt-oss checkpoint, opened: configuration, canonical tensors, and their bytes leaf by leaf."""

from __future__ import annotations

import math
from pathlib import Path
from types import TracebackType
from typing import Any

from exporter.checkpoint.folder import Folder, open_folder, read_text
from exporter.checkpoint.headers import read_json, shown
from exporter.checkpoint.layouts import Layout, Mapping, Source, map_layout
from exporter.checkpoint.views import OpenFiles
from exporter.errors import BadCheckpoint
from exporter.model import ModelConfig, released_bytes, tensor_specs
from exporter.types import QTensor, Scheme, TensorRef, TensorSpec

_FROM_SOURCE = "copy it from the model this one was made from"


class Checkpoint:
    """Canonical tensors of a checkpoint, read as they are stored. Thread-safe; a context manager.

    `specs` lists the canonical tensors in the order of `model.tensor_specs`; `refs` the stored ones
    by stored name; `shards` the weight files in use. `config_raw` is config.json as it lies there.
    """

    def __init__(self, folder: Folder, repo: str | None, revision: str | None) -> None:
        self.path = folder.root
        self.repo, self.revision = repo, revision
        self.config_file, self.config_raw, self.config = read_config(folder)
        mapping: Mapping = map_layout(folder.refs, self.config, str(folder.weights))
        self.layout: Layout = mapping.layout
        self.refs: dict[str, TensorRef] = folder.refs
        self.shards: list[Path] = folder.shards
        self.specs: list[TensorSpec] = tensor_specs(self.config)
        self.index_total: int | None = folder.index_total
        self.notes: list[str] = folder.notes + mapping.notes
        self.unused: list[str] = mapping.unused
        self._folder = folder
        self._sources: dict[str, Source] = mapping.sources
        self._shapes = {s.name: s.shape for s in self.specs}
        self._files = OpenFiles(folder.sizes)
        self.tokenizer_file: Path | None = folder.find("tokenizer.json")
        self.generation_config = self._optional_json("generation_config.json")
        self.tokenizer_config = self._optional_json("tokenizer_config.json")
        self.chat_template: str | None = read_template(folder.find("chat_template.jinja"), self.tokenizer_config)
        self._check_bytes()

    # What is there

    @property
    def file_bytes(self) -> int:
        """Bytes of the weight files, headers included."""
        return sum(self._folder.sizes[s] for s in self.shards)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all stored tensors: what an index calls `total_size`."""
        return sum(r.nbytes for r in self.refs.values())

    @property
    def predicted_bytes(self) -> int:
        """Tensor bytes that the configuration implies for the way each tensor is stored."""
        total = 0
        for spec in self.specs:
            if spec.role == "head" and self.head_is_tied:
                continue
            rows = math.prod(spec.shape[:-1])
            total += rows * self.scheme(spec.name).row_bytes(spec.shape[-1])
        return total

    @property
    def head_is_tied(self) -> bool:
        """Whether the head is not stored and reads as the embeddings."""
        return self.stored("lm_head.weight") == self.stored("model.embed_tokens.weight")

    def scheme(self, name: str) -> Scheme:
        """How the canonical tensor is stored: "mxfp4", "bf16", "f16" or "f32"."""
        return self._sources[name].scheme

    def stored(self, name: str) -> tuple[TensorRef, ...]:
        """The stored tensors that hold the canonical tensor `name`."""
        source = self._sources[name]
        return source.data.refs() + (source.scales.refs() if source.scales else ())

    def find(self, name: str) -> Path | None:
        """A file of this checkpoint by name ("README.md"), or None."""
        return self._folder.find(name)

    # The bytes

    def read(self, name: str, start: int, stop: int) -> QTensor:
        """Leading indices [start, stop) of a canonical tensor, as stored.

        MXFP4: packed codes and e8m0 scales, moved without arithmetic. Floats: their little-endian
        bytes, uint8 [..., K * itemsize]. Holds one stored leaf in memory beside the result. Raises
        ExporterError when the file no longer has the bytes.
        """
        source = self._sources[name]
        if not 0 <= start < stop <= self._shapes[name][0]:
            raise ValueError(f"[{start}, {stop}) of {name}, whose leading axis is {self._shapes[name][0]}")
        data = source.data.read(self._files, start, stop)
        scales = source.scales.read(self._files, start, stop) if source.scales else None
        return QTensor(name, source.scheme, data, scales)

    def close(self) -> None:
        """Close the weight files."""
        self._files.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Opening

    def _optional_json(self, name: str) -> dict[str, Any] | None:
        path = self._folder.find(name)
        return None if path is None else read_json(path)

    def _check_bytes(self) -> None:
        """Bytes predicted from the configuration must be the bytes found: a free test of both.

        For the released layout the prediction is the published `total_size`, computed apart from
        the mapping that it checks.
        """
        used = {r.name: r.nbytes for s in self._sources.values() for r in _refs(s)}
        found = sum(used.values())
        predicted = self.predicted_bytes
        floats = {self.scheme(s.name).name for s in self.specs if s.role != "expert"}
        experts = {self.scheme(s.name).name for s in self.specs if s.role == "expert"}
        if experts == {"mxfp4"} and floats == {"bf16"} and not self.head_is_tied:
            predicted = released_bytes(self.config)
        if found != predicted:
            raise BadCheckpoint(
                f"{self.path}: config.json implies {predicted:,} bytes of tensors, the files hold {found:,}",
                "take config.json and weights from the same gpt-oss model",
            )


def _refs(source: Source) -> tuple[TensorRef, ...]:
    return source.data.refs() + (source.scales.refs() if source.scales else ())


def read_config(folder: Folder) -> tuple[Path, dict[str, Any], ModelConfig]:
    """config.json of a folder: its place, its JSON, and what it means. Raises BadCheckpoint."""
    path = folder.find("config.json")
    if path is None:
        raise BadCheckpoint(f"{folder.weights}: config.json is missing", _FROM_SOURCE)
    raw = read_json(path)
    return path, raw, parse_config(raw, str(path))


def parse_config(raw: dict[str, Any], where: str) -> ModelConfig:
    """A configuration in any of its spellings. Raises BadCheckpoint."""
    original = "model_type" not in raw and "architectures" not in raw and "num_experts" in raw
    try:
        return ModelConfig.from_original(raw, where) if original else ModelConfig.from_hf(raw, where)
    except BadCheckpoint as e:  # a complaint may quote a value of any length
        raise BadCheckpoint(shown(e.message, 400), e.hint) from None


def read_template(file: Path | None, tokenizer_config: dict[str, Any] | None) -> str | None:
    """The chat template: chat_template.jinja, or else the one inside tokenizer_config.json."""
    if file is not None:
        return read_text(file)
    template = (tokenizer_config or {}).get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def open_checkpoint(path: Path, *, repo: str | None = None, revision: str | None = None) -> Checkpoint:
    """Open a checkpoint folder: headers and small files only, everything checked before it is believed.

    `repo` and `revision` say where it came from, for provenance. Raises BadCheckpoint with one line
    that says what is wrong and where, and a hint that cures it.
    """
    try:
        return Checkpoint(open_folder(Path(path)), repo, revision)
    except OSError as e:
        raise BadCheckpoint(
            f"{shown(e.filename or path, 400)}: cannot be read ({e.strerror})", "check its permissions"
        ) from None
