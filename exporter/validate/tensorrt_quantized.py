"""What TensorRT takes of types: which GPU has them, where 4-bit and 8-bit codes may go, how they are dequantized.

Sources: TensorRT's documentation of IDequantizeLayer; and TensorRT for RTX 1.7.1 itself, which
tests/oracle/test_tensorrt_rules.py asks.
"""

from __future__ import annotations

from exporter.validate.tensorrt_graph import (
    BF16,
    FP4,
    FP8,
    INT4,
    INT8,
    TRT,
    UINT8,
    Dims,
    Problem,
    Problems,
    Site,
    all_zero,
    name_of,
    positive,
)

_QUANTIZED = (INT8, INT4, FP8, FP4)
_ONLY_BETWEEN = (INT4, FP8, FP4)  # types that leave DequantizeLinear's hands nowhere
_OF_BYTES = ("Cast", "Shape", "Size", "Equal")  # what is done with UINT8 that is no constant
_MICROBLOCK = 32
_WITHOUT = {BF16: (75,), INT4: (75,), FP8: (75, 80, 86), FP4: (75, 80, 86, 89)}


def types(site: Site) -> Problems:
    """Which types come in and go out: what is for DequantizeLinear alone, and what a GPU has."""
    dequantizes = site.node.op_type in ("DequantizeLinear", "TRT_MXFP8DequantizeLinear")
    quantizes = site.node.op_type == "QuantizeLinear"
    came = [site.dtype(i) for i in range(len(site.node.input))]
    made = [site.known.dtype(name) for name in site.node.output]
    for index, dtype in enumerate(came):
        taken = (dequantizes and index != 1) or (quantizes and index == 2) or (index == 1 and site.domain == TRT)
        if dequantizes and index == 1 and site.domain != TRT:
            continue  # the scale has rules of its own
        if dtype in _ONLY_BETWEEN and not taken:
            yield Problem(_between(site), f"{name_of(dtype)} goes from a constant to DequantizeLinear and nowhere else")
        elif dtype == INT8 and not taken and site.constant(index):
            yield Problem(_between(site), "an INT8 constant must go to DequantizeLinear directly")
    if site.node.op_type not in _OF_BYTES and any(d == UINT8 and not site.constant(i) for i, d in enumerate(came)):
        yield Problem("types", "UINT8 that is no constant is for Cast only")
    for dtype, name in zip(made, site.node.output, strict=True):
        if dtype == UINT8 and site.node.op_type == "Cast" and name not in site.known.outputs:
            yield Problem("types", "UINT8 goes in and out of the graph, not from node to node")
        if dtype in _ONLY_BETWEEN and not quantizes and site.node.op_type != "Constant" and dtype not in came:
            yield Problem("types", f"{name_of(dtype)} is made by QuantizeLinear only")
    for dtype, without in _WITHOUT.items():
        if dtype in came or dtype in made:
            yield Problem("sm", f"{name_of(dtype)} is not there on SM{', SM'.join(map(str, without))}", without)


def _between(site: Site) -> str:
    return "gather" if site.node.op_type.startswith("Gather") else "types"


def product(site: Site) -> Problems:
    if site.dtype(0) == 1:  # FLOAT
        yield Problem("sm", "a product of float32 matrices is not there on SM75", (75,))


def dequantize(site: Site) -> Problems:
    """Inputs: codes [..., K, ...], scales with K / block in its place, zero points like the scales."""
    dtype, scale = site.dtype(0), site.dtype(1)
    if dtype is not None and dtype not in _QUANTIZED:
        yield Problem("dequantize", f"codes of {name_of(dtype)}; INT8, INT4, FLOAT8E4M3FN and FLOAT4E2M1 are taken")
        return
    wanted = site.attributes.get("output_dtype", 0)
    if wanted and scale is not None and wanted != scale:
        # INT8 and FP8 build so; ONNX Runtime's own kernels do not take it for 4 bits either
        text = f"output_dtype is {name_of(wanted)}, the scales are {name_of(scale)}; a Cast after it does the same"
        yield Problem("dequantize", text, fatal=dtype in (INT4, FP4, None))
    yield from zeros(site)
    yield from _scales(site, dtype)
    yield from _blocks(site)


def zeros(site: Site) -> Problems:
    """Of DequantizeLinear and of QuantizeLinear."""
    zeros = site.tensor(2)
    if site.has(2) and zeros is None:
        yield Problem("dequantize", "zero points that are no constant")
    elif zeros is not None and not all_zero(site.graph, zeros):
        yield Problem("dequantize", "zero points that are not zero; TensorRT is symmetric only")


def _scales(site: Site, dtype: int | None) -> Problems:
    scales = site.tensor(1)
    if scales is None:
        maker = site.known.maker(site.node.input[1]) if site.has(1) else None
        if maker is None or maker.op_type != "DequantizeLinear":  # NVFP4 has its scales dequantized
            yield Problem("dequantize", "scales that are no constant, so nobody saw whether they suit", fatal=False)
    elif scales.data_type not in (1, 10, BF16):
        yield Problem("dequantize", f"scales of {name_of(scales.data_type)}")
    elif dtype != INT4 and not positive(site.graph, scales):
        yield Problem("dequantize", "a scale that is not above zero")


def _blocks(site: Site) -> Problems:
    codes, scales, block = site.shape(0), site.shape(1), site.attributes.get("block_size", 0)
    axis = site.attributes.get("axis", 1)
    if not block and scales in ((), (1,)):
        return
    if codes is None or scales is None or None in codes or None in scales:
        yield Problem("types", "codes and scales of unknown shapes, so nobody saw whether they fit", fatal=False)
    elif block:
        yield from _fit(codes, scales, block, axis)
    elif not -len(codes) <= axis < len(codes):
        yield Problem("dequantize", f"axis {axis} of codes {list(codes)}")
    elif scales != (codes[axis],):
        yield Problem(
            "dequantize", f"scales {list(scales)} without block_size for {codes[axis]} channels (axis {axis})"
        )


def _fit(codes: Dims, scales: Dims, block: int, axis: int) -> Problems:
    """TensorRT takes the block from the shapes and never looks at block_size: other shapes are other numbers."""
    if not -len(codes) <= axis < len(codes):
        yield Problem("dequantize", f"axis {axis} of codes {list(codes)}")
        return
    axis %= len(codes)
    rows = codes[axis] or 0
    if block < 1 or rows % block:
        yield Problem("dequantize", f"{rows} rows are no whole blocks of {block}; TensorRT would take another block")
    elif scales != (*codes[:axis], rows // block, *codes[axis + 1 :]):
        told = f"scales {list(scales)} for codes {list(codes)} in blocks of {block} (axis {axis})"
        yield Problem("dequantize", f"{told}; TensorRT would take another block")
    elif axis < len(codes) - 2:
        yield Problem("dequantize", f"blocks along axis {axis} of {len(codes)}; they lie along one of the last two")


def microscaled(site: Site) -> Problems:
    """TRT_MXFP8DequantizeLinear: codes [..., K], scales e8m0 as bytes [..., K / 32]."""
    dtype, scale, block = site.dtype(0), site.dtype(1), site.attributes.get("block_size", _MICROBLOCK)
    if dtype not in (FP8, FP4):
        yield Problem("dequantize", f"codes of {name_of(dtype)}; FLOAT8E4M3FN and FLOAT4E2M1 are taken")
    if scale != UINT8:
        yield Problem("dequantize", f"scales of {name_of(scale)}; its e8m0 scales are written as UINT8")
    if block != _MICROBLOCK:
        yield Problem("dequantize", f"blocks of {block}; it takes {_MICROBLOCK}")
    if site.tensor(0) is None or site.tensor(1) is None:
        yield Problem("dequantize", "codes or scales that are no constant")
    else:
        yield from _fit(site.shape(0) or (), site.shape(1) or (), block, site.attributes.get("axis", -1))
