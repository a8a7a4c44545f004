"""Runs engines on the GPU, in a process of its own: `python -m exporter.validate.tensorrt_gpu_worker`.

`child.py` says how it is asked and how it answers; the request is a `Request`. Results are an .npz as onnx_worker.py
writes them: "windows", the windows of the text in pieces; "cached", the first of them up to shortly before the
attention window is full, then one token at a time by the other engine.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import ExporterError
from exporter.model.layer import import_torch
from exporter.model.reference import ReferenceLogits
from exporter.numerics.floats import F32
from exporter.validate import child
from exporter.validate.child import OnProgress
from exporter.validate.metrics import Positions, compare
from exporter.validate.tensorrt_worker import missing

_AGAIN = "the engines are built and proved without a GPU all the same"


@dataclass(frozen=True)
class Request:
    """`prefill`, `decode`: files of engines; `windows`, `results`: .npz files, absolute. `piece`: tokens at once.

    `first`, `steps`: tokens of the first window by `prefill`, then one by one by `decode`.
    """

    prefill: str
    decode: str
    windows: str
    results: str
    piece: int
    first: int
    steps: int


class _Engine:
    """An engine on the GPU; torch holds what goes in and comes out."""

    def __init__(self, trt: Any, runtime: Any, path: Path) -> None:
        self.torch, self.trt = import_torch(), trt
        self.engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise ExporterError(f"{path.name} cannot be loaded on this GPU", hint=_AGAIN)
        self.context = self.engine.create_execution_context()
        if self.context is None:
            raise ExporterError(f"{path.name} does not fit on this GPU", hint=_AGAIN)
        self.names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        self.inputs = [n for n in self.names if self.engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self._stream = self.torch.cuda.Stream()
        self._nothing = self.torch.empty(1, device="cuda")  # an empty tensor has no address, and an input must have one

    def cache(self) -> dict[str, Any]:
        """Keys and values of no tokens, by input."""
        shapes = {n: list(self.engine.get_tensor_shape(n)) for n in self.inputs if n.startswith("past_key_values.")}
        half = self.torch.float16
        return {
            n: self.torch.empty((1, shape[1], 0, shape[3]), dtype=half, device="cuda") for n, shape in shapes.items()
        }

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name, on the GPU."""
        torch, context = self.torch, self.context
        for name in self.inputs:
            value = feeds[name]
            if not context.set_input_shape(name, tuple(value.shape)):
                raise ExporterError(f"the engine takes no {name} of {list(value.shape)}", hint=_AGAIN)
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
            raise ExporterError("the engine did not run", hint=_AGAIN)
        self._stream.synchronize()
        return outputs


class _Decoding:
    """One sequence; each call appends tokens, all that came before is seen through the cache."""

    def __init__(self, prefill: _Engine, decode: _Engine) -> None:
        self.prefill, self.decode, self.position = prefill, decode, 0
        self._cache = prefill.cache()

    def append(self, tokens: Any) -> F32:
        """Logits float32 [n, V] of n more tokens int64 [n]."""
        torch = self.prefill.torch
        start, self.position = self.position, self.position + len(tokens)
        feeds = {
            "input_ids": torch.from_numpy(np.ascontiguousarray(tokens)).cuda()[None],
            "position_ids": torch.arange(start, self.position, device="cuda")[None],
            "attention_mask": torch.ones((1, self.position), dtype=torch.int64, device="cuda"),
            **self._cache,
        }
        out = (self.decode if len(tokens) == 1 else self.prefill).run(feeds)
        self._cache = {name: out[f"present.{name.removeprefix('past_key_values.')}"] for name in self._cache}
        logits: F32 = out["logits"][0].cpu().numpy()
        return logits


def run(request: Request, report: OnProgress) -> dict[str, Any]:
    """Compare both engines with the reference; time them as they go."""
    try:
        import tensorrt_rtx as trt
    except ImportError as error:
        raise missing() from error
    torch = import_torch()
    if not torch.cuda.is_available():
        raise ExporterError("torch here has no CUDA, which engines are fed through", hint=_AGAIN)
    report("load engines", 0, 1)
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engines = [_Engine(trt, runtime, Path(path)) for path in (request.prefill, request.decode)]
    reference = ReferenceLogits.load(Path(request.windows))
    windows, length = reference.tokens.shape
    found, seconds = [], 0.0
    for w, window in enumerate(reference.tokens):
        decoding = _Decoding(*engines)
        for at in range(0, length, request.piece):
            started = time.perf_counter()
            logits = decoding.append(window[at : at + request.piece])
            seconds += (time.perf_counter() - started) * (w > 0)  # kernels are compiled in the first window
            found.append(compare(reference, w * length + at, logits))
        report("on the GPU", w + 1, windows)
    decoding, single, one_by_one = _Decoding(*engines), [], 0.0
    first = reference.tokens[0]
    for at in range(0, request.first, request.piece):
        decoding.append(first[at : min(at + request.piece, request.first)])
    for at in range(request.first, request.first + request.steps):
        started = time.perf_counter()
        logits = decoding.append(first[at : at + 1])
        one_by_one += (time.perf_counter() - started) * (at > request.first)
        single.append(compare(reference, at, logits))
    arrays = Positions.join(found).arrays("windows") | Positions.join(single).arrays("cached")
    np.savez(request.results, allow_pickle=False, **arrays)
    return {
        "prefill_tokens_per_second": (windows - 1) * length / seconds if seconds else None,
        "decode_tokens_per_second": (request.steps - 1) / one_by_one if one_by_one else None,
        "peak_gpu_bytes": torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0],
    }


def main() -> int:
    return child.serve(lambda asked, report: run(Request(**asked), report))


if __name__ == "__main__":
    sys.exit(main())
