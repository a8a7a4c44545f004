"""Figures of ONNX folders, all in the same loop (onnx_graph.py): one JSON object on stdout.

    python benchmarks/peers/onnx_figures.py compare CHECKPOINT tokens.npz NAME=FOLDER ...
    python benchmarks/peers/onnx_figures.py speed CONFIG tokens.npz NAME=FOLDER[@OPERATOR:LEVEL] ...
    python benchmarks/peers/onnx_figures.py load - tokens.npz NAME=FOLDER

compare: KL(release || artifact) of every held-out window whole, as shipped and with float32 activations; the
release is transformers' in float32. speed: sessions of all, taken in turns; see `speed`. load: one session of the
file as it is and nothing else, for a process whose peak memory is wanted. @QMoE:none takes accuracy_level off.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx_graph import Decoder, find_graph

PROMPT, GENERATE = 32, 32
THREADS = 2
Row = dict[str, Any]


def compare(checkpoint: Path, windows: npt.NDArray[np.int64], folders: dict[str, str]) -> dict[str, Row]:
    import torch
    from compare import load_release, log_probabilities

    config = json.loads((checkpoint / "config.json").read_text())
    heads, width = config["num_key_value_heads"], config["head_dim"]
    model = load_release(checkpoint)
    reference = [log_probabilities(model, torch.from_numpy(w)) for w in windows]
    del model
    found: dict[str, Row] = {}
    for name, folder in folders.items():
        rows: Row = {}
        for mode in ("shipped", "float32"):
            decoder = Decoder(find_graph(Path(folder)), THREADS, float32=mode == "float32")
            if mode == "float32" and not decoder.has_integers:
                rows[mode] = rows["shipped"]  # no kernel of it rounds activations
                continue
            kl, same = [], []
            for window, p in zip(windows, reference, strict=True):
                logits = torch.from_numpy(decoder.step(window, decoder.start(heads, width), 0))
                q = torch.log_softmax(logits.double(), -1)
                kl.append((p.exp() * (p - q)).sum(-1))
                same.append((p.argmax(-1) == q.argmax(-1)).double())
            every = torch.cat(kl)
            rows[mode] = {
                "kl_mean": float(every.mean()),
                "kl_p99": float(every.quantile(0.99)),
                "top1": float(torch.cat(same).mean()),
            }
        found[name] = rows
    return found


def speed(config_file: Path, windows: npt.NDArray[np.int64], folders: dict[str, str], repeats: int) -> dict[str, Row]:
    """Prefill of one window and greedy decoding after 32 tokens, tokens/s of every turn; every artifact once a turn.

    The order goes back and forth, so that what else the machine does falls on all alike.
    """
    config = json.loads(config_file.read_text())
    heads, width = config["num_key_value_heads"], config["head_dim"]
    sessions = {}
    for name, asked in folders.items():
        folder, _, rest = asked.partition("@")
        levels = {o: None if v == "none" else int(v) for o, _, v in (r.partition(":") for r in rest.split("@") if r)}
        sessions[name] = Decoder(find_graph(Path(folder)), THREADS, levels=levels)
    runs: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in sessions}
    for turn in range(-1, repeats):  # turn -1 reads the weights in and does not count
        for name in list(sessions)[:: 1 if turn % 2 else -1]:
            decoder, window = sessions[name], windows[turn % len(windows)]
            started = time.perf_counter()
            decoder.step(window, decoder.start(heads, width), 0)
            prefill = len(window) / (time.perf_counter() - started)
            cache = decoder.start(heads, width)
            token = decoder.step(window[:PROMPT], cache, 0)[-1].argmax()
            started = time.perf_counter()
            for i in range(GENERATE):
                token = decoder.step(np.array([token]), cache, PROMPT + i)[-1].argmax()
            decode = GENERATE / (time.perf_counter() - started)
            if turn >= 0:
                runs[name]["prefill"].append(prefill)
                runs[name]["decode"].append(decode)
    found: dict[str, Row] = {}
    for name, each in runs.items():
        found[name] = {kind: {"median": statistics.median(rates), "runs": rates} for kind, rates in each.items()}
    return found


def load(folders: dict[str, str]) -> dict[str, Row]:
    """Seconds until the session is there, of the file as it is."""
    import onnxruntime

    found = {}
    for name, folder in folders.items():
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = THREADS, 3
        started = time.perf_counter()
        onnxruntime.InferenceSession(str(find_graph(Path(folder))), options, providers=["CPUExecutionProvider"])
        found[name] = {"load_s": round(time.perf_counter() - started, 3)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("compare", "speed", "load"))
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("folders", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--repeat", type=int, default=9)
    args = parser.parse_args()
    folders = dict(f.split("=", 1) for f in args.folders)
    windows = np.load(args.tokens)["held_out"]
    if args.what == "compare":
        found = compare(args.checkpoint, windows, folders)
    elif args.what == "speed":
        found = speed(args.checkpoint, windows, folders, args.repeat)
    else:
        found = load(folders)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
