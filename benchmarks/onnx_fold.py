"""Lossless experts on a CPU: 4.25 bits on disk and expanded while loading, against 8 bits on disk.

    python benchmarks/onnx_fold.py --work bench

ONNX Runtime's CPU kernels compute with the released numbers as 8-bit codes (2 * fp4 + 128). A graph could hold
the release's blocks instead and make the codes of them by a table (Cast, Gather, Reshape), which constant folding
runs when the session is made. Layers of gpt-oss-20b's shape (32 experts of 2880 by 2880), of made-up numbers that
differ from layer to layer (ONNX Runtime keeps equal weights once), are loaded in each form in a process of its
own: time, memory that is not the file's, and one token. The forms hold the same numbers, so their outputs must
be equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from convert_peers import RESULTS, cpu_name, forget

from exporter.numerics.e2m1 import LEVELS

HIDDEN, EXPERTS, TOP_K, BLOCK = 2880, 32, 4, 32
PROJECTIONS = {"gate_up": (2 * HIDDEN, HIDDEN), "down": (HIDDEN, HIDDEN)}  # rows, columns
# Codes that one entry of the expanding table holds; None: the codes are in the file as they are.
FORMS = {"8-bit codes": None, "fp4, table of 256": 2, "fp4, table of 65536": 4}
PAGE = 4096  # ONNX Runtime maps a tensor only where it starts on a page
U8 = npt.NDArray[np.uint8]
Row = dict[str, Any]


# --- graphs ----------------------------------------------------------------------------------------


def codes_of(entries: int) -> U8:
    """Table uint8 [16^entries, entries]: the 8-bit codes of packed FP4, low nibble first."""
    packed = np.arange(16**entries)
    code = (2 * LEVELS + 128).astype(np.uint8)
    return np.stack([code[packed >> 4 * i & 15] for i in range(entries)], -1)


def block_scales() -> npt.NDArray[np.float32]:
    """Table [256] of the scales that go with those codes: half of what e8m0 says."""
    return np.exp2(np.arange(256, dtype=np.float32) - 128)


class Data:
    """The file of weights; each tensor is written once, expert by expert."""

    def __init__(self, path: Path) -> None:
        self.file, self.initializers = path.open("wb"), list[Any]()

    def add(self, name: str, kind: int, shape: tuple[int, ...], parts: Callable[[int], npt.NDArray[Any]]) -> None:
        import onnx

        start = self.file.tell()
        for expert in range(EXPERTS):
            self.file.write(parts(expert).tobytes())
        tensor = onnx.TensorProto(name=name, data_type=kind, dims=shape, data_location=onnx.TensorProto.EXTERNAL)
        for key, value in (("location", "data"), ("offset", start), ("length", self.file.tell() - start)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        self.file.write(bytes(-self.file.tell() % PAGE))


def released(layer: int, projection: str, expert: int) -> tuple[U8, U8]:
    """Made-up blocks [rows, columns/2] and scales [rows, columns/32] of one expert."""
    rows, columns = PROJECTIONS[projection]
    rng = np.random.default_rng([layer, rows, expert])
    blocks = rng.integers(0, 256, (rows, columns // 2), np.uint8)
    return blocks, rng.integers(115, 123, (rows, columns // BLOCK), np.uint8)


def projection_nodes(data: Data, entries: int | None, layer: int, projection: str) -> list[Any]:
    """Adds one projection of a layer's experts; the nodes that make its codes and scales, if any."""
    from onnx import TensorProto, helper, numpy_helper

    rows, columns = PROJECTIONS[projection]
    name = f"{layer}.{projection}"
    bias = np.zeros((EXPERTS, rows), np.float32)
    data.initializers.append(numpy_helper.from_array(bias, f"{name}.bias"))
    shape, scales = (EXPERTS, rows, columns), (EXPERTS, rows, columns // BLOCK)
    if entries is None:
        table, halves = codes_of(2), block_scales()
        weight, scale = f"{name}.weight", f"{name}.scale"
        data.add(weight, TensorProto.UINT8, shape, lambda e: table[released(layer, projection, e)[0]])
        data.add(scale, TensorProto.FLOAT, scales, lambda e: halves[released(layer, projection, e)[1]])
        return []
    kind = TensorProto.UINT8 if entries == 2 else TensorProto.UINT16
    packed = (EXPERTS, rows, columns // entries)
    data.add(f"{name}.blocks", kind, packed, lambda e: released(layer, projection, e)[0])
    data.add(f"{name}.e8m0", TensorProto.UINT8, scales, lambda e: released(layer, projection, e)[1])
    data.initializers.append(numpy_helper.from_array(np.array(shape), f"{name}.shape"))
    return [
        helper.make_node("Cast", [f"{name}.blocks"], [f"{name}.index"], to=TensorProto.INT32),
        helper.make_node("Gather", ["codes", f"{name}.index"], [f"{name}.codes"], axis=0),
        helper.make_node("Reshape", [f"{name}.codes", f"{name}.shape"], [f"{name}.weight"]),
        helper.make_node("Cast", [f"{name}.e8m0"], [f"{name}.power"], to=TensorProto.INT32),
        helper.make_node("Gather", ["scales", f"{name}.power"], [f"{name}.scale"], axis=0),
    ]


def make(folder: Path, entries: int | None, layers: int) -> int:
    """Write a graph of so many experts' layers, one after another; bytes of its weights."""
    from onnx import TensorProto, helper, numpy_helper

    folder.mkdir(parents=True)
    data, nodes, x = Data(folder / "data"), list[Any](), "x"
    if entries is not None:
        tables: dict[str, npt.NDArray[Any]] = {"codes": codes_of(entries), "scales": block_scales()}
        data.initializers += [numpy_helper.from_array(table, name) for name, table in tables.items()]
    attributes: dict[str, Any] = {
        "k": TOP_K, "activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.702, "activation_beta": 1.0,
        "swiglu_limit": 7.0, "normalize_routing_weights": 1, "expert_weight_bits": 8, "block_size": BLOCK,
    }  # fmt: skip
    for layer in range(layers):
        inputs = [x, "router"]
        for projection in PROJECTIONS:
            nodes += projection_nodes(data, entries, layer, projection)
            inputs += [f"{layer}.{projection}.{part}" for part in ("weight", "scale", "bias")]
        x = f"{layer}.out"
        nodes.append(helper.make_node("QMoE", inputs, [x], domain="com.microsoft", **attributes))
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", HIDDEN]) for name in ("x", x)}
    router = helper.make_tensor_value_info("router", TensorProto.FLOAT, ["n", EXPERTS])
    graph = helper.make_graph(nodes, "experts", [values["x"], router], [values[x]], data.initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    data.file.close()
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return (folder / "data").stat().st_size


# --- loading, in a process of its own ---------------------------------------------------------------


def resident(kind: str) -> int:
    """Bytes of this process in memory: "RssAnon", backed by no file, or "RssFile"."""
    line = next(li for li in Path("/proc/self/status").read_text().splitlines() if li.startswith(kind))
    return int(line.split()[1]) * 1024


class Peak:
    """The most anonymous memory while inside, looked at every 20 ms."""

    def __enter__(self) -> Peak:
        self.bytes, self._done = resident("RssAnon"), threading.Event()
        self._watch = threading.Thread(target=self._look)
        self._watch.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.02):
            self.bytes = max(self.bytes, resident("RssAnon"))

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watch.join()


def load(folder: Path, repeat: int) -> Row:
    """Make a session and decode tokens: seconds, bytes, and a digest of what came out."""
    import onnxruntime as ort

    ort.set_default_logger_severity(3)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    before = resident("RssAnon")
    wall, cpu = time.perf_counter(), time.process_time()
    with Peak() as peak:
        session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    taken = {"load_s": round(time.perf_counter() - wall, 2), "load_cpu_s": round(time.process_time() - cpu, 2)}
    rng = np.random.default_rng(0)
    router = rng.standard_normal((1, EXPERTS), np.float32)
    feed = {"x": rng.standard_normal((1, HIDDEN), np.float32), "router": router}
    milliseconds = []
    for _ in range(2 + repeat):
        started = time.perf_counter()
        (out,) = session.run(None, feed)
        milliseconds.append(1000 * (time.perf_counter() - started))
    return {
        **taken,
        "peak_anonymous_bytes": peak.bytes - before,
        "final_anonymous_bytes": resident("RssAnon") - before,
        "decode_ms_median": round(statistics.median(milliseconds[2:]), 2),
        "decode_ms_least": round(min(milliseconds[2:]), 2),
        "output": hashlib.sha256(np.ascontiguousarray(out).tobytes()).hexdigest()[:16],
        "finite": bool(np.isfinite(out).all()),
    }


# --- the whole --------------------------------------------------------------------------------------


def measure(work: Path, form: str, layers: int, repeat: int) -> Row:
    folder = work / "graph"
    shutil.rmtree(folder, ignore_errors=True)
    size = make(folder, FORMS[form], layers)
    forget([folder / "data"])
    command = [sys.executable, __file__, "--load", str(folder), "--repeat", str(repeat)]
    load_before = round(os.getloadavg()[0], 2)
    found: Row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    shutil.rmtree(folder)
    row = {"form": form, "layers": layers, "file_bytes": size, **found, "load_before": load_before}
    print(
        f"{form:20} {layers} layers  {row['load_s']:6.1f} s ({row['load_cpu_s']:.1f} s CPU)  "
        f"peak {row['peak_anonymous_bytes'] / 1e9:.2f} GB, then {row['final_anonymous_bytes'] / 1e9:.2f} GB  "
        f"token {row['decode_ms_median']} ms   load {load_before}",
        file=sys.stderr,
    )
    return row


def per_layer(rows: list[Row]) -> dict[str, dict[str, float]]:
    """What one more layer takes: the slope from the least to the most layers."""
    found = {}
    for form in FORMS:
        mine = sorted((r for r in rows if r["form"] == form), key=lambda r: int(r["layers"]))
        first, last = mine[0], mine[-1]
        keys = ("load_cpu_s", "peak_anonymous_bytes", "final_anonymous_bytes", "file_bytes", "decode_ms_median")
        more = last["layers"] - first["layers"]
        found[form] = {key: round((last[key] - first[key]) / more, 2) for key in keys} if more else {}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, help="scratch folder: 3 GB for three layers")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--repeat", type=int, default=20, help="tokens that are timed")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        print(json.dumps(load(args.load, args.repeat)))
        return
    if args.work is None:
        parser.error("--work is missing")
    args.work.mkdir(parents=True, exist_ok=True)
    from importlib.metadata import version

    rows = [measure(args.work, form, layers, args.repeat) for layers in args.layers for form in FORMS]
    outputs = {layers: {r["output"] for r in rows if r["layers"] == layers} for layers in args.layers}
    report = {
        "what": "lossless experts of 20b's shape on a CPU: expanded while loading, or 8 bits on disk",
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": platform.platform(),
        },
        "threads": 2,
        "versions": {name: version(name) for name in ("onnxruntime", "onnx", "numpy")},
        "date": time.strftime("%Y-%m-%d"),
        "outputs_equal": all(len(found) == 1 for found in outputs.values()) and all(r["finite"] for r in rows),
        "one_more_layer": per_layer(rows),
        "rows": rows,
    }
    path = RESULTS / "onnx_fold.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["one_more_layer"], indent=1))
    print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
