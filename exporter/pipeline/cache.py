"""Where what is made once for all outputs is kept: a checkpoint's predictions on a text."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str, otherwise: Path) -> Path:
    """The folder `name` in $EXPORTER_CACHE, else in the user's cache; `otherwise` where that cannot be written."""
    asked = os.environ.get("EXPORTER_CACHE")
    base = Path(asked) if asked else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "exporter"
    folder = base.expanduser().absolute() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return otherwise
    return folder if os.access(folder, os.W_OK) else otherwise
