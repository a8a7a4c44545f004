"""Which file for which device: one row for each artifact."""

from __future__ import annotations

import re
from collections.abc import Mapping

from exporter.publish.card.facts import Item, Repository
from exporter.publish.card.markup import code, link, picture, table, text
from exporter.types.sizes import format_size

_NONE = "–"  # noqa: RUF001  # a dash as wide as a digit
LOSSES: Mapping[str, str] = {
    "exact": "nothing: lossless",
    "near": "16-bit numbers to 8 bits: near-lossless",
    "lossy": "weights to 4 bits",
}
_TARGETS: Mapping[tuple[str, str], str] = {
    ("onnx", "cpu"): "ONNX Runtime and onnxruntime-genai, on a CPU",
    ("onnx", "cuda"): "ONNX Runtime and onnxruntime-genai, on NVIDIA GPUs",
    ("onnx", "webgpu"): "transformers.js, in a browser with WebGPU",
    ("tensorrt", "sm75"): "TensorRT-RTX, GeForce RTX 20 and later",
    ("tensorrt", "sm80"): "TensorRT-RTX, GeForce RTX 30 and later, A100",
    ("tensorrt", "sm120"): "TensorRT-RTX, GeForce RTX 50, RTX PRO Blackwell, DGX Spark",
}
_FORMATS: Mapping[str, str] = {
    "gguf": "llama.cpp, Ollama, LM Studio",
    "mxfp4": "transformers, vLLM, TensorRT-LLM",
    "gptq": "GPTQModel",
    "compressed-tensors": "transformers with compressed-tensors",
    "onnx": "ONNX Runtime",
    "tensorrt": "TensorRT-RTX",
}
_COLUMNS = ("take", "planned for", "size", "rounded", "mean KL", "same top token", "tokens/s", "memory")
_UNIT = re.compile(r"(?<=\d) (?=[A-Za-z]+\b)|(?<=\d) (?=±)|(?<=±) ")
_VERDICTS = {"passed": "✓ proof passed", "gate failed": "**✗ a gate FAILED**", "": "**NOT PROVED**"}


def runs_in(item: Item) -> str:
    return _TARGETS.get((item.format, item.target)) or _FORMATS.get(item.format, item.format)


def choice(repository: Repository) -> str:
    """The table, the machines that speeds were measured on, and the picture of all."""
    items = repository.items
    machines = list(dict.fromkeys(item.machine for item in items if item.decode))
    parts = [table(_COLUMNS, [_row(item, repository.name, machines) for item in items], (2, 4, 5, 6))]
    if notes := _notes(items, machines):
        parts.append(notes)
    if repository.compared:
        parts.append(text(repository.compared))
    if repository.overview:
        parts.append(picture(repository.overview))
    parts += [f"Not compared: {text(warning)}" for warning in repository.warnings]
    return "\n\n".join(parts)


def _row(item: Item, repo: str, machines: list[str]) -> list[str]:
    """Figures do not break: a table of many columns is read by its rows."""
    tokens = f"{item.context:,} tokens" if item.context else ""
    decode = text(item.decode)
    if decode and len(machines) > 1:
        decode += f" ({_letter(machines.index(item.machine))})"
    return [
        f"{where(item, repo)}{' ◆' if item.best else ''}<br>{text(runs_in(item))}<br>{_VERDICTS[item.status]}",
        _lines(text(item.device), tokens),
        _lines(format_size(item.size)),
        LOSSES.get(item.loss, _NONE),
        _lines(text(item.kl)),
        _lines(text(item.top1)),
        _lines(decode),
        _lines(
            f"{text(item.predicted)}, predicted" if item.predicted else "",
            f"{text(item.measured)}, measured" if item.measured else "",
        ),
    ]


def _lines(*lines: str) -> str:
    """A number stays with its unit."""
    return "<br>".join(_UNIT.sub("&nbsp;", line) for line in lines if line) or _NONE


def where(item: Item, repo: str) -> str:
    """A link to what is to be taken: a file, or a folder."""
    weights = [name for name in item.files if name.endswith(".gguf")]
    if len(weights) == 1:
        return link(code(item.path(weights[0])), item.path(weights[0]))
    if not item.prefix:
        return code(item.label)
    # A relative link to a folder leads nowhere on the Hub: there it has an address of its own kind.
    address = f"https://huggingface.co/{repo}/tree/main/{item.prefix}" if repo else item.prefix
    return link(code(f"{item.prefix}/"), address)


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else f"A{index}"


def _notes(items: tuple[Item, ...], machines: list[str]) -> str:
    """What the figures of the table mean."""
    notes = []
    if any(item.kl for item in items):
        notes.append(
            "Mean KL, in nats (±: half of the 95% interval): how far the predictions of the next token are from the "
            "checkpoint's, on what the assistant says in conversations; 0 is the same."
        )
    if machines:
        each = [f"{_letter(i)}, {text(name)}" if len(machines) > 1 else text(name) for i, name in enumerate(machines)]
        notes.append(f"Tokens/s of an answer, measured on {'; '.join(each)}.")
    if any(item.predicted for item in items):
        measured = ", measured is that of the proof's own short texts" if any(item.measured for item in items) else ""
        notes.append(f"Predicted memory is for the whole context{measured}.")
    if any(item.best for item in items):
        notes.append("◆ nothing that passed is both smaller and nearer to the checkpoint.")
    return " ".join(notes)
