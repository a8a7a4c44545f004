"""Artifacts as a card sees them: a manifest.json and a report.json, without a folder."""

from __future__ import annotations

import copy
from typing import Any

from exporter.pipeline.card import Entry
from tests import report_sample

REPO = "me/gpt-oss-20b-quantized"
HASH = "ab" * 32
DATA = {
    "gguf": {"gpt-oss-20b-mxfp4-q8.gguf": 12_100_000_000},
    "onnx": {"model.onnx": 1_000_000, "model.onnx.data": 13_000_000_000, "genai_config.json": 2000},
    "tensorrt": {"decode.onnx": 1_000_000, "weights.data": 13_000_000_000, "README.md": 3000},
}
FOLDER = {"config.json": 1500, "model.safetensors": 13_500_000_000}


def manifest(fmt: str = "gguf", recipe: str = "mxfp4-q8", target: str = "", **more: Any) -> dict[str, Any]:
    found = {
        "exporter": "0.1.0",
        "command": f"exporter quantize openai/gpt-oss-20b --profile 16gb --format {fmt}",
        "versions": {"exporter": "0.1.0", "numpy": "2.4.6"},
        "model": "gpt-oss-20b",
        "format": fmt,
        "target": target,
        "recipe": {"name": recipe, "title": "Released MXFP4 experts bit for bit", "sha256": HASH},
        "calibration": None,
        "source": {
            "repo": "openai/gpt-oss-20b",
            "revision": "6cee5e81ee83917806bbde320786a8fb61efebee",
            "layout": "hf-mxfp4",
            "files": {"model-00000-of-00002.safetensors": HASH},
        },
        "files": {name: {"bytes": size, "sha256": HASH} for name, size in DATA.get(fmt, FOLDER).items()},
        "layout": HASH,
        "digest": HASH,
        "digest_algorithm": "blake3",
        "tensors": {
            "model.embed_tokens.weight": {"digest": HASH, "scheme": "int8-g32", "method": "rtn", "type": "Q8_0"},
            "model.layers.0.mlp.experts.down_proj.weight": {"digest": HASH, "scheme": "mxfp4", "method": "pass"},
        },
    }
    return {**copy.deepcopy(found), **more}


def report(made: dict[str, Any], loss: str = "near", kl: float = 0.001, **more: Any) -> dict[str, Any]:
    """One that passed, of the artifact that `made` describes."""
    found = report_sample.full()
    found["subject"] |= {
        "name": made["model"],
        "format": made["format"],
        "recipe": made["recipe"]["name"],
        "target": made["target"],
        "bytes": sum(each["bytes"] for each in made["files"].values()),
        "digest": made["digest"],
        "class": loss,
    }
    found["accuracy"]["conversations"]["all"] = report_sample.figure(kl)
    found["predicted_memory"] = {"context": 32768, "total": 14_000_000_000}
    return {**found, **more}


def entry(fmt: str = "gguf", recipe: str = "mxfp4-q8", target: str = "", prefix: str = "", **more: Any) -> Entry:
    """A proved one. more: of its manifest."""
    made = manifest(fmt, recipe, target, **more)
    return Entry(prefix, made, report(made))
