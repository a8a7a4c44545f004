"""The YAML at the top of a card, which the Hub sorts, searches and links a repository by."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from exporter.publish.card.facts import Item, Repository
from exporter.publish.card.markup import cleaned

RELEASES = "openai/gpt-oss-"
RELEASED_UNDER = "apache-2.0"
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")
_WORDS = {"true", "false", "yes", "no", "on", "off", "y", "n", "null"}  # which YAML 1.1 reads as something else
# By format, in the order in which a repository of several is named: what loads the files.
_LIBRARIES = {
    "gguf": "gguf",
    "mxfp4": "transformers",
    "compressed-tensors": "transformers",
    "gptq": "transformers",
    "onnx": "onnx",
    "tensorrt": "onnx",
}
_TAGS = {"gguf": ("gguf",), "onnx": ("onnx",), "tensorrt": ("onnx", "tensorrt"), "gptq": ("gptq",)}
_TAGS |= {"compressed-tensors": ("compressed-tensors",)}


def head(repository: Repository) -> str:
    """The block between two lines of dashes; every value a string or a list of strings."""
    items = repository.items
    license = license_of(repository)
    lines = ["---"]
    if license:
        lines.append(f"license: {_scalar(license)}")
    if repository.bases:
        lines += ["base_model:", *(f"- {_scalar(base)}" for base in repository.bases)]
        # Also where nothing was rounded: the Hub knows no "converted", and lists a repository of safetensors
        # without this key among the fine-tunes, which is further from the truth.
        lines.append("base_model_relation: quantized")
    lines += [f"library_name: {_scalar(_library(items))}", "pipeline_tag: text-generation", "quantized_by: exporter"]
    lines += ["tags:", *(f"- {_scalar(tag)}" for tag in tags(items)), "---"]
    return "\n".join(lines)


def license_of(repository: Repository) -> str:
    """As asked for; else that of OpenAI's releases, where nothing comes from anything else."""
    released = bool(repository.bases) and all(base.startswith(RELEASES) for base in repository.bases)
    return repository.license or (RELEASED_UNDER if released else "")


def tags(items: Iterable[Item]) -> list[str]:
    """What people search by: formats, numbers, the architecture."""
    found: dict[str, None] = {}
    for item in items:
        found |= dict.fromkeys(_TAGS.get(item.format, ()))
        found |= dict.fromkeys(["transformers.js"] if _is_web(item) else [])
    schemes = {scheme.partition("-")[0] for item in items for scheme in item.schemes}
    found |= dict.fromkeys(name for name in ("mxfp4", "int4", "int8") if name in schemes)
    if any("gptq" in item.methods for item in items):
        found["gptq"] = None
    return [*found, "gpt_oss", "conversational"]


def _library(items: Iterable[Item]) -> str:
    items = list(items)
    if items and all(_is_web(item) for item in items):
        return "transformers.js"
    return next((name for fmt, name in _LIBRARIES.items() if any(item.format == fmt for item in items)), "gguf")


def _is_web(item: Item) -> bool:
    return (item.format, item.target) == ("onnx", "webgpu")


def _scalar(value: str) -> str:
    """A string that YAML cannot read as anything else. JSON's quoted strings are YAML's, but for surrogates."""
    line = cleaned(value)
    plain = _PLAIN.fullmatch(line) and line.lower() not in _WORDS
    return line if plain else json.dumps(line, ensure_ascii=False)
