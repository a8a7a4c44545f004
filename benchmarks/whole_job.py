"""The whole main job on one checkpoint, proof included: seconds, peak memory and the command's own answer.

    python scripts/make_synthetic.py --model 20b --layers 24 --out syn
    python benchmarks/whole_job.py syn --work bench --windows 1 --length 256

The profile is `16gb` with less text where asked: the reference of a 20b-shaped model takes minutes on two
cores. The numbers of a synthetic checkpoint mean nothing, so its gates on KL fail and do not count here; that
every digest is equal does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from convert_peers import RESULTS, cpu_name


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder; what is in it is kept")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    exporter = str(Path(sys.executable).with_name("exporter"))
    text = subprocess.run([exporter, "profiles", "16gb"], capture_output=True, text=True, check=True).stdout
    text = re.sub(r"windows = \d+", f"windows = {args.windows}", text)
    profile = args.work / "16gb-short.toml"
    profile.write_text(re.sub(r"length = \d+", f"length = {args.length}", text))
    answer = args.work / "answer.json"
    started = time.perf_counter()
    with answer.open("wb") as out:
        command = [exporter, "quantize", "-p", str(profile), str(args.checkpoint), "--out", str(args.work), "--json"]
        child = subprocess.Popen(command, stdout=out)
        _, status, usage = os.wait4(child.pid, 0)
    report = {
        "what": "the whole job",
        "checkpoint_bytes": sum(p.stat().st_size for p in args.checkpoint.iterdir()),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
        "load_after": os.getloadavg()[0],
        "wall_s": round(time.perf_counter() - started, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "exit_code": os.waitstatus_to_exitcode(status),
        "answer": json.loads(answer.read_text()),
    }
    for artifact in report["answer"]["artifacts"]:
        artifact["path"] = Path(artifact["path"]).name
    path = RESULTS / f"whole-{args.checkpoint.name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print({k: v for k, v in report.items() if k != "answer"})


if __name__ == "__main__":
    main()
