"""Hidden states between layers, on disk: calibration holds a layer, not a text, and goes on where it was killed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from blake3 import blake3

_CHUNK = 1 << 24


class Spill:
    """float32 [2, tokens, H] before a layer: of the model as it is being quantized, and of the released one.

    `hidden-<layer>.bin` is whole when state.json names it; the file of the layer under work is a copy.
    """

    def __init__(self, folder: Path, tokens: int, hidden: int) -> None:
        self.folder, self.shape = folder, (2, tokens, hidden)
        folder.mkdir(parents=True, exist_ok=True)

    def latest(self) -> int | None:
        """The layer that the states on disk are the input of; None where there are none that can be trusted."""
        try:
            state = json.loads((self.folder / "state.json").read_text())
            layer, digest = int(state["layer"]), str(state["digest"])
            return layer if _digest(self._path(layer)) == digest else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def create(self) -> npt.NDArray[np.float32]:
        """Room for the embeddings; `commit(0)` when they are in."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        return np.memmap(self._work, np.float32, "w+", shape=self.shape)

    def open(self, layer: int) -> npt.NDArray[np.float32]:
        """The input of `layer`, to be changed into its output."""
        shutil.copyfile(self._path(layer), self._work)
        return np.memmap(self._work, np.float32, "r+", shape=self.shape)

    def scratch(self, shape: Sequence[int]) -> npt.NDArray[np.float32]:
        """Zeros in a file of their own, which the next call, or commit, takes away."""
        self._scratch.unlink(missing_ok=True)
        return np.memmap(self._scratch, np.float32, "w+", shape=tuple(shape))

    def commit(self, layer: int) -> None:
        """What was being worked on is the input of `layer` now."""
        with open(self._work, "rb+") as f:
            os.fsync(f.fileno())
        digest = _digest(self._work)
        os.replace(self._work, self._path(layer))
        partial = self.folder / "state.json.partial"
        partial.write_text(json.dumps({"layer": layer, "digest": digest}) + "\n")
        os.replace(partial, self.folder / "state.json")
        self._scratch.unlink(missing_ok=True)
        if layer:
            self._path(layer - 1).unlink(missing_ok=True)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _work(self) -> Path:
        return self.folder / "hidden.partial"

    @property
    def _scratch(self) -> Path:
        return self.folder / "scratch.partial"

    def _path(self, layer: int) -> Path:
        return self.folder / f"hidden-{layer}.bin"


def _digest(path: Path) -> str:
    h = blake3()
    with open(path, "rb", buffering=0) as f:
        while chunk := f.read(_CHUNK):
            h.update(chunk)
    return h.hexdigest()
