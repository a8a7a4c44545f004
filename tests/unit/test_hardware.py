"""What a report says of the machine, and whether that was the target."""

from __future__ import annotations

import json
import os
import sys
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from exporter.pipeline.profiles import source_text
from exporter.pipeline.target import HOST, limit_for, target
from exporter.types.profile import Profile
from exporter.validate import hardware as hw
from exporter.validate import limits

GIB = 1 << 30
GPU = Profile.from_toml(source_text("16gb"), "16gb", "16gb")
CPU = Profile.from_toml(source_text("cpu"), "cpu", "cpu")
LIMITED = {"limit_bytes": 16 * GIB, "limit_by": "cgroup", "limit_read_again_bytes": 0}


def machine(memory: float = 23.5, gpus: Any = (), **more: Any) -> dict[str, Any]:
    return {"cpu": "Xeon", "memory_bytes": round(memory * GIB), "gpus": list(gpus), **more}


def card(memory: float | None, name: str = "NVIDIA GeForce RTX 4080") -> dict[str, Any]:
    return {"name": name, "memory_bytes": None if memory is None else round(memory * GIB)}


# This machine


def test_this_machine() -> None:
    found = hw.hardware()
    assert json.loads(json.dumps(found)) == found
    assert found["memory_bytes"] == psutil.virtual_memory().total
    assert 0 < found["cores"] <= (os.cpu_count() or 1)
    assert found["cpu"]
    assert found["python"] == sys.version.split()[0]
    assert found["versions"]["numpy"]
    assert "no-such-package" not in hw.versions(("no-such-package", "numpy"))
    assert found.get("allowed_bytes", 1) < found["memory_bytes"]


def test_a_container_with_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "allowed_bytes", lambda: GIB)
    assert hw.hardware()["allowed_bytes"] == GIB


def test_the_least_of_all_groups_around_us_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "a" / "b"
    own.mkdir(parents=True)
    for path, allowed in [(own, "max"), (own.parent, "5000"), (tmp_path, "9000")]:
        (path / "memory.max").write_text(allowed + "\n")
    monkeypatch.setattr(limits, "own_groups", lambda: [(2, own, tmp_path)])
    assert limits.allowed_bytes() == 5000
    monkeypatch.setattr(limits, "own_groups", list)
    assert limits.allowed_bytes() is None


def test_the_name_of_a_processor(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nmodel\t\t: 85\nmodel name\t: AMD EPYC 9654 \nflags\t: a b\n")
    assert hw.cpu_name(path) == "AMD EPYC 9654"
    path.write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")  # ARM names none
    assert hw.cpu_name(path)
    assert hw.cpu_name(tmp_path / "none")


# GPUs, where there is no driver


def pynvml(name: str | bytes = "NVIDIA H100", missing: bool = False) -> Any:
    """As nvidia-ml-py answers, of one GPU."""

    def start() -> None:
        if missing:
            raise RuntimeError("NVML Shared Library Not Found")

    memory = types.SimpleNamespace(total=80 * GIB, used=GIB)
    return types.SimpleNamespace(
        nvmlInit=start,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetMemoryInfo=lambda device: memory,
        nvmlDeviceGetCudaComputeCapability=lambda device: (9, 0),
        nvmlDeviceGetName=lambda device: name,
        nvmlSystemGetDriverVersion=lambda: "580.65",
    )


@pytest.mark.parametrize("name", ["NVIDIA H100", b"NVIDIA H100"])
def test_gpus_by_nvml(monkeypatch: pytest.MonkeyPatch, name: str | bytes) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", pynvml(name))
    known = {"memory_bytes": 80 * GIB, "compute_capability": "9.0", "driver": "580.65", "used_bytes": GIB}
    assert hw.gpus() == [{"name": "NVIDIA H100", **known}]


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An nvidia-smi that does as told, and no NVML."""
    monkeypatch.setitem(sys.modules, "pynvml", pynvml(missing=True))
    monkeypatch.setenv("PATH", str(tmp_path))

    def make(script: str) -> list[dict[str, Any]]:
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return hw.gpus()

    return make


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_gpus_by_nvidia_smi(smi: Any) -> None:
    (gpu,) = smi('[ "$2" = --format=csv,noheader,nounits ] && echo "NVIDIA GeForce RTX 4080, 16376, 8.9, 560.94, 512"')
    known = {"compute_capability": "8.9", "driver": "560.94", "memory_bytes": 16376 << 20, "used_bytes": 512 << 20}
    assert gpu == {"name": "NVIDIA GeForce RTX 4080", **known}
    (gpu,) = smi('echo "NVIDIA GB10, [N/A], 12.1, 580.65, [N/A]"')
    assert (gpu["memory_bytes"], gpu["used_bytes"]) == (None, None)


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
@pytest.mark.parametrize("script", ["exit 9", "echo NVIDIA-SMI has failed", "kill -9 $$", "exec sleep 60"])
def test_a_driver_that_does_not_answer(smi: Any, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.setattr(hw, "_SMI_SECONDS", 0.3)
    started = time.monotonic()
    assert smi(script) == []
    assert time.monotonic() - started < 20


def test_no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hw.gpus() == []


# The target


def test_on_the_target_gpu() -> None:
    found = target(GPU, "cuda", machine(gpus=[card(15.9)]), {})
    assert found == {
        "profile": "16gb",
        "device": "gpu",
        "memory_bytes": GPU.hardware.memory,
        "on_target": True,
        "statement": "validated on the target (a GPU with 15.9 GiB): run on NVIDIA GeForce RTX 4080 with 15.9 GiB",
    }


def test_emulated_on_a_cpu() -> None:
    found = target(GPU, "cpu", machine(gpus=[card(15.9)]), LIMITED)
    assert not found["on_target"], "the card is there, but it did not run on it"
    assert found["statement"] == (
        "not validated on the target (a GPU with 15.9 GiB): run on a CPU (Xeon) with 23.5 GiB of memory under a limit "
        "of 16 GiB, enforced by cgroup (the process and the pages of files that it read, together); it ran on the CPU"
    )
    again = target(GPU, "cpu", machine(), {**LIMITED, "limit_read_again_bytes": 2 * GIB})
    assert "at which 2 GiB of its files were dropped and read again" in again["statement"]
    private = target(GPU, "cpu", machine(), {**LIMITED, "limit_by": "rlimit"})["statement"]
    assert "enforced by rlimit (private memory only, mapped files not counted)" in private


def test_without_a_limit_the_reason_is_said() -> None:
    said = target(GPU, "cpu", machine(), {}, "this machine has less memory")["statement"]
    assert "with no limit, because this machine has less memory; it ran on the CPU" in said


@pytest.mark.parametrize(
    ("cards", "on_target"),
    [
        ([card(15.6)], True),  # -2 %
        ([card(15.5)], False),
        ([card(18.2)], True),  # +15 %
        ([card(18.4)], False),
        ([card(79.6, "NVIDIA H100")], False),
        ([card(None)], False),
        ([], False),
        ([card(15.9), card(15.9)], True),
        ([card(15.9), card(23.9)], False),  # which of them ran it is not known
    ],
)
def test_how_near_a_gpu_must_be(cards: list[dict[str, Any]], on_target: bool) -> None:
    found = target(GPU, "cuda", machine(gpus=cards), {})
    assert found["on_target"] is on_target
    assert found["statement"].startswith("validated" if on_target else "not validated")


def test_the_larger_gpu_is_named() -> None:
    said = target(GPU, "cuda", machine(gpus=[card(79.6, "NVIDIA H100")]), {})["statement"]
    assert "run on NVIDIA H100 with 79.6 GiB with no limit, because none was asked for; " in said
    assert said.endswith("; NVIDIA H100 has 79.6 GiB")


def test_on_the_target_cpu() -> None:
    assert target(CPU, "cpu", machine(31.2), {})["on_target"]
    assert not target(CPU, "cpu", machine(64), LIMITED)["on_target"]
    assert not target(CPU, "cuda", machine(31.2, [card(31.2)]), {})["on_target"]
    # A container of that size on a larger machine is one.
    assert target(CPU, "cpu", machine(64, allowed_bytes=round(31.2 * GIB)), {})["on_target"]
    assert not target(CPU, "cpu", machine(31.2, allowed_bytes=8 * GIB), {})["on_target"]


def test_the_limit_of_a_profile(tmp_path: Path) -> None:
    limit = limit_for(GPU, [tmp_path])
    assert limit.bytes == GPU.hardware.memory - GPU.hardware.reserve + HOST
    assert limit.reason == "the 15.9 GiB of profile 16gb"
    assert limit.files == (tmp_path,)
    assert (limit.device, limit_for(CPU).device) == (GPU.hardware.usable, 0)
    small = replace(GPU, hardware=replace(GPU.hardware, memory=8 * GIB), name="mine")
    assert limit_for(small).reason == "the 8 GiB of profile mine"
