"""A graph for TensorRT made into one that ONNX Runtime's CPU computes: same nodes, same bytes, in memory only.

What ONNX Runtime lacks is written in operators that it has: FP4 under e8m0 scales, which NVIDIA's own operator decodes.
With float32 activations nothing but the weights is rounded, so an error of the graph has nowhere to hide. And a model
that is too large to run whole is cut after its first layers.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from exporter.errors import ExporterError
from exporter.numerics import e2m1

FP4_OPERATOR = ("trt", "TRT_MXFP8DequantizeLinear")
_FLOAT, _FLOAT16 = 1, 10  # TensorProto's numbers


def is_for_tensorrt(model: Any) -> bool:
    """Whether it is of our TensorRT format: attention is the standard operator's."""
    return any(node.op_type == "Attention" and node.domain in ("", "ai.onnx") for node in model.graph.node)


def router_logits(model: Any) -> list[str]:
    """What the choice of experts reads in each layer, in order."""
    return [node.input[0] for node in model.graph.node if node.op_type == "TopK" and node.name.endswith("/router/TopK")]


def cut(model: Any, layers: int) -> None:
    """Leave out all layers from `layers` on, in place; the last norm takes what comes before them.

    Raises ExporterError for a graph whose layers do not have our names.
    """
    graph, stream = model.graph, f"/model/layers.{layers - 1}/residual/output"
    norm = next((node for node in graph.node if node.name == "/model/norm"), None)
    if norm is None or not any(stream in node.output for node in graph.node):
        raise ExporterError(f"the graph has no {stream}", hint="exporter quantize ... --overwrite makes it again")
    norm.input[0] = stream
    later = [out.name for out in graph.output if cache_layer(out.name) >= layers]
    _keep(graph.output, lambda value: value.name not in later)
    wanted = {out.name for out in graph.output}
    kept = []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    for values in (graph.initializer, graph.input):
        _keep(values, lambda value: value.name in wanted)


def cut_vocabulary(model: Any, words: int) -> None:
    """Leave out all rows of the embeddings and the head from `words` on, in place."""
    for tensor in model.graph.initializer:
        if not tensor.name.startswith(("model.embed_tokens.", "lm_head.")) or tensor.dims[0] <= words:
            continue
        rows = tensor.dims[0]
        tensor.dims[0] = words
        for entry in tensor.external_data:
            if entry.key == "length":
                entry.value = str(int(entry.value) // rows * words)
    for out in model.graph.output:
        if out.name == "logits":
            out.type.tensor_type.shape.dim[2].dim_value = words


def cache_layer(name: str) -> int:
    """The layer that past_key_values.N.key or present.N.key is of; -1 for what is of none."""
    found = re.fullmatch(r"(?:past_key_values|present)\.([0-9]{1,9})\.(?:key|value)", name)
    return int(found[1]) if found else -1


def _keep(values: Any, keep: Any) -> None:
    kept = [value for value in values if keep(value)]
    del values[:]
    values.extend(kept)


def for_onnxruntime(model: Any, wide: bool) -> None:
    """Rewrite in place: FP4 in standard operators; with `wide` every float16 becomes float32."""
    _spell_out_fp4(model, wide)
    _keep(model.opset_import, lambda imported: imported.domain != FP4_OPERATOR[0])
    if wide:
        _widen(model)


# FP4


def _spell_out_fp4(model: Any, wide: bool) -> None:
    from onnx import helper, numpy_helper

    graph, nodes = model.graph, []
    initializers = {each.name: each for each in graph.initializer}
    for node in graph.node:
        if (node.domain, node.op_type) != FP4_OPERATOR:
            nodes.append(node)
            continue
        codes, scales = (initializers[name] for name in node.input)
        shape = [*scales.dims[:-1], scales.dims[-1] * e2m1.BLOCK]
        _as_bytes(codes)
        nodes += _decoded(node, shape, _FLOAT if wide else _FLOAT16)
    if len(nodes) == len(graph.node):
        return
    byte = np.arange(256)
    pairs = np.stack([e2m1.LEVELS[byte & 15], e2m1.LEVELS[byte >> 4]], axis=-1)
    tables = {"fp4_pairs": pairs, "e8m0_powers": e2m1.scale_value(byte.astype(np.uint8))}
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in tables.items())
    axis = helper.make_tensor("e8m0_axis", 7, [1], [-1])
    graph.initializer.append(axis)
    del graph.node[:]
    graph.node.extend(nodes)


def _as_bytes(codes: Any) -> None:
    """FLOAT4E2M1 [..., K] as the UINT8 [..., K / 2] that it lies in the file as; seen twice, it is bytes already."""
    if codes.data_type == 2:
        return
    codes.data_type = 2  # UINT8
    codes.dims[-1] //= 2


def _decoded(node: Any, shape: list[int], dtype: int) -> list[Any]:
    """The nodes in place of one: pairs of levels looked up by byte, times powers of two looked up by scale."""
    from onnx import helper

    made: list[Any] = []

    def op(kind: str, inputs: list[str], **attributes: Any) -> str:
        name = f"{node.name}/{len(made)}/{kind}"
        made.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def ints(values: list[int]) -> str:
        constant = helper.make_tensor("value", 7, [len(values)], values)  # INT64
        return op("Constant", [], value=constant)

    codes, scales = (op("Cast", [name], to=6) for name in node.input)  # INT32: what Gather takes
    levels = op("Gather", ["fp4_pairs", codes], axis=0)
    levels = op("Reshape", [levels, ints([*shape[:-1], shape[-1] // e2m1.BLOCK, e2m1.BLOCK])])
    powers = op("Unsqueeze", [op("Gather", ["e8m0_powers", scales], axis=0), "e8m0_axis"])
    values = op("Reshape", [op("Mul", [levels, powers]), ints(shape)])
    made.append(helper.make_node("Cast", [values], list(node.output), name=f"{node.name}/Cast", to=dtype))
    return made


# float32


def _widen(model: Any) -> None:
    """float16 becomes float32 everywhere; what lies in a file as float16 is cast where it is read."""
    from onnx import helper, numpy_helper

    graph, casts = model.graph, []
    renamed: dict[str, str] = {}
    for tensor in graph.initializer:
        if tensor.data_type != _FLOAT16:
            continue
        if tensor.data_location == 1:  # in a file of its own
            renamed[tensor.name] = f"{tensor.name}/float32"
            casts.append(helper.make_node("Cast", [tensor.name], [renamed[tensor.name]], to=_FLOAT))
        else:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == _FLOAT16:
                attribute.i = _FLOAT
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == _FLOAT16:
            value.type.tensor_type.elem_type = _FLOAT
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
