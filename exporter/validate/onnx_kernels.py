"""What the kernels of ONNX Runtime do not compute: attributes that they ignore, shapes that they find out late.

Found by running them (onnxruntime 1.32 on a CPU; tests/unit/test_onnx_rules.py runs the silent ones again). For
CUDA and WebGPU it is from their sources: contrib_ops/{cuda,webgpu}/moe and docs/contrib_ops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from exporter.validate.onnx_file import Place

MICROSOFT = "com.microsoft"
CPU, CUDA, WEBGPU = "CPUExecutionProvider", "CUDAExecutionProvider", "WebGpuExecutionProvider"
SHORT = {CPU: "CPU", CUDA: "CUDA", WEBGPU: "WebGPU"}
_QUANT_TYPES = {CUDA: ("int", "fp4", "nvfp4", "fp8", "wfp4afp8")}  # others: int only
_BITS = {CUDA: (2, 4, 8), WEBGPU: (4, 8)}
_EXPERT_BLOCKS = {CUDA: (32, 64, 128)}


def refuse_node(place: Place, provider: str) -> str | None:
    """Why a provider does not compute this node as it is meant, or None."""
    rule = _RULES.get((place.domain, place.node.op_type))
    if rule and any(a.ref_attr_name for a in place.node.attribute):
        return "what it does is decided where its function is called"
    return rule(place, provider) if rule else None


def _experts(place: Place, provider: str) -> str | None:
    """QMoE: inputs 2 and 5 hold the codes [E, N, K bits / 8], 3 and 6 their scales."""
    a, where = place.attributes, SHORT.get(provider, provider)
    kind, bits, block = a.get("quant_type", "int"), a.get("expert_weight_bits", 4), a.get("block_size", 0)
    if kind not in _QUANT_TYPES.get(provider, ("int",)):
        return f"quant_type {kind!r} on {where}, which takes the codes for integers and computes something else"
    if a.get("weights_prepacked", -1) == 1 and provider != CUDA:
        return f"weights in CUDA's order (weights_prepacked=1), with which {where} computes something else"
    if provider != CUDA and any(place.has(i) for i in range(15, 21)):
        return f"scales of whole experts or of activations (inputs 15 to 20), which {where} ignores"
    return (
        _layout(place, provider)
        or _swiglu(place, provider)
        or _chosen(place)
        or (_integer_blocks(place, provider, bits, block) if kind == "int" else None)
    )


def _layout(place: Place, provider: str) -> str | None:
    """What a provider does not take, and says so only when it runs."""
    from onnx import TensorProto

    a, where = place.attributes, SHORT.get(provider, provider)
    if provider != CUDA and any((place.weight(i) or (0,))[0] == TensorProto.FLOAT8E8M0 for i in (3, 6, 9)):
        return f"scales of type float8e8m0, which {where} does not read"
    if provider != CUDA and place.has(8):
        return f"a third matrix for each expert, which {where} does not compute"
    widths = {a.get(f"fc{i}_expert_weight_bits", 0) for i in (1, 2)} - {0, a.get("expert_weight_bits", 4)}
    if widths and provider != CUDA:
        return f"matrices of different widths, which {where} does not compute"
    if provider == WEBGPU and any(place.has(i) for i in (11, 12, 13)):
        return "zero points, which WebGPU does not take"
    if provider == WEBGPU and place.has(14):
        return "router weights beside router logits, which WebGPU does not take"
    return None


def _swiglu(place: Place, provider: str) -> str | None:
    a, where = place.attributes, SHORT.get(provider, provider)
    activation = a.get("activation_type", "relu")
    if provider == WEBGPU and activation != "swiglu":
        return f"activation {activation!r}; WebGPU computes swiglu only"
    if provider != CUDA and activation == "swiglu" and a.get("swiglu_fusion", 0) != 1:
        return f"swiglu_fusion={a.get('swiglu_fusion', 0)}; {where} takes 1 only: rows of gate and up in turns"
    if provider != CUDA and a.get("swiglu_limit_after_activation", 0):
        return f"swiglu_limit_after_activation, which {where} does not compute"
    return None


def _chosen(place: Place) -> str | None:
    """MoE and QMoE: the first matrix [E, ...] is input 2."""
    first, k = place.weight(2), place.attributes.get("k", 1)
    if k < 1 or (first and first[1] and k > first[1][0]):
        return f"{k} experts for each token" + (f" of {first[1][0]}" if first and first[1] else "")
    return None


def _integer_blocks(place: Place, provider: str, bits: int, block: int) -> str | None:
    where = SHORT.get(provider, provider)
    if bits not in _BITS.get(provider, (2, 4, 8)):
        return f"{bits}-bit experts, which {where} does not compute"
    if block and (block < 16 or block & (block - 1)):
        return f"blocks of {block}; powers of two from 16 on are what it takes"
    if block and block not in _EXPERT_BLOCKS.get(provider, (block,)):
        return f"blocks of {block}; {where} takes {', '.join(map(str, _EXPERT_BLOCKS[provider]))}"
    if provider == CUDA and any(place.has(i) for i in (11, 12)) and block < 64:
        return f"zero points in blocks of {block}, which CUDA takes from 64 on"
    prepacked = place.attributes.get("weights_prepacked", -1)
    if provider == CUDA and prepacked and _in_rows(place, bits):
        return "rows of weights without weights_prepacked=0, which CUDA takes for its own order"
    if block and prepacked != 1:
        return _groups(place, 2, provider, bits, block) or _groups(place, 5, provider, bits, block)
    return None


def _groups(place: Place, index: int, provider: str, bits: int, block: int) -> str | None:
    """Codes are input `index`, their scales the next one: a scale for every block of a row, and none over."""
    codes, scales = place.weight(index), place.weight(index + 1)
    if codes is None or scales is None or len(codes[1]) != 3:
        return None
    columns = codes[1][2] * 8 // bits
    if provider == WEBGPU and columns % block:
        return f"rows of {columns}, which blocks of {block} do not divide, as WebGPU needs"
    if len(scales[1]) != 3 or scales[1][2] != -(-columns // block):
        return f"scales {list(scales[1])} for codes {list(codes[1])} of {bits} bits in blocks of {block}"
    return None


def _in_rows(place: Place, bits: int) -> bool:
    """Whether the first codes are surely [E, N, K bits / 8] and not CUDA's [E, K, N bits / 8]; biases are [E, N]."""
    codes, bias = place.weight(2), place.weight(4)
    if codes is None or bias is None or len(codes[1]) != 3 or len(bias[1]) != 2:
        return False
    return codes[1][1] == bias[1][1] != codes[1][2] * 8 // bits


def _matrix(place: Place, provider: str) -> str | None:
    """MatMulNBits: input 1 holds the codes [N, K / block, block bits / 8]."""
    a, where = place.attributes, SHORT.get(provider, provider)
    bits, block, k, n = a.get("bits", 4), a.get("block_size", 32), a.get("K", 0), a.get("N", 0)
    if a.get("weight_prepacked", 0) and provider != CUDA:
        return f"weights in CUDA's order (weight_prepacked={a['weight_prepacked']}), which {where} takes for rows"
    if bits not in _BITS.get(provider, (2, 4, 8)):
        return f"{bits}-bit weights, which {where} does not compute"
    if block < 16 or block & (block - 1):
        return f"blocks of {block}; powers of two from 16 on are what it takes"
    codes = place.weight(1)
    expected = (n, -(-k // block), block * bits // 8)
    if codes and codes[1] != expected:
        return f"codes {list(codes[1])}, not {list(expected)} as K={k}, N={n}, {bits} bits in blocks of {block} ask for"
    return None


def _attention(place: Place, provider: str) -> str | None:
    """GroupQueryAttention: inputs 3 and 4 are the cache [batch, kv heads, past, head size]."""
    a = place.attributes
    heads, kv_heads = a.get("num_heads", 0), a.get("kv_num_heads", 0)
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        return f"{heads} heads of queries for {kv_heads} of keys"
    if a.get("local_window_size", -1) == 0:
        return "local_window_size=0, a window without a single key; -1 is none"
    if provider == WEBGPU and a.get("sliding_window_cache", 0):
        return "sliding_window_cache, which WebGPU does not keep"
    root = next(scope for scope in place.scope.around() if scope.outer is None)
    size = (root.shapes.get(place.node.input[3], ()) if place.has(3) else ())[-1:]
    step = 16 if a.get("do_rotary", 0) else 8
    if size and size[0] % step:
        return f"heads of {size[0]}; {'with rotation ' if step == 16 else ''}it takes multiples of {step}"
    return None


def _product(place: Place, provider: str) -> str | None:
    """A dequantized weight of an outer graph, multiplied in a branch: the optimizer looks for it in the branch."""
    scope = place.scope
    second = scope.made.get(place.node.input[1]) if place.has(1) else None
    if scope.outer is None or second is None or second.op_type != "DequantizeLinear":
        return None
    name = second.input[0]
    if scope.weight(name) is not None and name not in scope.weights:
        return f"DequantizeLinear of {name[:48]!r}, a weight of the outer graph, multiplied in an inner one"
    return None


_RULES: Mapping[tuple[str, str], Callable[[Place, str], str | None]] = {
    (MICROSOFT, "QMoE"): _experts,
    (MICROSOFT, "MoE"): lambda place, provider: _swiglu(place, provider) or _chosen(place),
    (MICROSOFT, "MatMulNBits"): _matrix,
    (MICROSOFT, "GroupQueryAttention"): _attention,
    ("", "MatMul"): _product,
}
