"""Engines of TensorRT-RTX on a machine without a GPU: what building takes, and what the builder makes of each form.

    python benchmarks/tensorrt_engines.py --work bench

1. The demo checkpoint, recipe exact-f16 for SM75 and later: twelve engines, two graphs for six compute capabilities.
2. Layers of gpt-oss-20b's shape (made-up numbers, a vocabulary of 2,048, context 8,192), one, two and three of them,
   for each form of the experts: CPU seconds, peak memory, bytes of the engine, and memory that its plan lists for a
   GPU beside the weights (`buffer_bytes`), which `fit` predicts.
3. One matrix [2048, 320] in each form times activations: whether the plan decodes it inside the product, or writes
   it out in float16 first.

Writes results/tensorrt_engines.json. Needs `pip install 'exporter[tensorrt]'`, 5 GB of disk and 8 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from convert_peers import RESULTS, cpu_name

ROOT = Path(__file__).parents[1]
RESULT = RESULTS / "tensorrt_engines.json"
PROFILE = """
title = "TensorRT at real shapes"
model = "openai/gpt-oss-20b"

[hardware]
device = "gpu"
memory = "256GiB"
reserve = "1GiB"
context = 8192
ubatch = 512
runtime = "0.5GiB"

[validate]
windows = 1
length = 256

[gates]
digests_equal = true
"""
INT4 = """
title = "INT4 by rounding, for shapes only"

[[rule]]
match = "*.mlp.experts.*_proj.weight"
method = "rtn"
scheme = "int4-g32"

[[rule]]
match = "*"
method = "keep"
"""
# Name -> (recipe, target, compute capability that is built).
FORMS = {
    "INT4": ("int4.toml", "sm80", 89),
    "INT8, exact": ("exact-bf16", "sm80", 89),
    "MXFP4": ("mxfp4-bf16", "sm120", 120),
}
MATRICES = [("INT8", 32), ("INT8", 0), ("INT4", 32), ("INT4", 64), ("INT4", 0), ("FLOAT4E2M1", 32)]
K, N = 320, 2048  # of those matrices
Row = dict[str, Any]


def artifacts(work: Path, model: Path, forms: dict[str, tuple[str, str, int]]) -> dict[str, Path]:
    """The folder of each form."""
    (work / "int4.toml").write_text(INT4)
    wanted = "".join(
        f'\n[[artifact]]\nformat = "tensorrt"\nrecipe = "{work / recipe if recipe.endswith(".toml") else recipe}"\n'
        f'target = "{target}"\n'
        for recipe, target, _ in forms.values()
    )
    (work / "engines.toml").write_text(PROFILE + wanted)
    command = [sys.executable, "-m", "exporter", "quantize", str(model), "--profile", str(work / "engines.toml")]
    subprocess.run([*command, "--out", str(work / "out"), "--until", "export", "--quiet"], check=True)
    made = work / "out" / model.name / "engines"
    names = {form: f"tensorrt-{recipe.removesuffix('.toml')}-{target}" for form, (recipe, target, _) in forms.items()}
    return {form: made / name for form, name in names.items()}


def built(folder: Path, graph: str, sm: int, layers: int, scratch: Path) -> Row:
    """One engine of the first layers. Raises SystemExit where it is not built."""
    import onnx

    from exporter.validate import onnx_twin, tensorrt
    from exporter.validate.tensorrt_prove import read_profiles

    _, shapes = read_profiles(folder)
    model = onnx.load(str(folder / f"{graph}.onnx"), load_external_data=False)
    if layers:
        onnx_twin.cut(model, layers)
    inputs = {value.name for value in model.graph.input}
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    (scratch / "weights.data").symlink_to((folder / "weights.data").absolute())
    onnx.save(model, str(scratch / f"{graph}.onnx"))
    kept = {name: each for name, each in shapes[graph].items() if name in inputs}
    row = tensorrt.build(scratch / f"{graph}.onnx", kept, sm, time_limit=3600, memory_limit=1 << 40)
    if not row["built"]:
        raise SystemExit(f"{folder.name}, {graph} for SM{sm}: {row['error']}")
    names = ("cpu_seconds", "build_seconds", "peak_rss_bytes", "engine_bytes", "packed_bytes")
    names += ("buffer_bytes", "written_bytes", "expansion", "fused_attention")
    return {"graph": graph, "sm": sm, "layers": layers, **{name: row[name] for name in names}}


def demo(work: Path) -> Row:
    from exporter.formats.tensorrt.targets import GPUS

    model = ROOT / "tests" / "data" / "tiny-gpt-oss"
    folder = artifacts(work, model, {"demo": ("exact-f16", "sm75", 0)})["demo"]
    rows = [built(folder, graph, sm, 0, work / "cut") for graph in ("decode", "prefill") for sm in GPUS]
    return {"cpu_seconds": round(sum(row["cpu_seconds"] for row in rows), 2), "engines": rows}


def shapes_of_20b(work: Path) -> dict[str, list[Row]]:
    model = work / "20b-3-layers"
    if not model.exists():
        make = [sys.executable, str(ROOT / "scripts" / "make_synthetic.py")]
        subprocess.run([*make, "--layers", "3", "--vocab", "2048", "--out", str(model)], check=True)
    folders = artifacts(work, model, FORMS)
    return {
        form: [
            built(folders[form], graph, sm, layers, work / "cut")
            for graph in ("decode", "prefill")
            for layers in (1, 2, 3)
        ]
        for form, (_, _, sm) in FORMS.items()
    }


def matrices(work: Path) -> Iterator[Row]:
    from exporter.validate import tensorrt

    for kind, group in MATRICES:
        for tokens in (1, 256):
            path = work / "matrix.onnx"
            path.write_bytes(matrix(kind, group))
            row = tensorrt.build(
                path, {"x": ([1, K], [tokens, K], [tokens, K])}, 120, time_limit=600, memory_limit=1 << 40
            )
            inside = not row["written_out"]
            yield {"type": kind, "group": group or "row", "tokens": tokens, "decoded_inside": inside}


def matrix(kind: str, group: int) -> bytes:
    """x [M, K] times W [N, K] transposed, W decoded in groups (0: one scale a row)."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    raw = rng.integers(1, 7, N * K * (8 if kind == "INT8" else 4) // 8, dtype=np.uint8).tobytes()
    codes = helper.make_tensor("codes", getattr(TensorProto, kind), [N, K], raw, raw=True)
    shape = (N, K // group) if group else (N,)
    scales = np.full(shape, 120, np.uint8) if kind == "FLOAT4E2M1" else rng.random(shape).astype(np.float16)
    attributes: Row = {"axis": 1, "block_size": group} if group else {"axis": 0}
    operator = "DequantizeLinear"
    if kind == "FLOAT4E2M1":
        operator = "TRT_MXFP8DequantizeLinear"
        attributes = {"domain": "trt", "axis": -1, "block_size": group, "output_dtype": TensorProto.FLOAT16}
    nodes = [
        helper.make_node(operator, ["codes", "scales"], ["w"], **attributes),
        helper.make_node("Transpose", ["w"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "turned"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, ["M", size]) for n, size in (("x", K), ("y", N))]
    graph = helper.make_graph(nodes, "matrix", ends[:1], ends[1:], [codes, numpy_helper.from_array(scales, "scales")])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("trt", 1)]
    made: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and artifacts")
    work: Path = parser.parse_args().work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    started = time.time()
    result = {
        "machine": {"cpu": cpu_name(), "cpus": os.cpu_count(), "load_before": round(os.getloadavg()[0], 2)},
        "versions": {name: version(name) for name in ("exporter", "tensorrt_rtx_cu13", "onnx", "numpy")},
        "demo": demo(work),
        "layers_of_20b": shapes_of_20b(work),
        "matrices_sm120": list(matrices(work)),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{RESULT}: {time.time() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
