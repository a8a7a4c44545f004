"""A decoder graph of any of the tools in one and the same plain loop of onnxruntime: full KV cache, fed back.

Graphs for onnxruntime-genai keep a window of the cache only and cannot start with an empty one: that
attribute is taken off in memory. Weights stay in their files.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

Logits = npt.NDArray[np.float32]
# Read when a session is made; 8-bit QMoE rounds activations at every accuracy_level without it.
QMOE_GEMM = "ORT_QMOE_CPU_QNBIT_GEMM"
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def find_graph(folder: Path) -> Path:
    """The plain graph of ours is model.onnx; the other tools write one graph only."""
    return folder / "model.onnx"


def integer_nodes(model: Any) -> list[Any]:
    return [n for n in model.graph.node if n.op_type in ("MatMulNBits", "QMoE")]


def set_attribute(node: Any, name: str, value: int | None) -> None:
    """Replace an integer attribute of a node, or take it off (None)."""
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend(kept + ([onnx.helper.make_attribute(name, value)] if value is not None else []))


class Decoder:
    """`levels`: accuracy_level by operator to set (None: take it off); `float32`: no kernel rounds activations."""

    def __init__(
        self, graph: Path, threads: int, *, float32: bool = False, levels: dict[str, int | None] | None = None
    ) -> None:
        model = onnx.load(str(graph), load_external_data=False)
        for node in model.graph.node:
            if node.op_type == "GroupQueryAttention":
                set_attribute(node, "sliding_window_cache", None)
            if float32 and node.op_type in ("MatMulNBits", "QMoE"):
                set_attribute(node, "accuracy_level", 1)
            elif levels and node.op_type in levels:
                set_attribute(node, "accuracy_level", levels[node.op_type])
        self.has_integers = bool(integer_nodes(model))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.parent))
        os.environ.pop(QMOE_GEMM, None)
        if float32:
            os.environ[QMOE_GEMM] = "fp32"
        raw = model.SerializeToString()
        self.session: Any = onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
        os.environ.pop(QMOE_GEMM, None)
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.outputs = [o.name for o in self.session.get_outputs()]

    def start(self, kv_heads: int, head_dim: int) -> dict[str, Any]:
        """The cache of an empty sequence."""
        return {
            name: np.zeros((1, kv_heads, 0, head_dim), TYPES[i.type])
            for name, i in self.inputs.items()
            if name.startswith("past_key_values.")
        }

    def step(self, tokens: npt.NDArray[np.int64], cache: dict[str, Any], past: int) -> Logits:
        """Logits [n, V] of n more tokens; the cache is brought up to date."""
        total = past + len(tokens)
        fed = {"input_ids": tokens[None], "attention_mask": np.ones((1, total), np.int64), **cache}
        if "position_ids" in self.inputs:
            fed["position_ids"] = np.arange(past, total)[None]
        made = dict(zip(self.outputs, self.session.run(None, fed), strict=True))
        for name in cache:
            cache[name] = made[name.replace("past_key_values", "present")]
        logits: Logits = made["logits"][0].astype(np.float32, copy=False)
        return logits
