"""Whether this machine has what a proof needs: asked before any work, not after it."""

from __future__ import annotations

import importlib.util

from exporter.errors import MissingExtra, UsageError

_NEEDED = {"torch": "the reference forward", "tokenizers": "reading text", "xllamacpp": "running a GGUF"}


def require_runtimes(device: str) -> None:
    """Raises MissingExtra for a library that is not installed, UsageError for a device that is not there."""
    for package, purpose in _NEEDED.items():
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, "validate", purpose)
    resolve_device(device)


def require_calibration(device: str) -> None:
    """Raises MissingExtra for what calibrated rounding needs and is not installed, UsageError for no such device."""
    for package, purpose in (("torch", "calibrated rounding"), ("tokenizers", "reading calibration text")):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, "validate", purpose)
    resolve_device(device)


def resolve_device(name: str) -> str:
    """The torch device that "auto", "cpu", "cuda" or "cuda:N" means here."""
    from exporter.model.layer import import_torch

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
