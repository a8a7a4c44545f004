"""What a figure was measured on: processor, memory, GPUs, system, the versions of what ran.

GPUs come from NVIDIA's driver, through nvidia-ml-py or nvidia-smi, whichever is here; without a driver there are none.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from exporter.validate import child, limits

_PACKAGES = (
    "exporter",
    "numpy",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "xllamacpp",
    "gguf",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-genai",
    "onnxruntime-genai-cuda",
    "tensorrt-rtx-cu13",
    "tensorrt",
    "gptqmodel",
    "compressed-tensors",
    "vllm",
)
_QUERY = ("name", "memory.total", "compute_cap", "driver_version", "memory.used")  # of nvidia-smi; MiB
_SMI_SECONDS = 20.0  # a driver that hangs must not hang us


def hardware() -> dict[str, Any]:
    """cpu, cores (physical), memory_bytes, system, python, gpus, load_average, versions of packages.

    `allowed_bytes`: memory that this process may use, where a container or a control group has less than the machine.
    A GPU: name, memory_bytes, compute_capability ("8.9"), driver, used_bytes (by all programs, now).
    Never fails: what cannot be found out is None or left out.
    """
    import psutil

    total = int(psutil.virtual_memory().total)
    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "memory_bytes": total,
        "system": platform.platform(),
        "python": platform.python_version(),
        "gpus": gpus(),
        "load_average": child.load_average(),
        "versions": versions(),
    }
    allowed = limits.allowed_bytes()
    return found if allowed is None or allowed >= total else {**found, "allowed_bytes": allowed}


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """As the processor calls itself; else the machine's architecture."""
    try:
        lines = (line.partition(":") for line in cpuinfo.read_text(errors="replace").splitlines())
        return next(value.strip() for key, _, value in lines if key.strip() == "model name" and value.strip())
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def gpus() -> list[dict[str, Any]]:
    """NVIDIA's, in the driver's order."""
    try:
        return _from_nvml()
    except Exception:  # no package, no driver, or one that does not answer as the package expects
        return _from_smi()


def device_bytes() -> int | None:
    """Bytes that this process holds on NVIDIA's devices now; of all programs where the driver does not tell them apart.

    None without a driver that answers.
    """
    try:
        import pynvml as nvml

        nvml.nvmlInit()
    except Exception:
        return None
    try:
        total = 0
        for index in range(nvml.nvmlDeviceGetCount()):
            device = nvml.nvmlDeviceGetHandleByIndex(index)
            own = [p for p in nvml.nvmlDeviceGetComputeRunningProcesses(device) if p.pid == os.getpid()]
            found = [p.usedGpuMemory for p in own if p.usedGpuMemory]
            total += sum(found) if found else int(nvml.nvmlDeviceGetMemoryInfo(device).used)
        return total
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()


def _from_nvml() -> list[dict[str, Any]]:
    import pynvml as nvml

    nvml.nvmlInit()
    try:
        found = []
        for index in range(nvml.nvmlDeviceGetCount()):
            device = nvml.nvmlDeviceGetHandleByIndex(index)
            memory = nvml.nvmlDeviceGetMemoryInfo(device)
            major, minor = nvml.nvmlDeviceGetCudaComputeCapability(device)
            found.append(
                {
                    "name": _text(nvml.nvmlDeviceGetName(device)),
                    "memory_bytes": int(memory.total),
                    "compute_capability": f"{major}.{minor}",
                    "driver": _text(nvml.nvmlSystemGetDriverVersion()),
                    "used_bytes": int(memory.used),
                }
            )
        return found
    finally:
        nvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _from_smi() -> list[dict[str, Any]]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(
            command, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True, stdin=subprocess.DEVNULL
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in said.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != len(_QUERY):
            continue
        name, total, capability, driver, used = fields
        known = {"name": name, "compute_capability": capability, "driver": driver}
        found.append({**known, "memory_bytes": _mebibytes(total), "used_bytes": _mebibytes(used)})
    return found


def _mebibytes(text: str) -> int | None:
    """ "16376" as bytes; None for "[N/A]"."""
    return int(text) << 20 if text.isdecimal() else None
