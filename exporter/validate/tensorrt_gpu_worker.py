"""Runs engines on the GPU, in a process of its own: `python -m exporter.validate.tensorrt_gpu_worker`.

`child.py` says how it is asked and how it answers; the request is a `Request`. Results are an .npz as onnx_worker.py
writes them: "windows", the windows of the text in chunks; "cached", the first of them up to shortly before the
attention window is full, then one token at a time by the other engine.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from exporter.errors import ExporterError
from exporter.model.reference import ReferenceLogits
from exporter.model.torch import import_torch
from exporter.numerics.floats import F32
from exporter.validate import child
from exporter.validate.child import OnProgress
from exporter.validate.metrics import Positions, compare
from exporter.validate.tensorrt_worker import missing

_HINT = "exporter validate, on a machine with another driver or a GPU with more memory"


@dataclass(frozen=True)
class Request:
    """`prefill`, `decode`: files of engines; `expected`, `results`: .npz files, absolute.

    sm: what they were built for, 89 for SM89. chunk: tokens at once. length: tokens of each window that are computed.
    first, steps: tokens of the first window by `prefill`, then one by one by `decode`.
    """

    prefill: str
    decode: str
    expected: str
    results: str
    sm: int
    chunk: int
    length: int
    first: int
    steps: int


class Engine(Protocol):
    """What runs a graph: `device` is torch's name of where tensors lie."""

    device: str

    def cache(self) -> dict[str, Any]:
        """Keys and values of no tokens, by input."""

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name, when they are there."""


class GpuEngine:
    """An engine of TensorRT-RTX on the first GPU; torch holds what goes in and comes out."""

    device = "cuda"

    def __init__(self, trt: Any, runtime: Any, path: Path) -> None:
        self.torch, self.trt = import_torch(), trt
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            self.engine = runtime.deserialize_cuda_engine(whole)
        if self.engine is None:
            raise ExporterError(f"{path.name} cannot be loaded on this GPU", hint=_HINT)
        # By default a new shape runs in a fallback kernel while its own is compiled in the background.
        config = self.engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.NONE
        self.context = self.engine.create_execution_context(config)
        if self.context is None:
            raise ExporterError(f"{path.name} does not fit on this GPU", hint=_HINT)
        self.names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        self.inputs = [n for n in self.names if self.engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self._stream = self.torch.cuda.Stream()
        self._nothing = self.torch.empty(1, device="cuda")  # an empty tensor has no address, and an input must have one

    def cache(self) -> dict[str, Any]:
        shapes = {n: list(self.engine.get_tensor_shape(n)) for n in self.inputs if n.startswith("past_key_values.")}
        half = self.torch.float16
        return {
            n: self.torch.empty((1, shape[1], 0, shape[3]), dtype=half, device="cuda") for n, shape in shapes.items()
        }

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        torch, context = self.torch, self.context
        for name in self.inputs:
            value = feeds[name]
            if not context.set_input_shape(name, tuple(value.shape)):
                raise ExporterError(f"the engine takes no {name} of {list(value.shape)}", hint=_HINT)
            context.set_tensor_address(name, value.data_ptr() or self._nothing.data_ptr())
        types = {self.trt.DataType.FLOAT: torch.float32, self.trt.DataType.HALF: torch.float16}
        outputs = {}
        for name in self.names:
            if name not in self.inputs:
                shape, kind = tuple(context.get_tensor_shape(name)), self.engine.get_tensor_dtype(name)
                outputs[name] = torch.empty(shape, dtype=types[kind], device="cuda")
                context.set_tensor_address(name, outputs[name].data_ptr())
        torch.cuda.current_stream().synchronize()  # what feeds hold is there
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise ExporterError("the engine did not run", hint=_HINT)
        self._stream.synchronize()
        return outputs


class Decoding:
    """One sequence; each call appends tokens, all that came before is seen through the cache."""

    def __init__(self, prefill: Engine, decode: Engine) -> None:
        self.prefill, self.decode, self.position = prefill, decode, 0
        self._cache = prefill.cache()

    def append(self, tokens: Any) -> F32:
        """Logits float32 [n, V] of n more tokens int64 [n]."""
        torch, device = import_torch(), self.prefill.device
        start, self.position = self.position, self.position + len(tokens)
        feeds = {
            "input_ids": torch.from_numpy(np.array(tokens, np.int64)).to(device)[None],
            "position_ids": torch.arange(start, self.position, device=device)[None],
            "attention_mask": torch.ones((1, self.position), dtype=torch.int64, device=device),
            **self._cache,
        }
        out = (self.decode if len(tokens) == 1 else self.prefill).run(feeds)
        self._cache = {name: out[f"present.{name.removeprefix('past_key_values.')}"] for name in self._cache}
        logits: F32 = out["logits"][0].cpu().numpy()
        return logits


def compared(prefill: Engine, decode: Engine, request: Request, report: OnProgress) -> dict[str, Any]:
    """Both engines against the expected logits: arrays for the results."""
    expected = ReferenceLogits.load(Path(request.expected))
    windows, whole = expected.tokens.shape
    found = []
    for w, window in enumerate(expected.tokens):
        decoding = Decoding(prefill, decode)
        for at in range(0, request.length, request.chunk):
            tokens = window[at : min(at + request.chunk, request.length)]
            found.append(compare(expected, w * whole + at, decoding.append(tokens)))
        report("on the GPU", w + 1, windows)
    decoding, first = Decoding(prefill, decode), expected.tokens[0]
    for at in range(0, request.first, request.chunk):
        decoding.append(first[at : min(at + request.chunk, request.first)])
    alone = range(request.first, request.first + request.steps)
    single = [compare(expected, at, decoding.append(first[at : at + 1])) for at in alone]
    return Positions.join(found).arrays("windows") | Positions.join(single).arrays("cached")


def run(request: Request, report: OnProgress) -> dict[str, Any]:
    """Load both engines, compare; the memory that each context takes."""
    try:
        import tensorrt_rtx as trt
    except ImportError as error:
        raise missing() from error
    torch = import_torch()
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor != request.sm:
        name = torch.cuda.get_device_name()
        raise ExporterError(f"torch's first GPU, {name}, is not the SM{request.sm} of the engines", hint=_HINT)
    report("load engines", 0, 1)
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engines = {name: GpuEngine(trt, runtime, Path(getattr(request, name))) for name in ("prefill", "decode")}
    np.savez(request.results, allow_pickle=False, **compared(engines["prefill"], engines["decode"], request, report))
    return {f"{name}_buffer_bytes": int(each.engine.device_memory_size_v2) for name, each in engines.items()}


def main() -> int:
    return child.serve(lambda asked, report: run(Request(**asked), report))


if __name__ == "__main__":
    sys.exit(main())
