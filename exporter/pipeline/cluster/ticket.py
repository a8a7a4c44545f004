"""What a machine must have in common with the driver before it gets work."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import exporter
from exporter.errors import Refused
from exporter.pipeline.profiles import load_profile, profile_names, recipe_names, source_text
from exporter.pipeline.progress import Progress
from exporter.pipeline.runtimes import resolve_device
from exporter.pipeline.source import open_model
from exporter.pipeline.workers import require_reach

# What changes numbers, or what a proof says of them.
_LIBRARIES = ("numpy", "torch", "tokenizers", "xllamacpp", "onnxruntime", "onnxruntime-genai", "onnx", "onnx-ir")
_THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class Ticket:
    """Sent with every job.

    folders: a model's output folder -> the token of pipeline/workers.py
    checkpoints: a model as it is opened -> its fingerprint; profiles: a name or file -> its hash
    versions: of `versions`; environment: EXPORTER_* of the driver, and its threads
    directory: where the driver was started, for a recipe that a profile names by a path
    cache: EXPORTER_CACHE of all; device: as asked for
    """

    folders: Mapping[Path, str]
    checkpoints: Mapping[str, str]
    profiles: Mapping[str, str]
    versions: Mapping[str, str]
    environment: Mapping[str, str]
    directory: Path
    cache: Path
    device: str

    def settle(self) -> None:
        """Make this process like the driver's."""
        os.environ.pop(_THREADS, None)  # Ray's own choice; another number of threads sums in another order
        os.environ.update(self.environment)
        os.environ["EXPORTER_CACHE"] = str(self.cache)
        with suppress(OSError):
            os.chdir(self.directory)


def environment() -> dict[str, str]:
    """What of this process's environment belongs to the run. No secrets: those stay on each machine."""
    return {name: value for name, value in os.environ.items() if name.startswith("EXPORTER_") or name == _THREADS}


@functools.cache
def versions() -> dict[str, str]:
    """Of exporter, to the last line of its code, of Python, and of the libraries that compute."""
    found = {"exporter": f"{exporter.__version__} ({_code()[:12]})", "Python": platform.python_version()}
    for name in _LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _code() -> str:
    """Names the package's source files, its profiles and recipes."""
    h, folder = hashlib.sha256(), Path(exporter.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        h.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    for name in (*profile_names(), *recipe_names()):
        h.update(f"{name}\n{source_text(name)}".encode())
    return h.hexdigest()


@dataclass(frozen=True)
class Seen:
    """What a machine found. device: the kind that it computes on; cache: whether the driver's is here."""

    device: str
    cache: bool


def look(ticket: Ticket, mark: str) -> Seen:
    """Called on a machine: Refused where it differs from the driver's. mark: a file in the cache there."""
    _require_versions(ticket.versions, versions())
    for folder, token in ticket.folders.items():
        require_reach(folder, token)
    for model, expected in ticket.checkpoints.items():
        if open_model(model, Progress()).fingerprint() != expected:
            raise Refused(f"{model} is another checkpoint there", hint="it must be one that all machines share")
    for profile, expected in ticket.profiles.items():
        if load_profile(profile).sha256 != expected:
            raise Refused(f"{profile} is another profile there", hint="it must be one file that all machines share")
    device = resolve_device(ticket.device).partition(":")[0]
    return Seen(device, (ticket.cache / mark).is_file() and os.access(ticket.cache, os.W_OK))


def _require_versions(ours: Mapping[str, str], theirs: Mapping[str, str]) -> None:
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            there, here = theirs.get(name, "not installed"), ours.get(name, "not installed")
            raise Refused(f"{name} is {there} there, {here} here", hint="install the same versions on all machines")
