"""One linear layer [N, K] as other tools store it in a safetensors file, back to float32 rows.

Sources: AutoGPTQ's format as GPTQModel 7.7 reads it (`qweight`, see formats/gptq); compressed-tensors 0.20,
`compressors/` (`pack-quantized`, `mxfp4-pack-quantized`, `nvfp4-pack-quantized`, `float-quantized`, `int-quantized`).
What a layer is follows from its dtypes and shapes; a configuration only says what those cannot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from exporter.formats.folder.foreign_arrays import (
    E4M3,
    FLOATS,
    ITEM_BYTES,
    Fetch,
    columns,
    floats,
    grouped,
    lines,
    spread,
    view,
)
from exporter.numerics import e2m1
from exporter.numerics.bits import unpack_nibbles
from exporter.numerics.floats import F32
from exporter.types import TensorRef


class Unreadable(ValueError):
    """A stored layer that is not understood; the text says which tensor and what of it."""


class Layer(Protocol):
    """`label`: how it is stored, for a report; `refs`: the stored tensors that it is made of."""

    @property
    def label(self) -> str: ...

    @property
    def refs(self) -> tuple[TensorRef, ...]: ...

    def rows(self, fetch: Fetch, start: int, stop: int) -> F32:
        """float32 [stop - start, K], or [stop - start] of a vector."""


# Kinds of layers


@dataclass(frozen=True)
class FloatLayer:
    """Plain numbers: `weight` [N, K], or a vector."""

    weight: TensorRef

    @property
    def label(self) -> str:
        return self.weight.dtype

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        return (self.weight,)

    def rows(self, fetch: Fetch, start: int, stop: int) -> F32:
        return floats(lines(fetch, self.weight, start, stop), self.weight.dtype)


@dataclass(frozen=True)
class GptqLayer:
    """qweight [K * bits / 32, N], qzeros [G, N * bits / 32], scales [G, N], g_idx [K] or None.

    added: what is added to a stored zero point, 1 in v1 files. group: inputs to a group where g_idx does not say.
    """

    qweight: TensorRef
    qzeros: TensorRef
    scales: TensorRef
    g_idx: TensorRef | None
    bits: int
    group: int
    added: int
    label: str

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        return (self.qweight, self.qzeros, self.scales, *([self.g_idx] if self.g_idx else []))

    def ordered(self, fetch: Fetch) -> bool:
        """Whether inputs were sorted before they were grouped (act-order). Raises Unreadable."""
        found = self.groups(fetch, self.qweight.shape[0] * 32 // self.bits)
        return not np.array_equal(found, np.arange(len(found)) // self.group)

    def groups(self, fetch: Fetch, k: int) -> npt.NDArray[np.int64]:
        """The group of each input, int64 [K]. Raises Unreadable."""
        if self.g_idx is None:
            return np.arange(k) // self.group
        found = lines(fetch, self.g_idx, 0, k).view("<i4").astype(np.int64)
        if found.min() < 0 or found.max() >= self.scales.shape[0]:
            raise Unreadable(f"{self.g_idx.name} names groups outside the {self.scales.shape[0]} that there are")
        return found

    def rows(self, fetch: Fetch, start: int, stop: int) -> F32:
        per = 32 // self.bits
        k = self.qweight.shape[0] * per
        words = columns(fetch, self.qweight, start, stop)  # [K / per, n]
        codes = spread(np.ascontiguousarray(words.T), self.bits)  # [n, K]
        first, last = start // per, -(-stop // per)
        zeros = spread(columns(fetch, self.qzeros, first, last), self.bits)[:, start - first * per :][:, : stop - start]
        zeros = (zeros + np.uint8(self.added)) & np.uint8((1 << self.bits) - 1)  # [G, n]
        scales = floats(columns(fetch, self.scales, start, stop), self.scales.dtype)  # [G, n]
        return grouped(codes, scales.T, zeros.T, self.groups(fetch, k))


@dataclass(frozen=True)
class PackedLayer:
    """weight_packed int32 [N, K * bits / 32], weight_scale [N, G], zero points packed along N, or none."""

    packed: TensorRef
    scale: TensorRef
    zero: TensorRef | None
    g_idx: TensorRef | None
    bits: int
    label: str

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        return tuple(r for r in (self.packed, self.scale, self.zero, self.g_idx) if r is not None)

    def rows(self, fetch: Fetch, start: int, stop: int) -> F32:
        codes = spread(lines(fetch, self.packed, start, stop), self.bits)  # [n, K]
        scales = floats(lines(fetch, self.scale, start, stop), self.scale.dtype)  # [n, G]
        k, groups = codes.shape[1], scales.shape[1]
        zeros: npt.NDArray[Any] = np.full(scales.shape, 1 << (self.bits - 1), np.uint8)
        if self.zero is not None:
            per = 32 // self.bits
            first, last = start // per, -(-stop // per)
            words = lines(fetch, self.zero, first, last)  # [words, G]
            zeros = spread(np.ascontiguousarray(words.T), self.bits).T[start - first * per :][: stop - start]
        group = np.arange(k) // (k // groups)
        if self.g_idx is not None:
            group = lines(fetch, self.g_idx, 0, k).view("<i4").astype(np.int64)
            if group.min() < 0 or group.max() >= groups:
                raise Unreadable(f"{self.g_idx.name} names groups outside the {groups} that there are")
        return grouped(codes, scales, zeros, group)


@dataclass(frozen=True)
class Fp4Layer:
    """weight_packed uint8 [N, K / 2], even k in the low nibble; scales [N, K / 32] e8m0, or [N, K / 16] FP8 (NVFP4).

    whole: NVFP4's scale of all the matrix, which divides.
    """

    packed: TensorRef
    scale: TensorRef
    whole: TensorRef | None = None

    @property
    def label(self) -> str:
        return "MXFP4" if self.whole is None else "NVFP4"

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        return (self.packed, self.scale, *([self.whole] if self.whole else []))

    def rows(self, fetch: Fetch, start: int, stop: int) -> F32:
        data = np.ascontiguousarray(lines(fetch, self.packed, start, stop))  # [n, K / 2]
        codes = np.ascontiguousarray(lines(fetch, self.scale, start, stop))
        if self.whole is None:
            return e2m1.dequantize(data, codes)
        divisor = fetch(self.whole.path, self.whole.offset, 4).view("<f4")
        scales = E4M3[codes] / divisor  # [n, K / 16]
        levels = e2m1.LEVELS[unpack_nibbles(data)]
        levels.reshape(*scales.shape, -1)[...] *= scales[..., None]
        return levels


@dataclass(frozen=True)
class ScaledLayer:
    """`weight` of FP8 or int8 [N, K] and weight_scale: one number, [N, 1], or [N, G]; of MXFP8 e8m0 [N, K / 32]."""

    weight: TensorRef
    scale: TensorRef
    zero: TensorRef | None
    label: str

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        return (self.weight, self.scale, *([self.zero] if self.zero else []))

    def rows(self, fetch: Fetch, start: int, stop: int) -> F32:
        codes = lines(fetch, self.weight, start, stop)  # [n, K]
        out = E4M3[codes] if self.weight.dtype == "F8_E4M3" else codes.astype(np.float32)
        if self.zero is not None:
            out -= self._each(self.zero, fetch, start, stop, out.shape[1])
        out *= self._each(self.scale, fetch, start, stop, out.shape[1])
        return out

    def _each(self, ref: TensorRef, fetch: Fetch, start: int, stop: int, k: int) -> F32:
        """One number for each weight, [n, K]; or [1, 1] where all have the same."""
        if len(ref.shape) < 2:
            return floats(view(fetch(ref.path, ref.offset, ref.nbytes), ref.dtype), ref.dtype).reshape(1, 1)
        found = floats(lines(fetch, ref, start, stop), ref.dtype)  # [n, G]
        return np.repeat(found, k // found.shape[1], axis=1)


@dataclass(frozen=True)
class Settings:
    """What a configuration says that shapes do not. added: see GptqLayer; group: of inputs, 0 unknown."""

    added: int = 1
    group: int = 0
    symmetric: bool = True


def find_layer(refs: Mapping[str, TensorRef], stem: str, n: int, k: int, settings: Settings) -> Layer | None:
    """The layer [N, K] called `stem`, None where there is none. Raises Unreadable."""
    if f"{stem}.qweight" in refs:
        return _gptq(refs, stem, n, k, settings)
    if f"{stem}.weight_packed" in refs:
        packed = refs[f"{stem}.weight_packed"]
        return _fp4(refs, stem, n, k) if packed.dtype == "U8" else _packed(refs, stem, n, k)
    weight = refs.get(f"{stem}.weight")
    if weight is None:
        return None
    if weight.dtype in FLOATS:
        _expect(weight, (n, k))
        return FloatLayer(weight)
    return _scaled(refs, stem, n, k)


def expect_float(ref: TensorRef, shape: tuple[int, ...]) -> FloatLayer:
    """A tensor of plain numbers of this shape. Raises Unreadable."""
    if ref.dtype not in FLOATS:
        raise Unreadable(f"{ref.name} is {ref.dtype}, not BF16, F16 or F32")
    _expect(ref, shape)
    return FloatLayer(ref)


def _expect(ref: TensorRef, shape: tuple[int, ...], *dtypes: str) -> None:
    if dtypes and ref.dtype not in dtypes:
        raise Unreadable(f"{ref.name} is {ref.dtype}, not {' or '.join(dtypes)}")
    if ref.shape != shape:
        raise Unreadable(f"{ref.name} is {list(ref.shape)}, the model implies {list(shape)}")


def _need(refs: Mapping[str, TensorRef], name: str) -> TensorRef:
    if name not in refs:
        raise Unreadable(f"{name} is missing")
    return refs[name]


def _bits(ref: TensorRef, words: int, k: int) -> int:
    """Bits of a code, from how many words hold K of them."""
    bits = words * 32 // k
    if bits not in (2, 4, 8) or words * 32 != bits * k:
        raise Unreadable(f"{ref.name} is {list(ref.shape)}: {words * 32 / k:.3g} bits a weight, not 2, 4 or 8")
    return bits


def _name(bits: int, k: int, groups: int, symmetric: bool, ordered: bool) -> str:
    group = f"g{-(-k // groups)}" if groups > 1 else "channel"
    return f"int{bits} {group}{'' if symmetric else ' asym'}{' act-order' if ordered else ''}"


def _gptq(refs: Mapping[str, TensorRef], stem: str, n: int, k: int, settings: Settings) -> Layer:
    qweight = refs[f"{stem}.qweight"]
    if qweight.dtype != "I32" or len(qweight.shape) != 2:
        raise Unreadable(f"{qweight.name} is {qweight.dtype} {list(qweight.shape)}, not int32 words")
    bits = _bits(qweight, qweight.shape[0], k)
    _expect(qweight, (k * bits // 32, n))
    scales, qzeros = _need(refs, f"{stem}.scales"), _need(refs, f"{stem}.qzeros")
    groups = scales.shape[0] if len(scales.shape) == 2 else 0
    _expect(scales, (groups, n), *FLOATS)
    _expect(qzeros, (groups, n * bits // 32), "I32")
    g_idx = refs.get(f"{stem}.g_idx")
    if g_idx is not None:
        _expect(g_idx, (k,), "I32")
    group = settings.group if settings.group > 0 and -(-k // settings.group) == groups else 0
    if not group:
        if not groups or (k % groups and g_idx is None):
            raise Unreadable(f"{scales.name} has {groups} groups for {k} inputs")
        group = -(-k // groups)
    if n * bits % 32:
        raise Unreadable(f"{qzeros.name}: {n} outputs are not whole words of {bits}-bit zero points")
    label = f"int{bits} {f'g{group}' if groups > 1 else 'channel'}{'' if settings.symmetric else ' asym'}"
    return GptqLayer(qweight, qzeros, scales, g_idx, bits, group, settings.added, label)


def _packed(refs: Mapping[str, TensorRef], stem: str, n: int, k: int) -> Layer:
    packed, scale = refs[f"{stem}.weight_packed"], _need(refs, f"{stem}.weight_scale")
    if packed.dtype != "I32" or len(packed.shape) != 2:
        raise Unreadable(f"{packed.name} is {packed.dtype} {list(packed.shape)}, not int32 words")
    bits = _bits(packed, packed.shape[1], k)
    _expect(packed, (n, k * bits // 32))
    groups = scale.shape[1] if len(scale.shape) == 2 else 0
    _expect(scale, (n, groups), *FLOATS)
    if not groups or k % groups:
        raise Unreadable(f"{scale.name} has {groups} groups for {k} inputs")
    zero, g_idx = refs.get(f"{stem}.weight_zero_point"), refs.get(f"{stem}.weight_g_idx")
    if zero is not None:
        _expect(zero, (-(-n * bits // 32), groups), "I32")
    if g_idx is not None:
        _expect(g_idx, (k,), "I32")
    return PackedLayer(packed, scale, zero, g_idx, bits, _name(bits, k, groups, zero is None, g_idx is not None))


def _fp4(refs: Mapping[str, TensorRef], stem: str, n: int, k: int) -> Layer:
    packed, scale = refs[f"{stem}.weight_packed"], _need(refs, f"{stem}.weight_scale")
    _expect(packed, (n, k // 2), "U8")
    if scale.dtype == "F8_E4M3":
        whole = _need(refs, f"{stem}.weight_global_scale")
        _expect(scale, (n, k // 16), "F8_E4M3")
        _expect(whole, whole.shape if whole.nbytes == 4 else (1,), "F32")
        return Fp4Layer(packed, scale, whole)
    _expect(scale, (n, k // 32), "U8", "F8_E8M0")
    return Fp4Layer(packed, scale)


def _scaled(refs: Mapping[str, TensorRef], stem: str, n: int, k: int) -> Layer:
    weight = refs[f"{stem}.weight"]
    _expect(weight, (n, k), "F8_E4M3", "I8", *FLOATS)
    scale, zero = _need(refs, f"{stem}.weight_scale"), refs.get(f"{stem}.weight_zero_point")
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    for ref in (scale, *([zero] if zero else [])):
        if len(ref.shape) > 1 or ref.nbytes != ITEM_BYTES.get(ref.dtype, 0):
            _expect(ref, (n, groups), *FLOATS, *(("I8",) if ref is zero else ("U8", "F8_E8M0")))
        if not groups or k % groups:
            raise Unreadable(f"{ref.name} has {groups} groups for {k} inputs")
    if scale.dtype in ("U8", "F8_E8M0"):
        return ScaledLayer(weight, scale, zero, "MXFP8")
    kind = "FP8" if weight.dtype == "F8_E4M3" else "int8"
    grain = f"g{k // groups}" if groups > 1 else "channel" if len(scale.shape) == 2 else "tensor"
    return ScaledLayer(weight, scale, zero, f"{kind} {grain}{'' if zero is None else ' asym'}")
