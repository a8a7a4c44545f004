"""Artifact formats. A module or package in this folder that defines `FORMAT` is one."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from exporter.errors import UsageError, did_you_mean
from exporter.formats.base import Format


@functools.cache
def all_formats() -> dict[str, Format]:
    """Every format by name."""
    found: dict[str, Format] = {}
    for module in pkgutil.iter_modules(__path__):
        fmt = getattr(importlib.import_module(f"{__name__}.{module.name}"), "FORMAT", None)
        if fmt is not None:
            found[fmt.name] = fmt
    return found


def get_format(name: str) -> Format:
    """The format called `name`; UsageError with the nearest name otherwise."""
    formats = all_formats()
    if name not in formats:
        raise UsageError(
            f'unknown format "{name}".{did_you_mean(name, formats)}', hint=f"formats: {', '.join(formats)}"
        )
    return formats[name]
