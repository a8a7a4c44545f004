"""Engines built by the real TensorRT-RTX on this CPU: what comes back when it builds, refuses, crashes or hangs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import tomllib
import types
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest

from exporter.errors import MissingExtra, Refused
from exporter.validate import tensorrt, tensorrt_worker

onnx = pytest.importorskip("onnx")
pytest.importorskip("tensorrt_rtx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from tests.tensorrt_small import GROUP, HALF, E, K, N, Small, attention, build, experts, shapes  # noqa: E402

# It builds


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    before = psutil.Process().children(recursive=True)
    yield
    assert psutil.Process().children(recursive=True) == before


STAGES: list[str] = []


@pytest.fixture(scope="module")
def engine_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines") / "sm89.engine"


@pytest.fixture(scope="module")
def built(engine_file: Path) -> dict[str, Any]:
    graph = experts(engine_file.with_name("decode.onnx"))
    return build(graph, keep=engine_file, on_progress=lambda *done: STAGES.append(done[0]))


def test_int4_experts_build(built: dict[str, Any]) -> None:
    assert built["built"] is True, built
    assert (built["sm"], built["version"], "error" in built) == (89, tensorrt.version(), False)
    codes, scales = E * K * N // 2, E * K // GROUP * N * 2
    assert built["packed_bytes"] == codes + scales < built["engine_bytes"]
    assert (built["expansion"], built["expanded"], built["written_out"]) == (0, [], [])
    assert built["growth"] < 1e-4
    assert (built["constants"]["int4"], built["constants"]["half"]) == (codes, scales)
    assert min(built["layers"], built["parse_seconds"], built["build_seconds"], built["cpu_seconds"]) > 0
    assert 100e6 < built["peak_rss_bytes"] < 1e9
    assert STAGES == ["parse", "build", "look into it"]


def test_the_engine_is_kept_whole(built: dict[str, Any], engine_file: Path) -> None:
    assert engine_file.stat().st_size == built["engine_bytes"]
    assert sorted(p.name for p in engine_file.parent.iterdir()) == ["decode.onnx", "sm89.engine"]


def test_the_same_graph_is_refused_for_turing(tmp_path: Path) -> None:
    answer = build(experts(tmp_path / "decode.onnx"), 75, keep=tmp_path / "engine")
    wanted = "Cannot compile for target(s) sm75, because the model contains HW-specific datatypes: int4"
    assert (answer["built"], answer["sm"], answer["error"]) == (False, 75, wanted)
    assert [p.name for p in tmp_path.iterdir()] == ["decode.onnx"]


# It does not build


def shifts(path: Path) -> Path:
    small = Small()
    small.node("BitShift", ["ids", "ids"], "y", direction="LEFT")
    return small.save(path, ("n",), TensorProto.INT64)


def negative(path: Path) -> Path:
    model = onnx.load(experts(path, 8))
    scale = -numpy_helper.to_array(model.graph.initializer[1])
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(scale, "w.scale"))
    onnx.save(model, path)
    return path


def gathered_codes(path: Path) -> Path:
    small = Small()
    small.quantized("w", 4, (E, K, N), axis=1)
    small.nodes.clear()
    parts = [small.node("Gather", [n, "ids"], f"{n}.chosen", axis=0) for n in ("w", "w.scale")]
    small.node("MatMul", ["x", small.node("DequantizeLinear", parts, "v", axis=1, block_size=GROUP)], "y")
    return small.save(path, ("n", 1, N))


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (shifts, "node the_y (BitShift): unsupported node"),
        (negative, "node the_w.values (DequantizeLinear): Scale coefficients must all be positive"),
        (lambda p: attention(p, 2, 1), "Attention operation was not supported by a dedicated kernel."),
        (gathered_codes, "Tensor w_output has datatype Int4 but is not consumed by "),
    ],
)
def test_what_tensorrt_says_is_one_line(make: Any, error: str, tmp_path: Path) -> None:
    answer = build(make(tmp_path / "x.onnx"))
    assert answer["built"] is False
    assert answer["error"].startswith(error)
    assert "\n" not in answer["error"]
    assert "_src" not in answer["error"]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"not a graph" * 100, "Failed to parse the ONNX model."),
        (b"", "Network must have at least one output"),
        (None, "x.onnx is missing"),
    ],
    ids=["garbage", "empty", "missing"],
)
def test_no_graph_at_all(content: bytes | None, error: str, tmp_path: Path) -> None:
    graph = tmp_path / "x.onnx"
    if content is not None:
        graph.write_bytes(content)
    answer = build(graph, shapes={})
    assert answer["built"] is False
    assert error in answer["error"]
    assert "\n" not in answer["error"]


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"x": ([4, 1, K], [4, 1, K], [1, 1, K])}, "Invalid optimization profiles for input tensors x"),
        ({"x": ([1], [1], ["a"])}, "shapes of x: [[1], [1], ['a']] is not three lists of numbers"),
        ({"x": ([1], [1])}, "shapes of x: [[1], [1]] is not three lists of numbers"),
        ({"y": ([1], [1], [1])}, "shapes of y, which is no input of the graph"),
    ],
)
def test_wrong_shapes(changed: dict[str, Any], error: str, tmp_path: Path) -> None:
    graph = experts(tmp_path / "x.onnx")
    answer = build(graph, shapes={**shapes(graph), **changed})
    assert answer["built"] is False
    assert answer["error"].startswith(error)


def test_no_shapes_and_no_such_target(tmp_path: Path) -> None:
    graph = experts(tmp_path / "x.onnx")
    assert "no optimization profile has been defined" in build(graph, shapes={})["error"]
    wanted = "TensorRT-RTX builds for SM75, SM80, SM86, SM89, SM120, SM121, not for SM90"
    assert build(graph, 90)["error"] == wanted


def deadly(path: Path) -> Path:
    """One INT4 weight, gathered from and multiplied whole: TensorRT-RTX 1.7.1 dies of it."""
    small = Small()
    values = small.quantized("w", 4, (E, K, N), axis=1)
    small.node("MatMul", ["x", small.node("Gather", [values, "ids"], "chosen", axis=0)], "y")
    small.node("MatMul", ["all", values], "z")
    return small.save(path, ("n", 1, N), more=[helper.make_tensor_value_info("z", HALF, (E, "n", N))])


def test_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of TensorRT itself, where this release has the fault; and of any child."""
    graph = deadly(tmp_path / "x.onnx")
    killed = f"TensorRT-RTX {tensorrt.version()} was killed by SIGSEGV while running x.onnx for SM89"
    answer = build(graph)
    if tensorrt.version() == "1.7.1.116":
        assert answer == {"sm": 89, "version": "1.7.1.116", "built": False, "error": killed}
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho 'half' > \"$0.partial\"\nkill -SEGV $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    assert build(graph, keep=program)["error"] == killed
    assert not program.with_name("python.partial").exists()


@pytest.mark.parametrize(
    ("limits", "error"),
    [
        ({"time_limit": 0.05}, r"x.onnx for SM89 did not finish in TensorRT-RTX 1.7.* within 0.05 s"),
        ({"memory_limit": 10_000_000}, r"x.onnx for SM89 used more than 0.01 GB of memory in TensorRT-RTX 1.7.*"),
    ],
    ids=["time", "memory"],
)
def test_a_build_beyond_its_limits(limits: dict[str, Any], error: str, tmp_path: Path) -> None:
    answer = build(experts(tmp_path / "x.onnx"), **limits)
    assert answer["built"] is False
    assert re.fullmatch(error, answer["error"])


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    graph = experts(tmp_path / "x.onnx")
    threading.Timer(0.15, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        build(graph, keep=tmp_path / "engine")
    assert [p.name for p in tmp_path.iterdir()] == ["x.onnx"]


# The library


def test_a_missing_library_is_one_clear_line(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['tensorrt_rtx'] = None\n"
        "from pathlib import Path\nfrom exporter.validate import tensorrt\nfrom exporter.errors import MissingExtra\n"
        "try: tensorrt.build(Path('x'), {}, 89, time_limit=1, memory_limit=0)\n"
        "except MissingExtra as e: print(e.message, '|', e.hint)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    line = "building engines needs tensorrt_rtx_cu13, which is not installed | pip install 'exporter[tensorrt]'\n"
    assert (done.stdout, done.stderr) == (line, "")


def test_a_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingExtra):
        tensorrt_worker.run(tensorrt_worker.Request("x", {}, 89), lambda *done: None)


@pytest.mark.parametrize("other", ["1.6.9", "1.8.0.1", "2.0"])
def test_another_release_is_refused(other: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted = f"TensorRT-RTX {other} is installed; exporter reads the engines of 1.7"
    with monkeypatch.context() as patched:
        patched.setattr(metadata, "version", lambda name: other)
        with pytest.raises(Refused) as error:
            tensorrt.build(tmp_path / "x.onnx", {}, 89, time_limit=1, memory_limit=0)
        assert (error.value.message, error.value.hint) == (wanted, "pip install 'tensorrt_rtx_cu13>=1.7,<1.8'")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", types.SimpleNamespace(__version__=other))
    with pytest.raises(Refused, match=r"reads the engines of 1\.7"):
        tensorrt_worker.run(tensorrt_worker.Request("x", {}, 89), lambda *done: None)


def test_the_extra_asks_for_the_release_that_is_known() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (asked,) = (r for r in project["optional-dependencies"]["tensorrt"] if r.startswith(tensorrt_worker.PACKAGE))
    oldest, beyond = (".".join(map(str, v)) for v in (tensorrt_worker.OLDEST, tensorrt_worker.BEYOND))
    assert asked.partition(";")[0] == f"{tensorrt_worker.PACKAGE}>={oldest},<{beyond}"


def test_a_gpu_is_named_with_its_capability(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tensorrt.gpu() is None
    tool = tmp_path / "nvidia-smi"
    for body, found in (("echo 'NVIDIA L4, 8.9'", ("NVIDIA L4", 89)), ("exit 9", None), ("true", None)):
        tool.write_text(f"#!/bin/sh\n{body}\n")
        tool.chmod(0o755)
        assert tensorrt.gpu() == found
