"""ONNX artifacts of gpt-oss-20b's shape: what exporting takes beside `cp`, and the memory that one takes when it runs.

    python benchmarks/onnx_shapes.py --work bench

Checkpoints of made-up numbers with 6, 12 and 24 layers are exported in three forms: lossless 8 bits for a CPU,
INT4 in groups of 64 for a CPU, FP4 for CUDA. Rounding to INT4 is plain and done before, in the store; what is
timed there is `exporter export`, which packs. Directly before and after each export, `cp` and `sync` write about
as many bytes of the checkpoint's shards (whole files, the later ones perhaps out of the page cache): a ratio is of
seconds a byte, to the mean of the two. The INT4 artifact of the most layers is then loaded in ONNX Runtime, and
a prompt of 64 tokens and 8 more are computed.

Rows are added to those in the results, or replace them. Disk: 40 GB beside the checkpoint for 24 layers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from convert_peers import RESULTS, checkpoint_files, cpu_name, forget
from onnx_fold import Peak, resident

# Nothing heavy is imported here, for the reason given in convert_peers.

RESULT = RESULTS / "onnx_shapes.json"
MAKE = Path(__file__).parents[1] / "scripts" / "make_synthetic.py"
EXPORTER = [sys.executable, "-m", "exporter"]
PROFILE = """
title = "ONNX at real shapes"
model = "openai/gpt-oss-20b"

[hardware]
device = "cpu"
memory = "256GiB"
reserve = "1GiB"
context = 4096
ubatch = 512
runtime = "0.2GiB"

[[artifact]]
format = "onnx"
recipe = "exact-q8"
target = "cpu"
split_size = "60G"

[[artifact]]
format = "onnx"
recipe = "mxfp4-q8"
target = "cuda"
split_size = "60G"

[validate]
windows = 1
length = 256

[gates]
digests_equal = true
"""
PROMPT, MORE = 64, 8
Row = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """`recipe`: a shipped one. `rounded`: it says gptq, which is replaced by rounding, done before the export."""

    recipe: str
    target: str
    rounded: bool = False


FORMS = {
    "exact-q8 cpu": Form("exact-q8", "cpu"),
    "int4-g64 cpu": Form("gptq-int4-g64", "cpu", rounded=True),
    "mxfp4-q8 cuda": Form("mxfp4-q8", "cuda"),
}


# --- processes -------------------------------------------------------------------------------------


def timed(command: list[str], log: Path) -> Row:
    """Wall and CPU seconds and peak memory of a command; its stdout and stderr go to files beside `log`."""
    load, started = os.getloadavg()[0], time.perf_counter()
    with log.with_suffix(".out").open("wb") as out, log.open("wb") as sink:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=sink)
        _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        tail = log.read_text(errors="replace")[-2000:]
        raise SystemExit(f"{' '.join(command)}\nended with {child.returncode}:\n{tail}")
    return {
        "wall_s": round(wall, 2),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "load_before": round(load, 2),
    }


def answer(command: list[str]) -> Any:
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def need_disk(folder: Path, nbytes: int, keep: int) -> None:
    free = shutil.disk_usage(folder).free
    if free - nbytes < keep:
        raise SystemExit(f"{nbytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB free, {keep / 1e9:.0f} GB to be kept")


def copied(checkpoint: Path, nbytes: int, work: Path) -> Row:
    """cp and sync of as many shards, in turns, as come nearest to `nbytes`; then they are removed."""
    shards = sorted(checkpoint.glob("*.safetensors"))
    target, size = work / "copy", 0
    pairs: list[str] = []
    while size + shards[len(pairs) % len(shards)].stat().st_size // 2 <= nbytes or not pairs:
        shard = shards[len(pairs) % len(shards)]
        pairs.append(f"cp '{shard}' '{target}/{len(pairs)}'")
        size += shard.stat().st_size
    target.mkdir()
    forget(shards)
    row = timed(["sh", "-ec", "; ".join([*pairs, f"sync -f '{target}'"])], work / "copy.log")
    shutil.rmtree(target)
    os.sync()
    return {"bytes": size, **row}


# --- one export ------------------------------------------------------------------------------------


def exported(checkpoint: Path, form: Form, args: argparse.Namespace) -> Row:
    """Export one form, beside cp; the artifact is left at row["path"]."""
    work, out = args.work, args.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    recipe = form.recipe
    if form.rounded:
        text = subprocess.run([*EXPORTER, "profiles", recipe], check=True, stdout=subprocess.PIPE, text=True).stdout
        recipe = str(work / "rounded.toml")
        Path(recipe).write_text(text.replace('method = "gptq"', 'method = "rtn"'))
    chosen = [str(checkpoint), "-p", str(work / "shapes.toml"), "-f", "onnx", "-t", form.target, "--recipe", recipe]
    plan = answer([*EXPORTER, "plan", *chosen, "--json"])
    size = int(plan["artifacts"][0]["bytes"])
    need_disk(work, size + int(plan["store_bytes"]), args.keep)
    row: Row = {}
    command, ending = "quantize", ["--until", "export"]
    if form.rounded:
        only = ["--until", "quantize", "-q"]
        row["quantize"] = timed([*EXPORTER, "quantize", *chosen, "-o", str(out), *only], work / "quantize.log")
        command, ending = "export", []
    before = copied(checkpoint, size, work)
    forget([p for folder in (checkpoint, out) for p in folder.rglob("*") if p.is_file()])
    row["export"] = timed([*EXPORTER, command, *chosen, "-o", str(out), *ending, "-q", "--json"], work / "export.log")
    artifact = Path(json.loads((work / "export.out").read_text())["artifacts"][0]["path"])
    row["bytes"] = sum(p.stat().st_size for p in artifact.rglob("*") if p.is_file())
    row["over_checkpoint"] = round(row["bytes"] / sum(p.stat().st_size for p in checkpoint_files(checkpoint)), 3)
    planned = plan["artifacts"][0]
    embedding = sum(int(g["bytes"]) for g in planned["groups"] if g["tensors"] == "embedding")
    row["fit"] = {"weights": planned["fit"]["weights"], "embedding": embedding, "total": planned["fit"]["total"]}
    shutil.rmtree(next(out.glob("*/store")))
    if not args.run:
        shutil.rmtree(out)
    after = copied(checkpoint, size, work)
    cost = statistics.mean(each["wall_s"] / each["bytes"] for each in (before, after))
    row |= {"cp_sync": [before, after], "wall_over_cp_sync": round(row["export"]["wall_s"] / row["bytes"] / cost, 2)}
    return row | {"path": artifact}


# --- running it ------------------------------------------------------------------------------------


def session(folder: Path) -> Row:
    """In a process of its own: load the plain graph, a prompt, more tokens; memory after each."""
    import numpy as np

    from exporter.validate.onnx_session import Decoding, Graph

    base, started, cpu = resident("RssAnon"), time.perf_counter(), time.process_time()
    with Peak() as loading:
        graph = Graph(folder / "model.onnx", threads=2, provider="CPUExecutionProvider")
    found: Row = {
        "load_s": round(time.perf_counter() - started, 1),
        "load_cpu_s": round(time.process_time() - cpu, 1),
        "anonymous_before_bytes": base,
        "anonymous_loaded_bytes": resident("RssAnon"),
        "anonymous_loading_peak_bytes": loading.bytes,
        "file_loaded_bytes": resident("RssFile"),
    }
    decoding = Decoding(graph)
    tokens = np.random.default_rng(0).integers(0, graph.vocab_size, PROMPT + MORE)
    finite, milliseconds = True, []
    with Peak() as running:
        for part in (tokens[:PROMPT], *tokens[PROMPT:, None]):
            started = time.perf_counter()
            logits = decoding.append(part)
            milliseconds.append(round(1000 * (time.perf_counter() - started), 1))
            finite &= bool(np.isfinite(logits).all())
    return found | {
        "prompt_tokens": PROMPT,
        "prompt_ms": milliseconds[0],
        "decode_ms": milliseconds[1:],
        "decode_ms_median": statistics.median(milliseconds[1:]),
        "anonymous_after_bytes": resident("RssAnon"),
        "anonymous_running_peak_bytes": running.bytes,
        "file_after_bytes": resident("RssFile"),
        "finite": finite,
    }


def available() -> int:
    line = next(li for li in Path("/proc/meminfo").read_text().splitlines() if li.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def ran(folder: Path, fit: Row) -> Row:
    """Runs it when there is memory. The embedding stays in the file and is mapped: it counts as it is in it."""
    weights = int(fit["weights"])
    while available() < weights * 1.15:
        print(f"{available() / 1e9:.1f} GB of memory free; waiting for {weights * 1.15 / 1e9:.1f}", file=sys.stderr)
        time.sleep(10)
    load = os.getloadavg()[0]
    found: Row = answer([sys.executable, __file__, "--session", str(folder)])
    more = found["anonymous_loaded_bytes"] - found["anonymous_before_bytes"]
    ratio = round((more + fit["embedding"]) / weights, 3)
    return {"fit": fit, "loaded_over_fit_weights": ratio, **found, "load_before": round(load, 2)}


# --- the whole -------------------------------------------------------------------------------------


def report() -> Row:
    """What is in the results already, with this machine's facts."""
    old: Row = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    return {
        "what": "ONNX artifacts of 20b's shape: export beside cp, memory at run time",
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": platform.platform(),
        },
        "versions": {name: version(name) for name in ("exporter", "onnxruntime", "onnx", "numpy")},
        "date": time.strftime("%Y-%m-%d"),
        "bars": {"wall_over_cp_sync": 3, "peak_rss_bytes": 3_000_000_000, "over_checkpoint of int4-g64 cpu": 1},
        "exports": old.get("exports", {}),
        "running": old.get("running", {}),
    }


def table(rows: dict[str, Row]) -> str:
    heads = ["", "GB", "of checkpoint", "wall s", "CPU s", "peak MB", "cp + sync s", "times cp", "load"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, row in rows.items():
        taken = row["export"]
        cp = " / ".join(f"{each['wall_s'] / each['bytes'] * row['bytes']:.1f}" for each in row["cp_sync"])
        cells = [name, f"{row['bytes'] / 1e9:.2f}", row["over_checkpoint"], taken["wall_s"], taken["cpu_s"]]
        cells += [f"{taken['peak_rss_bytes'] / 1e6:.0f}", cp, row["wall_over_cp_sync"], taken["load_before"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, help="scratch folder")
    parser.add_argument("--checkpoint", type=Path, help="made by make_synthetic.py; default: made and removed")
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 12, 24])
    parser.add_argument("--form", action="append", choices=FORMS, help="default: all")
    parser.add_argument("--keep", type=int, default=15_000_000_000, help="bytes of disk to leave free")
    parser.add_argument("--session", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.session:
        print(json.dumps(session(args.session)))
        return
    if args.work is None:
        parser.error("--work is missing")
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "shapes.toml").write_text(PROFILE)
    for layers in [None] if args.checkpoint else args.layers:
        checkpoint = args.checkpoint.resolve() if args.checkpoint else args.work / f"20b-{layers}"
        if not checkpoint.exists():
            subprocess.run([sys.executable, MAKE, "--layers", str(layers), "--out", checkpoint], check=True)
        count = json.loads((checkpoint / "config.json").read_text())["num_hidden_layers"]
        for name in args.form or FORMS:
            args.run = FORMS[name].rounded and count == max(args.layers)
            row = exported(checkpoint, FORMS[name], args)
            found, path = report(), row.pop("path")
            found["exports"][f"{name}, {count} layers"] = row
            if args.run:
                found["running"][f"{name}, {count} layers"] = ran(path, row["fit"])
                shutil.rmtree(args.work / "out")
            RESULT.write_text(json.dumps(found, indent=1) + "\n")
            print(table({f"{name}, {count} layers": row}), file=sys.stderr)
        if not args.checkpoint:
            shutil.rmtree(checkpoint)
    print(table(report()["exports"]))
    print(json.dumps(report()["running"], indent=1))
    print(RESULT, file=sys.stderr)


if __name__ == "__main__":
    main()
