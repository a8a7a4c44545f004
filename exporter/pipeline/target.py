"""Whether an artifact was measured on the hardware that it is for, in words; and the limit that stands in for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.types.profile import Hardware, Profile
from exporter.validate.limits import WORDS, Limit

# What a proof holds beside the model: logits of 512 tokens of 201,088 in float32 (0.4 GiB), twice more while they are
# compared, the references, Python and its libraries.
HOST = 3 << 29

_BELOW, _ABOVE = 0.98, 1.15  # of the profile's memory: still that kind of device
_ON_GPU = ("gpu", "cuda", "tensorrt", "tensorrt_rtx", "webgpu")


def limit_for(profile: Profile, files: Sequence[Path] = ()) -> Limit:
    """What a proof's worker may take: the memory that the profile leaves to a model, and HOST for the proof itself.

    For a GPU's profile on the CPU everything is inside it, the mapped file too, as on the device.
    files: what the worker will read; see limits.
    """
    memory = profile.hardware.memory
    usable, device = profile.hardware.usable, profile.hardware.device == "gpu"
    reason = f"the {_gib(memory)} of profile {profile.name}"
    return Limit(usable + HOST, reason, tuple(files), device=usable if device else 0)


def target(
    profile: Profile, used: str, hardware: Mapping[str, Any], memory: Mapping[str, Any], no_limit: str = ""
) -> dict[str, Any]:
    """profile, device, memory_bytes, on_target, statement.

    used: the device that the runtime ran on: "cpu", "cuda", ... hardware: of this machine. memory: the report's, with
    limit_by and limit_bytes where a limit was enforced; else `no_limit` says why none was.
    """
    wanted = profile.hardware
    known = {"profile": profile.name, "device": wanted.device, "memory_bytes": wanted.memory}
    here = _where(used, hardware)
    if problem := _problem(wanted, used, hardware):
        statement = (
            f"not validated on the target ({_device(wanted)}): run on {here} {_limit(memory, no_limit)}; {problem}"
        )
        return {**known, "on_target": False, "statement": statement}
    return {**known, "on_target": True, "statement": f"validated on the target ({_device(wanted)}): run on {here}"}


def _problem(wanted: Hardware, used: str, hardware: Mapping[str, Any]) -> str:
    """Why this was not the target; empty where it was."""
    if wanted.device == "cpu":
        if used != "cpu":
            return f"the target is a CPU, it ran on {used}"
        memory = _machine(hardware)
        return "" if _alike(memory, wanted.memory) else f"the machine has {_gib(memory)}"
    if used not in _ON_GPU:
        return "it ran on the CPU"
    gpus = hardware.get("gpus") or []
    if not gpus:
        return "no driver names the GPU"
    # Which of several ran it is not known: all must be alike.
    other = [gpu for gpu in gpus if not _alike(gpu.get("memory_bytes"), wanted.memory)]
    return f"{other[0]['name']} has {_gib(other[0].get('memory_bytes'))}" if other else ""


def _alike(memory: int | None, wanted: int) -> bool:
    return memory is not None and _BELOW * wanted <= memory <= _ABOVE * wanted


def _machine(hardware: Mapping[str, Any]) -> int:
    """Memory that programs have here."""
    return int(hardware.get("allowed_bytes", hardware["memory_bytes"]))


def _where(used: str, hardware: Mapping[str, Any]) -> str:
    if used in _ON_GPU:
        names = [f"{gpu['name']} with {_gib(gpu.get('memory_bytes'))}" for gpu in hardware.get("gpus") or []]
        return " and ".join(names) or "a GPU that no driver names"
    return f"a CPU ({hardware['cpu']}) with {_gib(_machine(hardware))} of memory"


def _device(wanted: Hardware) -> str:
    return f"a {wanted.device.upper()} with {_gib(wanted.memory)}"


def _limit(memory: Mapping[str, Any], no_limit: str) -> str:
    by = memory.get("limit_by")
    if by is None:
        return f"with no limit, because {no_limit or 'none was asked for'}"
    if memory.get("limit_held") is False:
        taken = _gib(memory["device_peak_bytes"])
        return f"under a limit of {_gib(memory['limit_bytes'])} that {by} did not keep: it took {taken} of the device"
    how = WORDS.get(by)
    words = f"under a limit of {_gib(memory['limit_bytes'])}, enforced by {by}" + (f" ({how})" if how else "")
    again = memory.get("limit_read_again_bytes", 0)
    return f"{words}, at which {_gib(again)} of its files were dropped and read again" if again else words


def _gib(n: int | None) -> str:
    return "memory unknown" if n is None else f"{n / 2**30:.3g} GiB"
