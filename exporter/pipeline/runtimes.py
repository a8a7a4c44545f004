"""Whether this machine has what a run needs: asked before any work, not after it."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable
from contextlib import suppress

from exporter.errors import MissingExtra, UsageError
from exporter.validate import tensorrt
from exporter.validate.onnx_session import require_environment

# Module -> what it is for. The package's name differs by a dash.
# What NVIDIA's driver makes; the last is Windows' under WSL.
_DRIVER = ("/dev/nvidiactl", "/dev/nvidia0", "/proc/driver/nvidia", "/dev/nvhost-gpu", "/dev/nvmap", "/dev/dxg")
_PROOF = {"torch": "the reference forward", "tokenizers": "reading text"}
_RUNTIMES = {
    "gguf": ("validate", {"xllamacpp": "running a GGUF"}),
    "onnx": (
        "onnx",
        {"onnxruntime": "running an ONNX artifact", "onnxruntime_genai": "generating from an ONNX artifact"},
    ),
    # TensorRT-RTX itself is not for every machine: without it the proof says that no engine was built.
    "tensorrt": ("onnx", {"onnxruntime": "running a TensorRT artifact's graphs"}),
}
_GRAPHS = {"onnx": "writing an ONNX graph", "onnx_ir": "writing an ONNX graph"}
_WRITERS = {"onnx": ("onnx", _GRAPHS), "tensorrt": ("onnx", _GRAPHS)}


def require_runtimes(device: str, formats: Iterable[str]) -> None:
    """Raises MissingExtra for a library that a proof of `formats` needs and is not here, UsageError for a device."""
    _require("validate", _PROOF)
    for name in formats:
        _require(*_RUNTIMES.get(name, ("", {})))
        if name == "onnx":
            _require("validate", {"jinja2": "rendering a conversation as the artifact should"})
            require_environment("shipped")
        if name == "tensorrt":
            with suppress(MissingExtra):
                tensorrt.version()
    resolve_device(device)


def require_writers(formats: Iterable[str]) -> None:
    """Raises MissingExtra for a library that writing `formats` needs and is not installed."""
    for name in formats:
        _require(*_WRITERS.get(name, ("", {})))


def require_calibration(device: str) -> None:
    """Raises MissingExtra for what calibrated rounding needs and is not installed, UsageError for no such device."""
    _require("validate", {"torch": "calibrated rounding", "tokenizers": "reading calibration text"})
    resolve_device(device)


def _require(extra: str, modules: dict[str, str]) -> None:
    for module, purpose in modules.items():
        if importlib.util.find_spec(module) is None:
            raise MissingExtra(module.replace("_", "-"), extra, purpose)


def resolve_device(name: str) -> str:
    """The torch device that "auto", "cpu", "cuda" or "cuda:N" means here."""
    if name == "cpu" or (name == "auto" and not _may_have_cuda()):
        return "cpu"  # importing torch takes 2.5 s, and what is kept of the reference may be all that is needed
    from exporter.model.torch import import_torch

    torch = import_torch()
    cuda = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if cuda else "cpu"
    kind, _, index = name.partition(":")
    if name != "cpu" and (kind != "cuda" or (index and not index.isdigit())):
        raise UsageError(f'unknown device "{name}"', hint="devices: auto, cpu, cuda, cuda:N")
    if kind == "cuda" and not (cuda and int(index or 0) < torch.cuda.device_count()):
        raise UsageError(f'device "{name}" is not here', hint="--device cpu")
    return name


def _may_have_cuda() -> bool:
    """Whether a driver of NVIDIA's may be here; False only where it cannot."""
    return sys.platform != "linux" or any(os.path.exists(path) for path in _DRIVER)
