"""ONNX side by side: exporter, onnxruntime-genai's builder, optimum-onnx.

    python benchmarks/onnx_peers.py tests/data/tiny-gpt-oss --work bench --builder PYTHON --optimum PYTHON

`--builder` is a Python with onnxruntime-genai, transformers and accelerate, `--optimum` one with optimum-onnx
0.1.0 (transformers before 4.58) and accelerate; a tool without one is left out. Every export is a process of its
own, whose CPU seconds and peak memory come from the kernel (wait4). Numbers and speed of what they made are taken
by peers/onnx_figures.py: one loop for all, the same held-out windows, speeds in turns in one process. Peak memory
and load time are those of a process that loads the file as it is and does nothing else.

`--shapes`: also one layer of gpt-oss-20b's shape (32 experts, hidden 2880, a vocabulary of 2048) of made-up
numbers: exports of it, and decoding with our accuracy_level on QMoE and without one, as the builder leaves it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from convert_peers import RESULTS, cpu_name, measure, versions_in

# Nothing heavy is imported here, for the reason given in convert_peers.

PEERS = Path(__file__).parent / "peers"
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
RECIPES = ("gptq-int4", "exact-q8", "exact-bf16", "f32")
PRECISIONS = ("int4", "int8", "fp32")
DISTRIBUTIONS = {
    "python": ("onnxruntime", "onnx", "onnx-ir", "transformers", "torch"),
    "builder": ("onnxruntime-genai", "onnxruntime", "transformers"),
    "optimum": ("optimum-onnx", "optimum", "transformers", "torch"),
}
BASE = "builder int4"  # what speeds are ratios to
Row = dict[str, Any]


def exporter(args: argparse.Namespace, recipe: str, until: str) -> list[str]:
    command = [args.python, "-m", "exporter", "quantize", "{source}", "-p", str(PEERS / "onnx.toml"), "-f", "onnx"]
    return [*command, "--recipe", recipe, "--out", "{out}", "--until", until, "-q"]


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """Row -> command; "{source}" and "{out}" stand for folders."""
    made = {f"exporter {Path(r).stem}": exporter(args, r, "export") for r in args.recipe}
    if args.builder:
        builder = [args.builder, "-m", "onnxruntime_genai.models.builder", "-i", "{source}", "-o", "{out}", "-e", "cpu"]
        made |= {f"builder {p}": [*builder, "-p", p] for p in args.precision}
    if args.optimum:
        task = ["--task", "text-generation-with-past", "{out}"]
        made["optimum fp32"] = [
            args.optimum,
            "-m",
            "optimum.commands.optimum_cli",
            "export",
            "onnx",
            "-m",
            "{source}",
            *task,
        ]
    return made


def export_all(args: argparse.Namespace, source: Path, work: Path, rows: dict[str, list[str]]) -> dict[str, Row]:
    """Run every command on a fresh folder; what it took and where its graph is."""
    found = {}
    for name, command in rows.items():
        out = work / name.replace(" ", "-")
        filled = [a.format(source=source, out=out) for a in command]
        taken = measure(filled, source, out, out.with_name(out.name + ".log"))
        (graph,) = out.rglob("model.onnx")
        size = sum(p.stat().st_size for p in graph.parent.iterdir() if p.name.startswith("model"))
        kept = {key: taken[key] for key in ("cpu_s", "wall_s", "peak_rss_bytes", "load_before")}
        found[name] = {"export": kept, "bytes": size, "folder": str(graph.parent)}
        print(f"{name}: {taken['cpu_s']} s CPU, {int(str(taken['peak_rss_bytes'])) / 1e6:.0f} MB", file=sys.stderr)
    return found


def figures(args: argparse.Namespace, what: str, first: Path, tokens: Path, named: dict[str, str], log: Path) -> Row:
    command = [args.python, PEERS / "onnx_figures.py", what, first, tokens, "--repeat", str(args.repeat)]
    command += [f"{name}={folder}" for name, folder in named.items()]
    with log.open("wb") as sink:
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=sink).stdout
    found: Row = json.loads(answer)
    return found


def loaded(args: argparse.Namespace, source: Path, tokens: Path, folder: str, work: Path) -> Row:
    """Load time, and the peak memory of a process that only loads, its libraries included."""
    out = work / "load"
    command = [args.python, str(PEERS / "onnx_figures.py"), "load", "-", str(tokens), f"it={folder}"]
    log = work / "load.log"
    taken = measure(command, source, out, log)
    last = log.read_text(errors="replace").strip().splitlines()[-1]
    return {"load_s": json.loads(last)["it"]["load_s"], "peak_rss_bytes": taken["peak_rss_bytes"]}


def with_ratios(speeds: dict[str, Row], base: str) -> dict[str, Row]:
    """Adds how many times faster than `base` each is: the median over turns, and the least and most of them."""
    for row in speeds.values() if base in speeds else ():
        for kind, found in row.items():
            pairs = zip(found["runs"], speeds[base][kind]["runs"], strict=True)
            each = [own / other for own, other in pairs]
            found |= {"over_base": round(statistics.median(each), 3), "from": min(each), "to": max(each)}
    return speeds


def demo(args: argparse.Namespace, work: Path, tokens: Path) -> dict[str, Row]:
    """The rows of the checkpoint named on the command line."""
    source = args.checkpoint
    rows = export_all(args, source, work, commands(args))
    folders = {name: row["folder"] for name, row in rows.items()}
    compared = figures(args, "compare", source, tokens, folders, work / "compare.log")
    speeds = with_ratios(figures(args, "speed", source / "config.json", tokens, folders, work / "speed.log"), BASE)
    for name, row in rows.items():
        row |= {
            "kl": compared[name],
            "speed": speeds[name],
            "loaded": loaded(args, source, tokens, row.pop("folder"), work),
        }
    return rows


def shapes(args: argparse.Namespace, work: Path, tokens: Path) -> dict[str, Row]:
    """One layer of 20b: exports, and decoding with and without accuracy_level."""
    source = work / "layer-20b"
    if not source.exists():
        make = Path(__file__).parents[1] / "scripts" / "make_synthetic.py"
        options = ["--model", "20b", "--layers", "1", "--vocab", "2048", "--out", source]
        subprocess.run([args.python, make, *options], check=True, stdout=subprocess.DEVNULL)
    rows = {"exporter int4": exporter(args, str(PEERS / "rtn-int4.toml"), "export")}
    rows |= {f"exporter {r}": exporter(args, r, "export") for r in args.recipe if r.startswith("exact")}
    rows |= {name: command for name, command in commands(args).items() if name == BASE}
    found = export_all(args, source, work / "shapes", rows)
    named = {name: row.pop("folder") for name, row in found.items()}
    named["exporter int4, no accuracy_level on QMoE"] = f"{named['exporter int4']}@QMoE:none"
    speeds = figures(args, "speed", source / "config.json", tokens, named, work / "shapes-speed.log")
    for name, row in with_ratios(speeds, BASE).items():
        found.setdefault(name, {})["speed"] = row
    return found


def table(rows: dict[str, Row]) -> str:
    """The rows in Markdown."""
    heads = ["", "MB", "KL mean shipped", "p99", "top-1 %", "KL mean f32", "prefill x", "decode x"]
    heads += ["load s", "load MB", "export CPU s", "export MB"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, row in rows.items():
        kl, speeds, taken = row.get("kl"), row["speed"], row.get("export")
        cells = [name, f"{row['bytes'] / 1e6:.1f}" if "bytes" in row else ""]
        cells += [f"{kl['shipped'][k]:.3g}" for k in ("kl_mean", "kl_p99")] if kl else ["", ""]
        cells += [f"{100 * kl['shipped']['top1']:.2f}", f"{kl['float32']['kl_mean']:.3g}"] if kl else ["", ""]
        cells += [str(speeds[kind].get("over_base", "")) for kind in ("prefill", "decode")]
        cells += [f"{row['loaded']['load_s']}", f"{row['loaded']['peak_rss_bytes'] / 1e6:.0f}"] if kl else ["", ""]
        cells += [f"{taken['cpu_s']:.1f}", f"{taken['peak_rss_bytes'] / 1e6:.0f}"] if taken else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder; what is in it is kept")
    parser.add_argument("--python", default=sys.executable, help="has exporter, onnxruntime and transformers")
    parser.add_argument("--builder", metavar="PYTHON")
    parser.add_argument("--optimum", metavar="PYTHON")
    parser.add_argument("--recipe", action="append", help=f"rows of exporter's; {', '.join(RECIPES)}")
    parser.add_argument("--precision", action="append", help=f"rows of the builder's; {', '.join(PRECISIONS)}")
    parser.add_argument("--shapes", action="store_true", help="also one layer of 20b's shape")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS / "onnx_peers.json")
    args = parser.parse_args()
    args.recipe, args.precision = args.recipe or list(RECIPES), args.precision or list(PRECISIONS)
    args.checkpoint = args.checkpoint.resolve()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    os.environ.update(ENVIRONMENT)
    tokens = work / "tokens.npz"
    command = [args.python, PEERS / "inputs.py", args.checkpoint, "--tokens", tokens]
    facts = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    report = {
        "what": "ONNX for a CPU: numbers, speed, memory and export, tool by tool",
        "checkpoint": args.checkpoint.name,
        "tokens": facts,
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.platform()},
        "threads": 2,
        "versions": versions_in({name: (getattr(args, name), DISTRIBUTIONS[name]) for name in DISTRIBUTIONS}),
        "date": time.strftime("%Y-%m-%d"),
        "speed_base": BASE,
        "rows": demo(args, work, tokens),
    }
    print(table(report["rows"]))
    if args.shapes:
        report["one_layer_of_20b"] = shapes(args, work, tokens)
        print(table(report["one_layer_of_20b"]))
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(args.out, file=sys.stderr)


if __name__ == "__main__":
    main()
