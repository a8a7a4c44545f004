"""A checkpoint in a few plain values: what `inspect` prints."""

from __future__ import annotations

from typing import Any

from exporter.checkpoint.folder import numbered_from_zero
from exporter.checkpoint.source import Checkpoint
from exporter.model import parameter_count
from exporter.model.released import RELEASED


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """JSON values only: layout, types by role, sizes, architecture, files and remarks. Bytes are bytes."""
    c = checkpoint.config
    raw = checkpoint.config_raw
    released = next((name for name, config in RELEASED.items() if _same_shape(c, config)), None)
    types: dict[str, list[str]] = {}
    for spec in checkpoint.specs:
        found = types.setdefault(spec.role, [])
        name = checkpoint.scheme(spec.name).name
        if name not in found:
            found.append(name)
    tied = checkpoint.head_is_tied
    return {
        "path": str(checkpoint.path),
        "repo": checkpoint.repo,
        "revision": checkpoint.revision,
        "layout": checkpoint.layout,
        "architecture_of": released,
        "types": {role: " ".join(names) for role, names in types.items()},
        "parameters": parameter_count(c) - (c.vocab_size * c.hidden_size if tied else 0),
        "tensors": len(checkpoint.refs),
        "predicted_bytes": checkpoint.predicted_bytes,
        "tensor_bytes": checkpoint.tensor_bytes,
        "file_bytes": checkpoint.file_bytes,
        "index_total_size": checkpoint.index_total,
        "shards": [s.name for s in checkpoint.shards],
        "shards_off_by_one": numbered_from_zero(checkpoint.shards),
        "layers": c.num_hidden_layers,
        "experts": c.num_local_experts,
        "experts_per_token": c.num_experts_per_tok,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "vocab_size": c.vocab_size,
        "heads": [c.num_attention_heads, c.num_key_value_heads, c.head_dim],
        "sliding_window": c.sliding_window,
        "context": c.max_position_embeddings,
        "tied_head": tied,
        "rope": {
            "kind": c.rope.kind,
            "theta": c.rope.theta,
            "factor": c.rope.factor,
            "truncate": c.rope.truncate,
            "spelling": _spelling(raw),
        },
        "tokenizer": checkpoint.tokenizer_file.name if checkpoint.tokenizer_file else None,
        "chat_template": checkpoint.chat_template is not None,
        "notes": list(checkpoint.notes),
    }


def _spelling(raw: dict[str, Any]) -> str:
    if "rope_parameters" in raw:
        return "rope_parameters"
    return "rope_scaling" if "rope_scaling" in raw else "original"


def _same_shape(a: Any, b: Any) -> bool:
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_local_experts", "vocab_size")
    return all(getattr(a, k) == getattr(b, k) for k in keys)
