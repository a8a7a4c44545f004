"""Converting a checkpoint to GGUF, side by side: cp of the same bytes, exporter, llama.cpp's converter.

    python scripts/make_synthetic.py --model 20b --layers 2 --out syn
    python benchmarks/convert_peers.py syn --work bench --peer ../llama.cpp

Each run is a process of its own; wall seconds, CPU seconds and peak memory come from the kernel
(wait4). The source is put out of the page cache before every run, the disk is quiet when it starts,
and the order of cp and exporter alternates. llama.cpp's converter runs once: it is the slow one.

`--peer` is a folder with convert_hf_to_gguf.py, conversion/ and gguf-py/ of llama.cpp, `--peer-python`
a Python that has torch, transformers and sentencepiece. The converter knows tokenizers by a hash of
token ids and refuses made-up ones, so the name it would give ("gpt-4o") is set at run time; nothing
else of it is touched.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

# The child of a large process starts with its parent's peak memory on the books (Linux keeps the
# high-water mark over exec), so nothing heavy is imported here.

RESULTS = Path(__file__).parent / "results"
EXPORTER = ["-m", "exporter", "quantize", "{source}", "--profile", "16gb", "--until", "export", "--out", "{out}"]
# What the profile makes (embeddings, head and attention to Q8_0), and what llama.cpp's converter makes
# by default (those as bf16): only the second does the same work as the peer.
RECIPES = {"exporter": "mxfp4-q8", "exporter_bf16": "mxfp4-bf16"}
PEER = """
import runpy, sys
root = sys.argv[1]
sys.argv = [root + "/convert_hf_to_gguf.py", *sys.argv[2:]]
sys.path[:0] = [root, root + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-4o"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def checkpoint_files(source: Path) -> list[Path]:
    return sorted(p for p in source.iterdir() if p.is_file())


def forget(files: list[Path]) -> None:
    """Write back everything and drop these files from the page cache (no root needed)."""
    os.sync()
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def measure(command: list[str], source: Path, out: Path, log: Path) -> dict[str, object]:
    """Run one command on a fresh `out`; wall and CPU seconds, peak RSS in bytes, bytes written."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    forget(checkpoint_files(source))
    time.sleep(1)
    load, started = os.getloadavg()[0], time.perf_counter()
    with log.open("wb") as sink:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        tail = log.read_text(errors="replace")[-2000:]
        raise SystemExit(f"{' '.join(command)}\nended with {child.returncode}:\n{tail}")
    written = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    return {
        "wall_s": round(wall, 3),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 3),
        "user_s": round(usage.ru_utime, 3),
        "peak_rss_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "bytes_written": written,
        "load_before": round(load, 2),
    }


def commands(args: argparse.Namespace, source: Path, out: Path) -> dict[str, list[str]]:
    files = [str(p) for p in checkpoint_files(source)]
    exporter = [args.python, *(a.format(source=source, out=out) for a in EXPORTER)]
    made = {
        "cp": ["cp", *files, str(out)],
        # sync of one file system only: `sync` alone would also wait for the rest of the machine.
        "cp_sync": ["sh", "-c", 'd=$1; shift; cp "$@" "$d" && sync -f "$d"', "sh", str(out), *files],
        **{name: [*exporter, "--recipe", recipe] for name, recipe in RECIPES.items()},
    }
    if args.peer:
        gguf = str(out / "model.gguf")
        made["llama_cpp"] = [args.peer_python, "-c", PEER, str(args.peer.resolve()), str(source), "--outfile", gguf]
    return made


def run_all(args: argparse.Namespace) -> dict[str, list[dict[str, object]]]:
    source, work = args.checkpoint.resolve(), args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    out = work / "out"
    todo = commands(args, source, out)
    turns = ["cp", "cp_sync", *RECIPES]
    order = [name for turn in range(args.repeat) for name in (turns if turn % 2 == 0 else turns[::-1])]
    runs: dict[str, list[dict[str, object]]] = {name: [] for name in todo}
    measure(todo["cp"], source, out, work / "first.log")  # the first run meets a cold disk; not counted
    for name in [*order, *(["llama_cpp"] * args.peer_repeat if args.peer else [])]:
        result = measure(todo[name], source, out, work / f"{name}.log")
        runs[name].append(result)
        print(
            f"{name:14} {result['wall_s']:>8} s wall {result['cpu_s']:>8} s CPU "
            f"{int(str(result['peak_rss_bytes'])) / 1e6:>8.0f} MB peak   load {result['load_before']}",
            file=sys.stderr,
        )
    shutil.rmtree(out, ignore_errors=True)
    return runs


def medians(runs: dict[str, list[dict[str, object]]]) -> dict[str, dict[str, float]]:
    keys = ("wall_s", "cpu_s", "peak_rss_bytes")
    return {
        name: {k: statistics.median(float(str(r[k])) for r in found) for k in keys}
        for name, found in runs.items()
        if found
    }


def ratios(m: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """For each recipe: our wall time over that of cp, and how many times more the peer takes."""
    found: dict[str, dict[str, float]] = {}
    for name in RECIPES:
        ours = m[name]
        found[name] = {
            "wall_over_cp": ours["wall_s"] / m["cp"]["wall_s"],
            "wall_over_cp_sync": ours["wall_s"] / m["cp_sync"]["wall_s"],
        }
        if peer := m.get("llama_cpp"):
            found[name] |= {f"peer_{key}": peer[key] / ours[key] for key in ours}
    return {name: {k: round(v, 3) for k, v in r.items()} for name, r in found.items()}


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions_in(pythons: Mapping[str, tuple[str | None, Sequence[str]]]) -> dict[str, dict[str, str]]:
    """Versions of distributions in other environments, by name: (its Python or None where it is not there, names)."""
    script = "import json, sys; from importlib.metadata import version; "
    script += "print(json.dumps({n: version(n) for n in sys.argv[1:]}))"
    found = {}
    for name, (python, names) in pythons.items():
        if python:
            answer = subprocess.run([python, "-c", script, *names], check=True, stdout=subprocess.PIPE).stdout
            found[name] = json.loads(answer)
    return found


def versions(args: argparse.Namespace) -> dict[str, str]:
    names = ("exporter", "numpy")
    found = {n: importlib.metadata.version(n) for n in names if _installed(n)}
    found["python"] = platform.python_version()
    if args.peer:
        cmake = args.peer / "CMakeLists.txt"
        text = cmake.read_text() if cmake.exists() else ""
        parts = re.findall(r"set\(LLAMA_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)\)", text)
        found["llama.cpp"] = ".".join(parts) or "unknown"
    return found


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder on the disk to measure")
    parser.add_argument("--peer", type=Path, help="folder of llama.cpp with its converter")
    parser.add_argument("--python", default=sys.executable, help="Python that runs exporter")
    parser.add_argument("--peer-python", default=sys.executable, help="Python that runs the converter")
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--peer-repeat", type=int, default=1)
    args = parser.parse_args()
    config = json.loads((args.checkpoint / "config.json").read_text())
    runs = run_all(args)
    middle = medians(runs)
    report = {
        "what": "checkpoint to GGUF",
        "checkpoint": {
            "layers": config["num_hidden_layers"],
            "experts": config["num_local_experts"],
            "bytes": sum(p.stat().st_size for p in checkpoint_files(args.checkpoint)),
        },
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": platform.platform(),
        },
        "versions": versions(args),
        "date": time.strftime("%Y-%m-%d"),
        "exporter_arguments": EXPORTER,
        "recipes": RECIPES,
        "median": middle,
        "ratios": ratios(middle),
        "runs": runs,
    }
    cpu = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"convert-{cpu}-{config['num_hidden_layers']}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["ratios"], indent=1))
    print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
