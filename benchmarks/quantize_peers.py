"""INT4 of attention and experts, side by side: exporter, GPTQModel, llm-compressor, auto-round.

    python benchmarks/quantize_peers.py tests/data/tiny-gpt-oss --work bench --gptqmodel PYTHON \\
        --llmcompressor PYTHON --autoround PYTHON --recipe benchmarks/peers/int4.toml

Each PYTHON is that of an environment where the tool is installed; a tool without one is left out. All
get the same token ids (peers/inputs.py) and groups of the same size, keep embeddings, head and router, and
run on one thread with their own defaults otherwise (peers/run_*.py). Each run is a process of its
own: CPU seconds and peak memory come from the kernel (wait4) and include the processes that it
started and waited for. The peers read a bf16 copy, whose making is a row of its own; exporter reads the release.

What each wrote is then read back by peers/decode.py, put into transformers in float32, and compared with
the release. `--also NAME=FOLDER` reads one more finished folder (GPTQ, compressed-tensors or GGUF).
Of the runs of a row the lowest CPU seconds and the lowest KL count: GPTQModel compiles an extension with
g++ the first time that a machine runs it, and llm-compressor does not make the same numbers twice.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from convert_peers import RESULTS, cpu_name, measure, versions_in

# Nothing heavy is imported here, for the reason given in convert_peers.

PEERS = Path(__file__).parent / "peers"
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "GPTQMODEL_CPU_WORKERS": "2",  # see peers/run_gptqmodel.py; torch stays at one thread
}
# row -> (option that names its Python, script, arguments after the group)
TOOLS = {
    "llm-compressor GPTQ": ("llmcompressor", "run_llmcompressor.py", []),
    "GPTQModel": ("gptqmodel", "run_gptqmodel.py", []),
    "auto-round, rounded": ("autoround", "run_autoround.py", ["0"]),
    "auto-round, tuned 200": ("autoround", "run_autoround.py", ["200"]),
}
DISTRIBUTIONS = {
    "llmcompressor": ("llmcompressor", "compressed-tensors", "transformers", "torch"),
    "gptqmodel": ("gptqmodel", "defuser", "transformers", "torch"),
    "autoround": ("auto-round", "transformers", "torch"),
    "python": ("transformers", "torch", "gguf"),
}
EXPORTER = ["-m", "exporter", "quantize", "{source}", "-p", "{profile}", "-f", "{format}", "--recipe", "{recipe}"]
EXPORTER += ["--out", "{out}", "--until", "export", "-q"]
BF16 = "bf16 copy"
Row = dict[str, Any]


def commands(args: argparse.Namespace, tokens: Path, bf16: Path) -> dict[str, list[str]]:
    """Row -> command; "{out}" stands for the folder to fill."""
    made = {}
    for row, (option, script, extra) in TOOLS.items():
        if python := getattr(args, option):
            made[row] = [python, str(PEERS / script), str(bf16), str(tokens), "{out}", str(args.group), *extra]
    for recipe in args.recipe:
        values = {"source": args.checkpoint, "profile": args.profile, "format": args.format, "recipe": recipe}
        name = Path(recipe).stem
        made[f"exporter {name}"] = [args.python, *(a.format(**values, out="{out}") for a in EXPORTER)]
    return made


def write_tokens(args: argparse.Namespace, tokens: Path) -> Row:
    """Write the token file; which text it is of, and the digests of the ids."""
    command = [args.python, PEERS / "inputs.py", args.checkpoint, "--tokens", tokens]
    facts: Row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return facts


def run_all(args: argparse.Namespace, work: Path, tokens: Path) -> dict[str, list[Row]]:
    """Run everything `--repeat` times; the outputs stay in `work`."""
    bf16 = work / "bf16"
    copy = [args.python, str(PEERS / "inputs.py"), str(args.checkpoint), "--bf16", "{out}"]
    runs = {BF16: [run(copy, args.checkpoint, bf16)]}
    for row, command in commands(args, tokens, bf16).items():
        runs[row] = [run(command, args.checkpoint, folder_of(work, row, i)) for i in range(args.repeat)]
    return runs


def folder_of(work: Path, row: str, i: int) -> Path:
    return work / row.lower().replace(",", "").replace(" ", "-") / str(i)


def run(command: list[str], source: Path, out: Path) -> Row:
    command = [a.replace("{out}", str(out)) for a in command]
    out.parent.mkdir(parents=True, exist_ok=True)
    found = measure(command, source, out, out.with_name(out.name + ".log"))
    print(f"{out.parent.name}/{out.name}: {found['cpu_s']} s CPU, {found['wall_s']} s wall", file=sys.stderr)
    return {key: found[key] for key in ("cpu_s", "wall_s", "peak_rss_bytes", "load_before")}


def read_back(args: argparse.Namespace, work: Path, runs: dict[str, list[Row]]) -> None:
    """Add what peers/compare.py finds to every run that left weights."""
    places = {(row, i): folder_of(work, row, i) for row in runs if row != BF16 for i in range(len(runs[row]))}
    for name, _, folder in (each.partition("=") for each in args.also):
        runs[name] = [{}]
        places[name, 0] = Path(folder)
    if not places:
        raise SystemExit("nothing to compare: name a tool's Python, a --recipe or --also NAME=FOLDER")
    command = [args.python, str(PEERS / "compare.py"), str(args.checkpoint), str(work / "tokens.npz")]
    command += [str(folder) for folder in places.values()]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    for (row, i), found in zip(places, json.loads(answer), strict=True):
        runs[row][i].update(found)


def best(runs: list[Row]) -> Row:
    """What a row shows: the lowest CPU seconds, and the figures of the run with the lowest KL."""
    quickest = min(runs, key=lambda run: run.get("cpu_s", 0))
    nearest = min(runs, key=lambda run: run.get("kl_mean", math.inf))
    return nearest | {key: quickest[key] for key in ("cpu_s", "wall_s", "peak_rss_bytes") if key in quickest}


def table(rows: dict[str, Row]) -> str:
    """The rows in Markdown; "stored as" counts quantized tensors by what they were found to be."""
    lines = ["| | KL mean | KL p99 | top-1 % | delta NLL | CPU s | peak GB | stored as |", "|" + "---|" * 8]
    for name, row in rows.items():
        cells = [name]
        if "kl_mean" in row:
            cells += [f"{row['kl_mean']:.6f}", f"{row['kl_p99']:.4f}"]
            cells += [f"{100 * row['top1']:.2f}", f"{row['delta_nll']:+.5f}"]
        else:
            cells += ["", "", "", ""]
        cells += [f"{row['cpu_s']:.1f}", f"{row['peak_rss_bytes'] / 1e9:.2f}"] if "cpu_s" in row else ["", ""]
        kinds = row.get("read_back", {}).get("matrices", {})
        cells.append(row.get("unreadable") or ", ".join(f"{n} {kind}" for kind, n in kinds.items()))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder; what is in it is kept")
    parser.add_argument("--python", default=sys.executable, help="has exporter, transformers and gguf")
    parser.add_argument("--gptqmodel", metavar="PYTHON")
    parser.add_argument("--llmcompressor", metavar="PYTHON")
    parser.add_argument("--autoround", metavar="PYTHON")
    parser.add_argument("--recipe", action="append", default=[], help="a row of exporter's. Repeatable")
    parser.add_argument("--profile", default="16gb")
    parser.add_argument("--format", default="gguf")
    parser.add_argument("--also", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "quantize_peers.json")
    args = parser.parse_args()
    args.checkpoint = args.checkpoint.resolve()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    os.environ.update(ONE_THREAD)
    tokens = work / "tokens.npz"
    facts = write_tokens(args, tokens)
    runs = run_all(args, work, tokens)
    read_back(args, work, runs)
    rows = {name: best(each) for name, each in runs.items()}
    report = {
        "what": f"INT4 group {args.group} of attention and experts",
        "checkpoint": args.checkpoint.name,
        "tokens": facts,
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.platform()},
        "threads": 1,
        "versions": versions_in({name: (getattr(args, name), DISTRIBUTIONS[name]) for name in DISTRIBUTIONS}),
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
        "runs": runs,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(rows))
    print(args.out, file=sys.stderr)


if __name__ == "__main__":
    main()
