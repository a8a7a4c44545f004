"""How long `exporter --help` takes, beside Python doing nothing.

python benchmarks/startup.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from convert_peers import RESULTS, cpu_name

RUNS = 30


def seconds(command: list[str]) -> list[float]:
    """Wall seconds of each run, the first one left out."""
    found = []
    for _ in range(RUNS + 1):
        started = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        found.append(time.perf_counter() - started)
    return found[1:]


def main() -> None:
    exporter = str(Path(sys.executable).with_name("exporter"))
    commands = {"exporter --help": [exporter, "--help"], "python -c pass": [sys.executable, "-c", "pass"]}
    times = {name: seconds(command) for name, command in commands.items()}
    report = {
        "what": "start-up",
        "cpu": cpu_name(),
        "python": sys.version.split()[0],
        "date": time.strftime("%Y-%m-%d"),
        "runs": RUNS,
        "seconds": {
            name: {"median": round(statistics.median(t), 4), "worst": round(max(t), 4)} for name, t in times.items()
        },
    }
    path = RESULTS / "startup.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["seconds"], indent=1))


if __name__ == "__main__":
    main()
