"""The small files beside a graph: genai_config.json for onnxruntime-genai, config.json for the others.

Source for genai_config.json: src/config.h of onnxruntime-genai 0.18 and what its builder writes for gpt-oss.
Only some keys are required there; all are written, since older runtimes have other defaults.
"""

from __future__ import annotations

import json
from typing import Any

from exporter.formats.base import ExportJob
from exporter.formats.folder.config import COPIED, config_json
from exporter.formats.onnx.devices import Device
from exporter.model.config import SLIDING

_SEARCH = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}


def small_files(job: ExportJob, device: Device, graph: str, js: dict[str, Any] | None) -> dict[str, bytes]:
    """Every small file by name. `graph`: the file that onnxruntime-genai runs; `js`: transformers.js's settings."""
    config = json.loads(config_json(job, {}))
    if js is not None:
        config["transformers.js_config"] = js
    files = {"genai_config.json": _text(_genai(job, device, graph)), "config.json": _text(config)}
    files |= {name: raw for name in COPIED if (raw := job.file(name)) is not None}
    # onnxruntime-genai wants this file, and a template of its own where there is a conversation.
    files.setdefault("tokenizer_config.json", _text({"tokenizer_class": "PreTrainedTokenizerFast"}))
    if job.chat_template is not None:
        files.setdefault("chat_template.jinja", job.chat_template.encode())
    return files


def _text(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _genai(job: ExportJob, device: Device, graph: str) -> dict[str, Any]:
    c, generation = job.config, job.generation_config
    decoder: dict[str, Any] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": list(device.provider_options)},
        "filename": graph,
        "head_size": c.head_dim,
        "hidden_size": c.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": c.num_attention_heads,
        "num_hidden_layers": c.num_hidden_layers,
        "num_key_value_heads": c.num_key_value_heads,
    }
    if device.windowed:
        decoder["sliding_window"] = {
            "window_size": c.sliding_window,
            "slide_key_value_cache": False,
            "slide_inputs": False,
            "layers": [i for i, kind in enumerate(c.layer_types) if kind == SLIDING],
            "cache_slack": 0,
        }
    model = {
        "type": "gptoss",
        "context_length": c.max_position_embeddings,
        "vocab_size": c.vocab_size,
        "bos_token_id": generation.get("bos_token_id", c.bos_token_id),
        "eos_token_id": generation.get("eos_token_id", c.eos_token_id),
        "pad_token_id": generation.get("pad_token_id", c.pad_token_id),
        "decoder": decoder,
    }
    search = {
        **{key: generation.get(key, value) for key, value in _SEARCH.items()},
        # Tokens of a prompt at once. Without it the logits of a whole prompt are held, 0.8 MB a token for 20b.
        "chunk_size": 512,
        "diversity_penalty": 0.0,
        "early_stopping": True,
        "length_penalty": 1.0,
        # The cache is taken at this length: a caller who wants more tokens says so.
        "max_length": job.context or c.max_position_embeddings,
        "min_length": 0,
        "no_repeat_ngram_size": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
        "repetition_penalty": 1.0,
    }
    return {"model": {k: v for k, v in model.items() if v is not None}, "search": search}
