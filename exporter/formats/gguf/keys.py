"""GGUF metadata: what llama.cpp reads to build the graph, and where the file came from.

Sources: llama.cpp `src/llama-arch.cpp` (LLM_KV names) and `gguf-py/gguf/constants.py`; the values are
those of gpt-oss. Nothing here depends on the time or the machine: the same input gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from exporter.formats.base import ExportJob
from exporter.formats.gguf.blocks import BlockType
from exporter.formats.gguf.file import ARRAY, F32, I32, STRING, U16, U32, Value
from exporter.formats.gguf.tokenizer import tokenizer_keys
from exporter.model import parameter_count

# general.file_type (llama_ftype): the type of most weights.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32, "MXFP4": 38}


def metadata(job: ExportJob, types: Sequence[BlockType]) -> dict[str, Value]:
    """All keys of the (first) file, in the order they are written."""
    keys = _general(job, types)
    keys |= _architecture(job)
    special = {
        "bos": _bos(job),
        "eos": job.config.eos_token_id,
        "padding": job.config.pad_token_id,
    }
    keys |= tokenizer_keys(job.tokenizer, job.tokenizer_config, special, job.chat_template, job.config.vocab_size)
    keys |= _provenance(job)
    return keys


def _bos(job: ExportJob) -> int | None:
    """The release names it in generation_config.json only."""
    value = job.generation_config.get("bos_token_id")
    return value if type(value) is int and 0 <= value < job.config.vocab_size else job.config.bos_token_id


def split_keys(index: int, count: int, tensors: int) -> dict[str, Value]:
    """Keys of one file of a split model; `tensors` counts all files together."""
    return {
        "split.no": Value(U16, index),
        "split.count": Value(U16, count),
        "split.tensors.count": Value(I32, tensors),
    }


def _size_label(job: ExportJob) -> str:
    """gguf-py's label of a mixture of experts: experts x (shared parameters + those of one expert), "32x2.4B"."""
    experts = sum(s.spec.elements for s in job.steps if s.spec.role == "expert")
    one = experts // job.config.num_local_experts
    return f"{job.config.num_local_experts}x{_short(parameter_count(job.config) - experts + one)}"


def _short(n: int) -> str:
    """Two digits at least: "2.4B", "653M"."""
    units = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (1, "K"))
    size, unit = next(u for u in units if n > u[0] or u[1] == "K")
    scaled = n / (1000 if unit == "K" else size)
    return f"{scaled:.{1 if round(scaled) < 10 else 0}f}{unit}"


def _general(job: ExportJob, types: Sequence[BlockType]) -> dict[str, Value]:
    weight: dict[str, int] = {}
    for step, kind in zip(job.steps, types, strict=True):
        weight[kind.name] = weight.get(kind.name, 0) + step.spec.elements
    most = max(weight, key=lambda name: weight[name])
    return {
        "general.architecture": Value(STRING, "gpt-oss"),
        "general.type": Value(STRING, "model"),
        "general.name": Value(STRING, job.model_name),
        "general.size_label": Value(STRING, _size_label(job)),
        "general.file_type": Value(U32, _FILE_TYPES[most]),
        "general.quantization_version": Value(U32, 2),
        "general.alignment": Value(U32, 32),
    }


def _architecture(job: ExportJob) -> dict[str, Value]:
    c = job.config
    keys = {
        "block_count": Value(U32, c.num_hidden_layers),
        "context_length": Value(U32, c.max_position_embeddings),
        "embedding_length": Value(U32, c.hidden_size),
        "feed_forward_length": Value(U32, c.intermediate_size),
        "expert_feed_forward_length": Value(U32, c.intermediate_size),
        "vocab_size": Value(U32, c.vocab_size),
        "attention.head_count": Value(U32, c.num_attention_heads),
        "attention.head_count_kv": Value(U32, c.num_key_value_heads),
        "attention.key_length": Value(U32, c.head_dim),
        "attention.value_length": Value(U32, c.head_dim),
        "attention.layer_norm_rms_epsilon": Value(F32, c.rms_norm_eps),
        "attention.sliding_window": Value(U32, c.sliding_window),
        "expert_count": Value(U32, c.num_local_experts),
        "expert_used_count": Value(U32, c.num_experts_per_tok),
        "rope.freq_base": Value(F32, c.rope.theta),
    }
    if c.rope.kind == "yarn":
        # There is no key for `truncate`: llama.cpp always rounds the correction range.
        keys |= {
            "rope.scaling.type": Value(STRING, "yarn"),
            "rope.scaling.factor": Value(F32, c.rope.factor),
            "rope.scaling.original_context_length": Value(U32, c.rope.original_max_position),
            "rope.scaling.yarn_beta_fast": Value(F32, c.rope.beta_fast),
            "rope.scaling.yarn_beta_slow": Value(F32, c.rope.beta_slow),
        }
    return {f"gpt-oss.{name}": value for name, value in keys.items()}


def _provenance(job: ExportJob) -> dict[str, Value]:
    p = job.provenance
    keys = {"general.quantized_by": Value(STRING, f"exporter {p.exporter_version}")}
    if p.source_repo:
        organization, _, name = p.source_repo.rpartition("/")
        url = f"https://huggingface.co/{p.source_repo}"
        keys |= {
            "general.source.repo_url": Value(STRING, url),
            "general.source.revision": Value(STRING, p.source_revision),
            "general.base_model.count": Value(U32, 1),
            "general.base_model.0.name": Value(STRING, name),
            "general.base_model.0.organization": Value(STRING, organization),
            "general.base_model.0.version": Value(STRING, p.source_revision),
            "general.base_model.0.repo_url": Value(STRING, url),
        }
    digests = [f"{name} {digest}" for name, digest in p.tensor_digests.items()]
    keys |= {
        "general.exporter.version": Value(STRING, p.exporter_version),
        "general.exporter.recipe": Value(STRING, p.recipe),
        "general.exporter.recipe_sha256": Value(STRING, p.recipe_sha256),
        "general.exporter.digest": Value(STRING, p.digest),
        "general.exporter.tensor_digests": Value(ARRAY, digests, STRING),
    }
    return keys
