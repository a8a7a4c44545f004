"""A decoder graph in ONNX Runtime: loaded once, run as sequences whose keys and values are fed back.

The graph may be changed in memory before it is loaded, its weights staying where they are on disk: the
router logits become outputs, and the kernels are told to keep activations in float32.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from exporter.errors import ExporterError, MissingExtra
from exporter.model.reference import I64, U16
from exporter.numerics.floats import F32
from exporter.validate import onnx_twin
from exporter.validate.limits import cuda_options
from exporter.validate.onnx_kernels import CUDA

# "shipped": as the graph's accuracy_level says (on CPU, activations rounded to int8 block by block).
# "float32": the same weights with activations as they are.
Activations = Literal["shipped", "float32"]

# 8-bit QMoE on CPU rounds activations at every accuracy_level; only this variable, read when the session
# is made, stops it (onnxruntime, contrib_ops/cpu/moe/moe_quantization_cpu.cc).
QMOE_GEMM = "ORT_QMOE_CPU_QNBIT_GEMM"
_FLOAT32_ACTIVATIONS = 1  # accuracy_level
_EXPERTS = ("QMoE", "MoE")  # operators whose second input is the router's logits [tokens, E]
_TYPES: Mapping[str, type[np.generic]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_DEVICES: Mapping[str, str] = {CUDA: "cuda"}  # where keys and values stay; else in host memory
_ERROR = 3  # log severity


def import_onnxruntime() -> Any:
    """The onnxruntime module. Raises MissingExtra."""
    try:
        import onnxruntime
    except ModuleNotFoundError as missing:
        raise MissingExtra("onnxruntime", "onnx", "running an ONNX graph") from missing
    return onnxruntime


def environment(activations: Activations) -> dict[str, str]:
    """Variables that the process which makes the session needs."""
    return {QMOE_GEMM: "fp32"} if activations == "float32" else {}


def require_environment(activations: Activations) -> None:
    """Raises ExporterError where a variable from outside would change what "as shipped" means."""
    if os.environ.get(QMOE_GEMM, "") != environment(activations).get(QMOE_GEMM, ""):
        raise ExporterError(f"{QMOE_GEMM} is set to something else than this run needs", hint=f"unset {QMOE_GEMM}")


class Graph:
    """A graph in a session.

    `inspect`: add the router logits of every layer to the outputs (no node changes for it), and note
    the `accuracy_levels` of its integer kernels. `head_size`: of keys and values, where the graph leaves it open.
    `optimize`: whether ONNX Runtime may rewrite the graph. `layers`: run only the first ones, 0 for all.
    `device_limit`: bytes of a CUDA device that it may take, 0 for no limit.
    Raises ExporterError when the runtime cannot load it.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int,
        provider: str,
        activations: Activations = "shipped",
        inspect: bool = False,
        head_size: int = 0,
        optimize: bool = True,
        layers: int = 0,
        device_limit: int = 0,
    ) -> None:
        ort = import_onnxruntime()
        require_environment(activations)
        self.path, self.version = path, str(ort.__version__)
        ort.set_default_logger_severity(_ERROR)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, _ERROR
        # DequantizeLinear and MatMul that are fused round activations to int8 by default.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(_FLOAT32_ACTIVATIONS))
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        model: Any = str(path)
        self.routers: list[str] = []
        self.accuracy_levels: list[int] = []
        if inspect or layers or activations == "float32":
            model, self.routers, self.accuracy_levels = _changed(path, activations, inspect, layers)
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        if layers:  # of a model that is too large to run whole: decoded weights must not stay
            options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        kept_out = ["ConstantFolding"] if layers else []
        asked: Any = (provider, cuda_options(device_limit)) if provider == CUDA and device_limit else provider
        try:
            self.session: Any = ort.InferenceSession(model, options, providers=[asked], disabled_optimizers=kept_out)
        except Exception as error:  # pybind's own kinds, one for each status code
            raise self.failure("load", error) from error
        if provider not in self.session.get_providers():
            raise ExporterError(
                f"onnxruntime {self.version} did not take {provider} for {path.name}", hint="--provider cpu"
            )
        self.provider = provider
        inputs = {i.name: i for i in self.session.get_inputs()}
        outputs = {o.name: o for o in self.session.get_outputs()}
        past = [i for name, i in inputs.items() if name.startswith("past_key_values.")]
        self._past = {i.name: (i.type, _cache_shape(i, head_size)) for i in past}
        if not (past and all(all(shape) for _, shape in self._past.values()) and _is_decoder(outputs)):
            raise ExporterError(
                f"{path} is not a decoder graph with a KV cache", hint="exporter quantize ... makes one"
            )
        self.present = [n for n in outputs if n.startswith("present.")]
        self.vocab_size = int(outputs["logits"].shape[-1])
        self.takes_positions = "position_ids" in inputs

    def empty(self) -> dict[str, Any]:
        """Keys and values of no tokens, by input name."""
        ort = import_onnxruntime()
        return {
            name: ort.OrtValue.ortvalue_from_numpy(np.zeros((1, heads, 0, width), _TYPES[kind]))
            for name, (kind, (heads, width)) in self._past.items()
        }

    def failure(self, doing: str, error: Exception) -> ExporterError:
        """What the runtime said, as one line: the innermost of its reasons."""
        said = " ".join(str(error).split()).rpartition("[ONNXRuntimeError] : ")[2][:400]
        return ExporterError(
            f"onnxruntime {self.version} cannot {doing} {self.path}: {said}",
            hint="exporter quantize ... --overwrite makes it again",
        )


def _cache_shape(i: Any, head_size: int) -> tuple[int, int]:
    """kv_heads and head_dim of an input [batch, kv_heads, past, head_dim] of a known type; 0 for what is not known."""
    if i.type not in _TYPES or len(i.shape) != 4:
        return 0, 0
    heads, width = i.shape[1], i.shape[3]
    return heads if isinstance(heads, int) else 0, width if isinstance(width, int) else head_size


def _is_decoder(outputs: Mapping[str, Any]) -> bool:
    logits = outputs.get("logits")
    return "present.0.key" in outputs and logits is not None and type(logits.shape[-1]) is int


def _changed(path: Path, activations: Activations, inspect: bool, layers: int) -> tuple[bytes, list[str], list[int]]:
    """The graph without its weights and with the activations asked for; its router logits; its accuracy levels."""
    try:
        import onnx
    except ModuleNotFoundError as missing:
        raise MissingExtra("onnx", "onnx", "reading an ONNX graph") from missing
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own
        raise ExporterError(f"{path} cannot be read ({error})", hint="exporter quantize ... --overwrite") from error
    if layers:
        onnx_twin.cut(model, layers)
    if onnx_twin.is_for_tensorrt(model):
        routers = onnx_twin.router_logits(model) if inspect else []
        onnx_twin.for_onnxruntime(model, wide=activations == "float32")
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in routers)
        return bytes(model.SerializeToString()), routers, []
    levels: set[int] = set()
    for node in model.graph.node:
        if node.op_type not in ("MatMulNBits", "QMoE"):
            continue
        if activations == "float32":
            kept = [a for a in node.attribute if a.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("accuracy_level", _FLOAT32_ACTIVATIONS)])
        levels |= {a.i for a in node.attribute if a.name == "accuracy_level"}
    # What the experts' operator itself reads: a graph in float16 rounds the logits before it chooses.
    routers = [node.input[1] for node in model.graph.node if inspect and node.op_type in _EXPERTS]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in routers)
    return bytes(model.SerializeToString()), routers, sorted(levels)


class Decoding:
    """One sequence; each call appends tokens and sees all that came before through the cache.

    `single`: a graph of the same cache that takes over where one token comes alone.
    """

    def __init__(self, graph: Graph, single: Graph | None = None) -> None:
        self.graph, self.single, self.position = graph, single, 0
        self._cache = graph.empty()
        self._routers: list[F32] = []

    def append(self, tokens: Sequence[int] | I64) -> F32:
        """Logits float32 [n, V] of n more tokens."""
        ids = np.asarray(tokens, np.int64)[None]  # [1, n]
        graph = self.single if self.single is not None and ids.shape[1] == 1 else self.graph
        self.position += ids.shape[1]
        binding = graph.session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", np.ones((1, self.position), np.int64))
        if graph.takes_positions:
            positions = np.arange(self.position - ids.shape[1], self.position, dtype=np.int64)
            binding.bind_cpu_input("position_ids", positions[None])
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(name, value)
        outputs = ["logits", *graph.routers, *graph.present]
        for name in outputs:
            binding.bind_output(name, _DEVICES.get(graph.provider, "cpu") if name in graph.present else "cpu")
        try:
            graph.session.run_with_iobinding(binding)
        except Exception as error:  # pybind's own kinds
            raise graph.failure(f"run {ids.shape[1]} tokens at {self.position - ids.shape[1]} of", error) from error
        found = dict(zip(outputs, binding.get_outputs(), strict=True))
        self._cache = {name: found[f"present.{name.removeprefix('past_key_values.')}"] for name in self._cache}
        self._routers = [found[name].numpy() for name in graph.routers]
        logits: F32 = found["logits"].numpy()[0].astype(np.float32, copy=False)
        return logits

    @property
    def chooses_in_half(self) -> bool:
        """Whether its experts can be read here, and follow from 16-bit activations, as its cache has them."""
        return bool(self._routers) and any("16" in value.data_type() for value in self._cache.values())

    def undecided(self, top_k: int) -> npt.NDArray[np.bool_]:
        """Of the last call, [layers, n]: whether the last expert that is chosen and the first that is not are equal."""
        ranked = np.stack([-np.sort(-logits, axis=-1) for logits in self._routers])  # [layers, n, E]
        last, next_one = ranked[..., top_k - 1 : top_k], ranked[..., top_k : top_k + 1]
        return np.asarray((last == next_one).any(axis=-1))  # of no next one where all are chosen

    def routes(self, top_k: int) -> U16:
        """The experts of the tokens of the last call, uint16 [layers, n, top_k], ascending."""
        return np.stack([chosen_experts(logits, top_k) for logits in self._routers])


def chosen_experts(logits: npt.NDArray[Any], top_k: int) -> U16:
    """The top_k experts of router logits [n, E], ascending; of equal ones the first, as the kernels choose."""
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]
    return np.sort(order, axis=-1).astype(np.uint16)
