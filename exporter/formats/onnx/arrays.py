"""Which initializers hold the numbers of a step, and where in them: no ONNX here, only geometry.

Integers need no packing: codes lie in the files as they are in a QTensor (low nibble first, unsigned, zero 8 or
128), scales in the type of the device's activations. q, k and v are rows of one matrix, gate and up the even
and odd rows of another, as released. Norms, sinks, biases and routers are widened to float32.

FP4 experts lie transposed, for CUDA: the byte at [k, n] holds rows 2n and 2n + 1 of column k, the even one in
its low nibble; so gate and up share every byte. Source: what onnxruntime-genai's builder writes for
`moe_quant_type=mxfp4`, byte for byte (tests/oracle).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from exporter.formats.base import Part
from exporter.formats.onnx.devices import Device
from exporter.formats.onnx.external import BITS
from exporter.numerics.bits import pack_nibbles, unpack_nibbles
from exporter.numerics.floats import narrowed, widened
from exporter.types import QTensor, TensorSpec
from exporter.types.qtensor import U8
from exporter.types.recipe import Step

FLOATS = {"f32": "float", "f16": "float16", "bf16": "bfloat16"}
_EVEN, _ODD = 0x0F, 0xF0
HeadRows = tuple[int, int, int]


@dataclass(frozen=True)
class Initializer:
    """A tensor of the graph whose bytes lie in a data file; `dtype` is ONNX's name of the type."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True)
class Array:
    """One array of a packed step, as part of an initializer; `part.offset` counts from the initializer's start."""

    initializer: Initializer
    part: Part


def graph_name(step: Step) -> str:
    """The name in the graph of what a step is stored in, without an ending: q, k and v share one, gate and up too."""
    name, _, kind = step.name.rpartition(".")
    if kind == "sinks":
        return f"{name}.sinks"
    for one in ("q_proj", "k_proj", "v_proj"):
        name = name.replace(f"self_attn.{one}", "self_attn.qkv_proj")
    name = name.replace(".gate_proj", ".gate_up_proj").replace(".up_proj", ".gate_up_proj")
    return f"{name}.{kind}"


def kept_wide(spec: TensorSpec) -> bool:
    """Whether it is stored in float32 whatever it is in the release: small, and read by kernels in full precision."""
    return spec.role in ("vector", "router")


def head_rows(steps: Sequence[Step]) -> HeadRows:
    """Rows of q, of k and of v in every layer."""
    rows = {step.name.split(".")[-2]: step.spec.shape[0] for step in steps if step.spec.layer == 0}
    return rows["q_proj"], rows["k_proj"], rows["v_proj"]


def arrays(step: Step, device: Device, heads: HeadRows = (0, 0, 0)) -> list[Array]:
    """Where the arrays of `pack` go. Without `heads` sizes are right, places in a matrix of q, k and v are not."""
    scheme, shape = step.scheme, step.spec.shape
    name = graph_name(step)
    if scheme.kind == "float":
        dtype = "float" if kept_wide(step.spec) else FLOATS[scheme.float_type]
        return [rows(step, name, dtype, shape[2:] if is_expert(step) else shape[1:], heads)]
    n, k = shape[-2:]
    if scheme.kind == "e2m1":
        return [_transposed(step, name, n, k), rows(step, f"{name}_scales", "float8e8m0", (k // 32,), heads)]
    codes: tuple[int, ...] = (k // scheme.group, scheme.group * scheme.bits // 8)
    if step.spec.role in ("expert", "embedding"):  # QMoE and GatherBlockQuantized take rows, MatMulNBits blocks
        codes = (k * scheme.bits // 8,)
    return [
        rows(step, f"{name}_codes", "uint8", codes, heads),
        rows(step, f"{name}_scales", FLOATS[device.io], (k // scheme.group,), heads),
    ]


def pack(step: Step, q: QTensor, device: Device) -> list[U8]:
    """The stored bytes of some leading indices, one array for each of `arrays`."""
    if step.scheme.kind == "e2m1":
        assert q.scales is not None
        return [_columns(q.data, _interleave(step)), np.ascontiguousarray(q.scales).view(np.uint8)]
    raw = [np.ascontiguousarray(a).view(np.uint8) for a in (q.data, q.scales) if a is not None]
    if step.scheme.kind == "float" and kept_wide(step.spec):
        return [widened(raw[0].reshape(-1), step.scheme.float_type)]
    if step.scheme.kind == "int" and device.io == "f32":
        raw[1] = widened(raw[1].reshape(-1), "f16")
    return raw


def _columns(data: U8, side: int | None) -> U8:
    """FP4 codes [E, N, K / 2] by column: uint8 [E, K, N / 2], or for gate and up [E, K, N] with one nibble each."""
    turned = np.ascontiguousarray(np.swapaxes(data, -1, -2))  # [E, K / 2, N]
    e, half, n = turned.shape
    codes = np.empty((e, half, 2, n), np.uint8)
    np.bitwise_and(turned, 15, out=codes[:, :, 0])
    np.right_shift(turned, 4, out=codes[:, :, 1])
    by_column = codes.reshape(e, 2 * half, n)
    if side is None:
        return pack_nibbles(by_column)
    by_column <<= np.uint8(4 * side)
    return by_column


def unpack(step: Step, packed: Sequence[U8], device: Device) -> QTensor:
    """The inverse of `pack` for a whole number of leading indices. Raises ValueError where there is none."""
    scheme, shape = step.scheme, step.spec.shape
    lead = (len(packed[0]), *shape[1:-1]) if len(shape) > 1 else ()
    if scheme.kind == "float":
        return floats(step, packed[0], lead)
    scales = packed[1].reshape(*lead, -1)
    if scheme.kind == "int":
        if device.io == "f32":
            scales = narrowed(packed[1].reshape(-1), "f16").reshape(*lead, -1)
        return QTensor(step.name, scheme, packed[0].reshape(*lead, -1), scales.view(np.float16))
    e, (n, k) = len(packed[0]), shape[-2:]
    side = _interleave(step)
    nibbles = packed[0].reshape(e, k, -1)
    codes = unpack_nibbles(nibbles) if side is None else (nibbles >> np.uint8(4 * side)) & 15
    return QTensor(step.name, scheme, pack_nibbles(np.ascontiguousarray(codes.reshape(e, k, n).swapaxes(1, 2))), scales)


def floats(step: Step, raw: U8, lead: tuple[int, ...]) -> QTensor:
    """A tensor of floats read back; raises ValueError where what was widened does not narrow again."""
    raw = raw.reshape(-1)
    if kept_wide(step.spec):
        raw = narrowed(raw, step.scheme.float_type)
    return QTensor(step.name, step.scheme, raw.reshape(*lead, -1))


def is_expert(step: Step) -> bool:
    """Whether it belongs to experts, weight or bias: its leading axis counts them."""
    return ".mlp.experts." in step.name


def _interleave(step: Step) -> int | None:
    """0 for gate, 1 for up: even and odd rows of one matrix; None for what has its initializer to itself."""
    if ".experts.gate_proj." in step.name:
        return 0
    return 1 if ".experts.up_proj." in step.name else None


def rows(step: Step, name: str, dtype: str, inner: tuple[int, ...], heads: HeadRows) -> Array:
    """An array of rows of `inner` items, where the tensor's rows lie in its initializer."""
    row = math.prod(inner) * BITS[dtype] // 8
    if is_expert(step):
        e, n = step.spec.shape[:2]
        side = _interleave(step)
        if side is None:
            return Array(Initializer(name, dtype, (e, n, *inner)), Part(0, n * row, n * row))
        part = Part(side * row, 2 * n * row, row, ((n, 2 * row),))
        return Array(Initializer(name, dtype, (e, 2 * n, *inner)), part)
    rows, start = step.spec.shape[0], 0
    for i, one in enumerate(("q_proj", "k_proj", "v_proj")):
        if f".self_attn.{one}." in step.name:
            rows, start = sum(heads), sum(heads[:i])
    return Array(Initializer(name, dtype, (rows, *inner)), Part(start * row, row, row))


def _transposed(step: Step, name: str, n: int, k: int) -> Array:
    e, side = step.spec.shape[0], _interleave(step)
    width = k * n if side is not None else k * n // 2
    initializer = Initializer(f"{name}_codes", "uint8", (e, k, width // k))
    mask = 0xFF if side is None else (_EVEN, _ODD)[side]
    return Array(initializer, Part(0, width, width, mask=mask))
