"""Anyone's artifact, opened: which model it says it is, how each tensor is stored, and its numbers as float32.

Nothing in it is believed before it is checked, nothing that is not understood is passed over, and no code of it runs:
pickle files are refused, `auto_map` and remote code are never looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from exporter.checkpoint import Checkpoint
from exporter.checkpoint.folder import Folder, inside, open_folder
from exporter.checkpoint.headers import file_size, read_header, read_json, shown
from exporter.checkpoint.source import read_config
from exporter.checkpoint.views import OpenFiles
from exporter.checkpoint.vocabulary import TOKENIZER_CAP
from exporter.errors import BadCheckpoint, ExporterError, Refused, UsageError
from exporter.formats.folder import foreign as folders
from exporter.formats.folder.foreign_arrays import Fetch
from exporter.formats.folder.foreign_layers import Unreadable
from exporter.formats.gguf.foreign import GgufModel, open_gguf
from exporter.formats.gguf.foreign_tables import is_gguf
from exporter.model import ModelConfig, tensor_specs
from exporter.numerics import decode
from exporter.numerics.floats import F32
from exporter.pipeline.bench import find_subject
from exporter.pipeline.foreign_kinds import Foreign, Stored, can_be_exact, compare_config, same_shapes
from exporter.pipeline.manners import of_folder, of_gguf

__all__ = ["Foreign", "Stored", "can_be_exact", "compare_config", "open_foreign", "same_shapes"]
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_EXPLAINED = ("original", "adapter_config.json")  # what opening a checkpoint has its own words for
_GIVE = "a GGUF or ONNX file, or the folder of a Hugging Face checkpoint"
_SMALL = 1 << 20  # bytes of a configuration
# Bytes that JSON may have: in memory it takes up to 24 times that ("[],[],..."). 120b in GPTQ, its experts one by one,
# has headers of 10 MB in all and an index of 9.
_JSON_CAPS = {
    "config.json": _SMALL,
    "generation_config.json": _SMALL,
    "quantize_config.json": _SMALL,
    "tokenizer_config.json": 4 << 20,
}
_INDEX = 12 << 20
_HEADER, _HEADERS = 12 << 20, 24 << 20  # bytes of one safetensors header, and of all of a folder


def open_foreign(path: Path) -> Foreign:
    """The artifact at `path`, headers and small files only.

    Raises UsageError where there is none, Refused (BadCheckpoint among them) for what is not understood, ExporterError
    for what is damaged.
    """
    try:
        return _open(Path(path))
    except OSError as error:
        raise ExporterError(
            f"{shown(error.filename or path, 400)}: cannot be read ({error.strerror})", hint="check its permissions"
        ) from None


def _open(path: Path) -> Foreign:
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        what = "is a symbolic link that leads nowhere" if path.is_symlink() else "does not exist"
        raise UsageError(f"{path} {what}", hint=_GIVE)
    if not path.is_file():  # opening a pipe or a device may never return
        raise UsageError(f"{path} is no plain file", hint=_GIVE)
    if path.suffix == ".gguf" or is_gguf(path):  # Ollama's files have no suffix
        return _gguf(path)
    if path.suffix == ".onnx":
        return _onnx(path)
    if path.suffix in _PICKLES:
        raise Refused(
            f"{path} may be a pickle file, which can run code and is never loaded",
            hint="save the model as safetensors (save_pretrained does so by default)",
        )
    hint = f"its folder: {path.parent}" if path.suffix in (".safetensors", ".json") else _GIVE
    raise UsageError(f"{path} is no GGUF and no ONNX file", hint=hint)


def _open_folder(path: Path) -> Foreign:
    """What a folder is: by its own files, safetensors first, whose folder may hold conversions below it."""
    here = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    tensors = [p for p in here if p.name.endswith((".safetensors", ".safetensors.index.json"))]
    gguf = [p for p in here if p.suffix == ".gguf"]
    graphs = [p for p in here if p.suffix == ".onnx" or p.name == "genai_config.json"]
    graphs += sorted(path.glob("onnx/*.onnx"))
    if gguf and (tensors or graphs):
        raise UsageError(f"{path} holds models of several kinds", hint=f"one of them: {gguf[0]}")
    if gguf:
        firsts = [p for p in gguf if "-of-" not in p.name or "-00001-of-" in p.name] or gguf[:1]
        if len(firsts) > 1:
            raise UsageError(f"{path} has several GGUF files", hint=f"one of them: {firsts[0]}")
        return _gguf(inside(firsts[0], path))
    if graphs and not tensors:
        return _onnx(path)
    if not tensors and not any(p.name in _EXPLAINED or p.suffix in _PICKLES for p in here):
        below = sorted([*path.glob("*/*.gguf"), *path.glob("*/*.onnx"), *path.glob("*/*.safetensors")])
        hint = f"a folder below it: {below[0].parent}" if below else _GIVE
        raise UsageError(f"{path} holds no GGUF, ONNX or safetensors file", hint=hint)
    return _tensors(path)


def _tokenizer(folder: Path) -> Path | None:
    """tokenizer.json of a folder that is no checkpoint, or None."""
    path = folder / "tokenizer.json"
    return _plain_file(inside(path, folder)) if path.is_symlink() or path.exists() else None


def _plain_file(tokenizer: Path | None) -> Path | None:
    """A regular file of a size that can be: who reads it is native code, which checks neither. Raises BadCheckpoint."""
    if tokenizer is not None and file_size(tokenizer) > TOKENIZER_CAP:
        raise BadCheckpoint(f"{tokenizer}: above the {TOKENIZER_CAP:,} bytes that it can need", "copy the right one")
    return tokenizer


# GGUF


def _gguf(path: Path) -> Foreign:
    file_size(path)
    model = open_gguf(path, lambda part: inside(part, path.parent))
    files = OpenFiles(model.sizes)

    def read(name: str, start: int, stop: int) -> F32:
        with np.errstate(all="ignore"):  # a damaged scale may be of any size, or no number
            return model.read(files.read, name, start, stop)

    stored = {}
    for spec in tensor_specs(model.config):
        kind = model.type(spec.name)
        stored[spec.name] = Stored(kind.name, kind.bits, can_be_exact(kind.name, spec))
    return Foreign(
        "gguf",
        model.files[0],
        model.files,
        "gguf",
        model.config,
        read,
        stored,
        _tokenizer(path.parent),
        model.tool,
        notes=_gguf_notes(model),
        manners=of_gguf(model),
        close=files.close,
    )


def _gguf_notes(model: GgufModel) -> tuple[str, ...]:
    return ("the head is the embeddings (tied)",) if model.config.tie_word_embeddings else ()


# ONNX


def _onnx(path: Path) -> Foreign:
    """Found, not read: what is in the graph is for the rules of its runtime."""
    subject = find_subject(path)
    named = _genai(subject.folder)
    for graph in (subject.graph, subject.genai):
        if graph is not None:
            _require_below(graph, subject.folder, follow=path.is_dir())
    whole = path.is_dir() or bool(named)
    config = _onnx_config(subject.folder)
    return Foreign(
        "onnx",
        subject.graph,
        tuple(_onnx_files(subject.graph, subject.folder if whole else None)),
        "onnx",
        config,
        tokenizer_file=_tokenizer(subject.folder),
        genai=subject.genai,
        said=named,
        manners=of_folder(subject.folder) if path.is_dir() else None,
    )


def _require_below(graph: Path, folder: Path, *, follow: bool) -> None:
    """genai_config.json names a plain file of its own folder. Raises Refused or BadCheckpoint.

    follow: whether a link may lead elsewhere only as in the Hub's cache; the one that was asked for may anyhow.
    """
    if not graph.parent.resolve().is_relative_to(folder.resolve()):
        raise Refused(f"{folder}: names the graph {graph}, outside it", hint="give a folder that holds its own graph")
    file_size(inside(graph, folder) if follow else graph)


def _onnx_files(graph: Path, folder: Path | None) -> list[Path]:
    """The graph and what lies beside it under its name; of a folder all its plain files."""
    if folder is None:
        return sorted(p for p in graph.parent.iterdir() if p.name.startswith(graph.name) and p.is_file())
    found = [*folder.iterdir(), *(folder / "onnx").glob("*")]
    return sorted(p for p in found if p.is_file() and not p.name.startswith("."))


def _onnx_config(folder: Path) -> ModelConfig | None:
    """What a config.json of gpt-oss beside the graph says, or None; genai_config.json has no rotation."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    raw = read_json(inside(path, folder), _SMALL)
    return ModelConfig.from_hf(raw, str(path)) if raw.get("model_type") == "gpt_oss" else None


def _genai(folder: Path) -> dict[str, int]:
    """Sizes that genai_config.json says; none without it."""
    path = folder / "genai_config.json"
    if not path.is_file():
        return {}
    model = read_json(inside(path, folder), _SMALL).get("model")
    model = model if isinstance(model, dict) else {}
    decoder = model.get("decoder")
    decoder = decoder if isinstance(decoder, dict) else {}
    window = decoder.get("sliding_window")
    said = {
        "vocab_size": model.get("vocab_size"),
        "head_dim": decoder.get("head_size"),
        "sliding_window": window.get("window_size") if isinstance(window, dict) else None,
        **{
            n: decoder.get(n)
            for n in ("hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
        },
    }
    return {name: value for name, value in said.items() if type(value) is int}


# Folders of safetensors


def _tensors(path: Path) -> Foreign:
    for place in (path, path / "original"):
        _require_small(place)
    folder = open_folder(path)
    config_path, raw, config = read_config(folder)
    quantization = _quantization(folder, raw)
    reason = folders.refuse_quantization(quantization)
    if reason:
        raise Refused(
            f"{config_path}: {reason} is not read here",
            hint="GPTQ, compressed-tensors, MXFP4 and plain floats are; a GGUF or ONNX of it may be too",
        )
    tool = _tool(folder, quantization)
    if folders.is_quantized(folder.refs):
        return _quantized(folder, config, quantization, tool)
    return _plain(Checkpoint(folder, None, None), tool)


def _require_small(folder: Path) -> None:
    """What is read as JSON must be of a size that it can need. Raises BadCheckpoint."""
    caps = {folder / name: cap for name, cap in _JSON_CAPS.items()}
    for path, cap in {**caps, **dict.fromkeys(folder.glob("*.index.json"), _INDEX)}.items():
        if path.is_file() and path.stat().st_size > cap:
            raise BadCheckpoint(f"{path}: above the {cap:,} bytes that it can need", "copy this file again")
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        if path.is_file():
            with path.open("rb") as f:
                length = int.from_bytes(f.read(8), "little")
            total += min(length, path.stat().st_size)  # what claims more than there is has its own line
            if total > _HEADERS or _HEADER < length < path.stat().st_size:
                raise BadCheckpoint(
                    f"{path}: a header of {length:,} bytes, above any that it can need", "copy it again"
                )


def _quantization(folder: Folder, raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """`quantization_config` of config.json, or GPTQ's quantize_config.json where there is none."""
    found = raw.get("quantization_config") or raw.get("compression_config")
    beside = folder.find("quantize_config.json")
    if found is None and beside is not None:
        found = {"quant_method": "gptq", **read_json(beside)}
    if found is not None and not isinstance(found, dict):
        raise BadCheckpoint(f"{folder.weights}: quantization_config is not an object", "copy config.json again")
    return found or {}


def _tool(folder: Folder, quantization: Mapping[str, Any]) -> str:
    version = read_header(folder.shards[0]).metadata.get("exporter.version") if folder.shards else None
    return f"exporter {shown(version, 20)}" if version else folders.written_by(quantization)


def _plain(checkpoint: Checkpoint, tool: str) -> Foreign:
    """Floats and released blocks, in any layout that a checkpoint may have."""

    def read(name: str, start: int, stop: int) -> F32:
        with np.errstate(all="ignore"):
            return decode.values(checkpoint.read(name, start, stop))

    stored = {}
    for spec in checkpoint.specs:
        scheme = checkpoint.scheme(spec.name)
        kind = "MXFP4" if scheme.kind == "e2m1" else scheme.name.upper()
        bits = 4.25 if scheme.kind == "e2m1" else float(scheme.bits)
        stored[spec.name] = Stored(kind, bits, can_be_exact(kind, spec))
    mxfp4 = any(s.type == "MXFP4" for s in stored.values())
    return Foreign(
        "folder",
        checkpoint.path,
        _files(checkpoint.shards, checkpoint.find),
        "mxfp4" if mxfp4 else "float",
        checkpoint.config,
        read,
        stored,
        _plain_file(checkpoint.tokenizer_file),
        tool,
        notes=tuple(checkpoint.notes),
        manners=of_folder(checkpoint.path),
        close=checkpoint.close,
    )


def _quantized(folder: Folder, config: ModelConfig, quantization: Mapping[str, Any], tool: str) -> Foreign:
    halves = folders.holds_halves(quantization)
    model = folders.map_folder(folder.refs, config, folders.settings_of(quantization), halves=halves)
    if model.problems:
        more = f" (and {len(model.problems) - 2:,} more)" if len(model.problems) > 2 else ""
        raise Refused(
            f"{folder.weights}: {'; '.join(shown(p, 300) for p in model.problems[:2])}{more}",
            hint="take config.json and weights from the same quantized gpt-oss model",
        )
    files = OpenFiles(folder.sizes)

    def read(name: str, start: int, stop: int) -> F32:
        try:
            with np.errstate(all="ignore"):
                return model.read(files.read, name, start, stop)
        except Unreadable as error:
            raise ExporterError(f"{folder.weights}: {error}", hint="download or copy this file again") from None

    gptq = any(name.endswith(".qweight") for name in folder.refs)
    packed = any(name.endswith((".weight_packed", ".weight_scale")) for name in folder.refs)
    notes = list(folder.notes)
    if gptq:
        notes.append(f"gate_proj and up_proj hold {folders.HALVES if halves else 'what they are called'}")
    return Foreign(
        "folder",
        folder.root,
        _files(folder.shards, folder.find),
        "gptq" if gptq else "compressed-tensors" if packed else "float",
        config,
        read,
        _stored_layers(folder, config, model, files.read),
        _plain_file(folder.find("tokenizer.json")),
        tool,
        notes=tuple(notes),
        manners=of_folder(folder.root),
        close=files.close,
    )


def _stored_layers(folder: Folder, config: ModelConfig, model: folders.FolderModel, fetch: Fetch) -> dict[str, Stored]:
    stored = {}
    for spec in tensor_specs(config):
        try:
            kind = model.sources[spec.name].label(fetch)
        except Unreadable as error:
            raise ExporterError(f"{folder.weights}: {error}", hint="download or copy this file again") from None
        stored[spec.name] = Stored(kind, model.nbytes[spec.name] * 8 / spec.elements, can_be_exact(kind, spec))
    return stored


def _files(shards: list[Path], find: Callable[[str], Path | None]) -> tuple[Path, ...]:
    names = (
        "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "quantize_config.json",
    )  # fmt: skip
    found = [path for name in names if (path := find(name)) is not None]
    for path in found:  # whoever takes digests of them opens them
        file_size(path)
    return (*shards, *found)
