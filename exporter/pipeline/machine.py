"""What this machine lets us use."""

from __future__ import annotations

import os


def usable_cpus() -> int:
    """Logical processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


def runtime_threads() -> int:
    """Threads for a runtime: the physical cores we may use, at most 8 (more spin at barriers)."""
    import psutil

    physical = psutil.cpu_count(logical=False) or 1
    return max(1, min(physical, usable_cpus(), 8))
