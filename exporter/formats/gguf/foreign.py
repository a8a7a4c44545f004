"""A GGUF of gpt-oss that anyone may have made: which model it says it is, and its numbers.

Sources: llama.cpp `src/llama-arch.cpp` (names), `src/models/openai-moe.cpp` (what is read), `gguf-split` (parts).
What is not understood is refused: a tensor that the graph multiplies by and that we pass over is a wrong verdict.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import BadCheckpoint, ExporterError, Refused
from exporter.formats.gguf import tensor_name
from exporter.formats.gguf.foreign_tables import AGAIN, GgmlType, Listed, Tables, Tensor, printable, read_tables
from exporter.formats.gguf.foreign_values import values
from exporter.model import ModelConfig, tensor_specs
from exporter.numerics.floats import F32
from exporter.types import TensorSpec
from exporter.types.qtensor import U8

# (path, offset, bytes) -> those bytes.
Fetch = Callable[[Path, int, int], U8]

ARCHITECTURE = "gpt-oss"
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<of>\d{5})\.gguf")
_PARTS_CAP = 1000
# GGUF's key -> that of config.json. What llama.cpp cannot do without, and what it has a default for.
_REQUIRED = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "expert_feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.sliding_window": "sliding_window",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
}
_OPTIONAL = {"attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim"}
_TEMPLATE = "tokenizer.chat_template"
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
_ROPE = {
    "scaling.factor": "factor",
    "scaling.original_context_length": "original_max_position_embeddings",
    "scaling.yarn_beta_fast": "beta_fast",
    "scaling.yarn_beta_slow": "beta_slow",
}
# llama.cpp turns all of a head and has no other factor; a key that says so changes nothing.
_ROPE_SAME: Mapping[str, tuple[object, ...]] = {
    "scaling.attn_factor": (1,),
    "scaling.yarn_attn_factor": (1,),
    "scaling.yarn_ext_factor": (1, -1),
    "scaling.finetuned": (False, True),
}


@dataclass(frozen=True)
class Placed:
    """Where a canonical tensor lies: in a tensor of one file, or in the first or second `half` of one's rows."""

    path: Path
    tensor: Tensor
    half: int | None = None

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """(offset, bytes) of leading indices [start, stop)."""
        each = self.tensor.nbytes // self.tensor.shape[0]
        if self.half is None:
            yield self.tensor.offset + start * each, (stop - start) * each
            return
        for i in range(start, stop):
            yield self.tensor.offset + i * each + self.half * (each // 2), each // 2


@dataclass(frozen=True)
class GgufModel:
    """An opened model. files: in the order of its parts. sizes: their bytes. tool: who made it, as it says.

    template: for conversations, None without one; named_templates: others beside it. stops: what ends an answer;
    adds_start: whether a start token comes before a prompt.
    """

    files: tuple[Path, ...]
    sizes: Mapping[Path, int]
    config: ModelConfig
    tool: str
    placed: Mapping[str, Placed]
    shapes: Mapping[str, tuple[int, ...]]
    template: str | None = None
    named_templates: tuple[str, ...] = ()
    stops: tuple[int, ...] = ()
    adds_start: bool = False

    def type(self, name: str) -> GgmlType:
        """The type that holds a canonical tensor."""
        return self.placed[name].tensor.type

    def read(self, fetch: Fetch, name: str, start: int, stop: int) -> F32:
        """float32 leading indices [start, stop) of a canonical tensor, as the file holds them."""
        place, (leading, *rest) = self.placed[name], self.shapes[name]
        if not 0 <= start < stop <= leading:
            raise ValueError(f"[{start}, {stop}) of {name}, whose leading axis is {leading}")
        if not rest:  # a vector is one row: its blocks may be longer than what is asked for
            raw = fetch(place.path, place.tensor.offset, place.tensor.nbytes)
            return values(raw, place.tensor.type, name)[start:stop]
        parts = [fetch(place.path, offset, nbytes) for offset, nbytes in place.runs(start, stop)]
        raw = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return values(raw, place.tensor.type, name).reshape(stop - start, *rest)


def open_gguf(path: Path, inside: Callable[[Path], Path]) -> GgufModel:
    """The model that `path` is, or is a part of. `inside` answers for the other parts' being where they may be.

    Raises ExporterError for a damaged file, Refused for another model or what is not understood.
    """
    tables = _all_parts(path, inside)
    head = tables[0]
    architecture = head.text("general.architecture")
    if architecture != ARCHITECTURE:
        raise Refused(f"{path.name}: {_other(architecture, head)}", hint="give a GGUF of gpt-oss that llama.cpp loads")
    stored: dict[str, tuple[Path, Tensor]] = {}
    for table in tables:
        for name, tensor in table.tensors.items():
            if name in stored:
                raise ExporterError(f"{table.path.name}: tensor {name} is in another part too", hint=AGAIN)
            stored[name] = (table.path, tensor)
    config = _config(head, stored)
    placed = _place(path, config, stored)
    return GgufModel(
        tuple(t.path for t in tables),
        {t.path: t.size for t in tables},
        config,
        head.text("general.quantized_by"),
        placed,
        {s.name: s.shape for s in tensor_specs(config)},
        **_chat(head),
    )


def _chat(head: Tables) -> dict[str, Any]:
    """What the keys say of conversations; keys as in gguf-py's constants.py."""
    template = head.metadata.get(_TEMPLATE)
    named = tuple(k.removeprefix(f"{_TEMPLATE}.") for k in head.metadata if k.startswith(f"{_TEMPLATE}."))
    ends = [head.metadata.get(f"tokenizer.ggml.{key}") for key in ("eos_token_id", "eot_token_id")]
    return {
        "template": template if isinstance(template, str) else None,
        "named_templates": named,
        "stops": tuple(value for value in ends if type(value) is int),
        "adds_start": head.metadata.get("tokenizer.ggml.add_bos_token") is True,
    }


def _other(architecture: str, head: Tables) -> str:
    if architecture == "gptoss":
        return 'of the architecture "gptoss", Ollama\'s own spelling of gpt-oss, which llama.cpp does not load'
    kind = head.text("general.type")
    what = f'of the architecture "{architecture}"' if architecture else "without an architecture"
    return f"{what}{f' ({kind})' if kind not in ('', 'model') else ''}, not {ARCHITECTURE}"


# Parts


def _all_parts(path: Path, inside: Callable[[Path], Path]) -> list[Tables]:
    """Tables of all parts, the first one first; those of `path` alone where it is whole."""
    first = read_tables(path)
    count = first.whole("split.count") or 1
    named = _PART.fullmatch(path.name)
    if count == 1:
        return [first]
    if named is None or int(named["of"]) != count or count > _PARTS_CAP:
        raise ExporterError(
            f"{path.name}: one of {count:,} parts, whose name does not say which",
            hint=f"name the parts as gguf-split does: NAME-00001-of-{count:05d}.gguf",
        )
    paths = [path.with_name(f"{named['stem']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = [p.name for p in paths if not p.exists()]
    if missing:
        raise ExporterError(f"{path.parent}: parts are missing: {_some(missing)}", hint="download the missing files")
    tables = [first if p == path else read_tables(inside(p)) for p in paths]
    for i, table in enumerate(tables):
        said = table.whole("split.no"), table.whole("split.count")
        if said != (i, count):
            raise ExporterError(
                f"{table.path.name}: says that it is part {said[0]} of {said[1]}, counted from 0",
                hint="take all parts from one model",
            )
    total, found = first.whole("split.tensors.count"), sum(len(t.tensors) for t in tables)
    if total is not None and total != found:
        raise ExporterError(
            f"{path.name}: its parts hold {found:,} tensors, it says {total:,}", hint="take all parts from one model"
        )
    return tables


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


# Which model


def _config(head: Tables, stored: Mapping[str, tuple[Path, Tensor]]) -> ModelConfig:
    """What the keys say, through the same checks as a config.json; what they cannot say, as llama.cpp does it."""
    raw: dict[str, Any] = {"model_type": "gpt_oss", "tie_word_embeddings": "output.weight" not in stored}
    for key, name in (_REQUIRED | _OPTIONAL).items():
        value = head.whole(f"{ARCHITECTURE}.{key}")
        if value is None and key in _REQUIRED:
            raise _bad(head, f"{ARCHITECTURE}.{key} is missing")
        raw[name] = value
    raw |= {name: head.whole(f"tokenizer.ggml.{key}") for key, name in _TOKENS.items()}
    raw["rms_norm_eps"] = head.metadata.get(f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon")
    if raw["rms_norm_eps"] is None:
        raise _bad(head, f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon is missing")
    if "token_embd.weight" not in stored:
        raise _bad(head, "tensor token_embd.weight is missing")
    raw["vocab_size"] = stored["token_embd.weight"][1].shape[0]
    raw |= _rope(head)
    try:
        config = ModelConfig.from_hf(raw, head.path.name)
    except BadCheckpoint as error:
        raise _bad(head, error.message.removeprefix(f"{head.path.name}: ")) from None
    return _consistent(head, config)


def _consistent(head: Tables, config: ModelConfig) -> ModelConfig:
    """Self-contradictions that llama.cpp would stop at, or compute something else for."""
    tokens = head.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Listed) and tokens.count != config.vocab_size:
        raise _bad(head, f"{tokens.count:,} tokens and {config.vocab_size:,} rows of embeddings")
    size = head.whole(f"{ARCHITECTURE}.attention.value_length")
    if size not in (None, config.head_dim):
        raise _bad(head, f"{ARCHITECTURE}.attention.value_length is {size}, key_length {config.head_dim}")
    turned = head.whole(f"{ARCHITECTURE}.rope.dimension_count")
    if turned not in (None, config.head_dim):
        raise _bad(head, f"{ARCHITECTURE}.rope.dimension_count is {turned}, heads are of {config.head_dim}")
    return config


def _rope(head: Tables) -> dict[str, Any]:
    """The rotation in the words of config.json. Raises Refused for one that gpt-oss does not have."""
    prefix = f"{ARCHITECTURE}.rope."
    said = {k.removeprefix(prefix): v for k, v in head.metadata.items() if k.startswith(prefix)}
    base = said.pop("freq_base", None)
    if base is None:
        raise _bad(head, f"{prefix}freq_base is missing")
    said.pop("dimension_count", None)
    sliding = said.pop("freq_base_swa", base)
    kind = said.pop("scaling.type", "none")
    yarn = {_ROPE[k]: said.pop(k) for k in list(said) if k in _ROPE}
    for key, value in said.items():
        if value not in _ROPE_SAME.get(key, ()):
            raise _bad(head, f"{prefix}{printable(key)} is {printable(str(value), 40)}, which gpt-oss does not have")
    if sliding != base:
        raise _bad(head, f"{prefix}freq_base_swa is {sliding}, freq_base {base}")
    if kind not in ("none", "yarn"):
        raise _bad(head, f"{prefix}scaling.type is {printable(str(kind), 40)}; gpt-oss uses yarn")
    scaling = {"rope_type": "default"} if kind == "none" else {"rope_type": "yarn", **yarn}
    return {"rope_theta": base, "rope_scaling": scaling}


def _bad(head: Tables, problem: str) -> Refused:
    return Refused(f"{head.path.name}: {problem}", hint="convert the model again with llama.cpp's converter")


# Tensors


def _place(path: Path, config: ModelConfig, stored: Mapping[str, tuple[Path, Tensor]]) -> dict[str, Placed]:
    """Every canonical tensor at its place, nothing left over. Raises Refused."""
    placed: dict[str, Placed] = {}
    used: set[str] = set()
    missing: list[str] = []
    for spec in tensor_specs(config):
        found = _find(spec, config, stored)
        if found is None:
            missing.append(tensor_name(spec.name))
            if len(missing) > len(stored) + 3:  # a hostile number of layers asks for millions
                break
            continue
        placed[spec.name] = found
        used.add(found.tensor.name)
        _check_shape(path, spec, found)
    if missing:
        raise Refused(f"{path.name}: tensors are missing: {_some(missing)}", hint=AGAIN)
    unknown = sorted(stored.keys() - used)
    if unknown:
        raise Refused(
            f"{path.name}: tensors that gpt-oss does not have: {_some(unknown)}",
            hint="convert the model again with llama.cpp's converter",
        )
    return placed


def _find(spec: TensorSpec, config: ModelConfig, stored: Mapping[str, tuple[Path, Tensor]]) -> Placed | None:
    name = tensor_name(spec.name)
    if spec.role == "head" and config.tie_word_embeddings:
        name = "token_embd.weight"
    if name in stored:
        return Placed(*stored[name])
    for half, part in enumerate(("ffn_gate_exps", "ffn_up_exps")):  # fused: gate rows, then up rows
        fused = name.replace(part, "ffn_gate_up_exps")
        if fused != name and fused in stored:
            return Placed(*stored[fused], half)
    return None


def _check_shape(path: Path, spec: TensorSpec, found: Placed) -> None:
    shape, stored = spec.shape, found.tensor.shape
    wanted = shape if found.half is None else (shape[0], 2 * shape[1], *shape[2:])
    if stored != wanted:
        raise Refused(
            f"{path.name}: tensor {found.tensor.name} is {list(stored)}, its keys imply {list(wanted)}",
            hint="convert the model again with llama.cpp's converter",
        )
    if found.half is not None and len(shape) == 2 and shape[1] % found.tensor.type.block:
        raise Refused(
            f"{path.name}: half of a row of {found.tensor.name} is no whole blocks of {found.tensor.type.name}",
            hint="convert the model again with llama.cpp's converter",
        )
