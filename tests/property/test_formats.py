"""Every format gives back exactly the numbers it was given, for every scheme it says it holds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.formats import all_formats, get_format
from exporter.numerics import decode
from exporter.types import QTensor, Scheme, TensorSpec
from exporter.types.recipe import Step

# gptq's second family of targets cuts gate and up rows apart, and onnx's holds FP4 for one: formats of their own.
FORMATS = [
    *all_formats().values(),
    get_format("gptq").for_target("by-name"),
    get_format("onnx").for_target("cuda"),
    get_format("onnx").for_target("webgpu"),
]
CASES = [(f, s) for f in FORMATS for s in f.schemes()]
SHAPES = [(3, 16, 64), (8, 192), (1, 8, 128), (2, 24, 2880)]


def random_tensor(scheme: Scheme, shape: tuple[int, ...], seed: int) -> QTensor:
    """Any bits at all: every code, every finite scale."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (*shape[:-1], scheme.data_bytes(shape[-1])), dtype=np.uint8)
    if scheme.kind == "float":
        return QTensor("t", scheme, data)
    lead = (*shape[:-1], shape[-1] // scheme.group)
    if scheme.scale == "e8m0":
        return QTensor("t", scheme, data, rng.integers(0, 255, lead, dtype=np.uint8))
    return QTensor("t", scheme, data, rng.normal(0, 1, lead).astype(np.float16))


def step_of(scheme: Scheme, shape: tuple[int, ...]) -> Step:
    name = "model.layers.0.mlp.experts.gate_proj.weight" if len(shape) == 3 else "lm_head.weight"
    role = "expert" if len(shape) == 3 else "head"
    return Step(TensorSpec(name, shape, role), "rtn", scheme, scheme)


@pytest.mark.parametrize(("fmt", "name"), CASES, ids=lambda c: c if isinstance(c, str) else c.name)
@settings(deadline=None, max_examples=15)
@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 2**32))
def test_unpack_returns_what_pack_was_given(fmt, name, shape, seed):
    scheme = Scheme.parse(name)
    if fmt.name == "onnx" and scheme.kind != "int":
        # FP4 for experts only; no floats for experts on the web.
        shape = SHAPES[0] if scheme.kind == "e2m1" else SHAPES[1]
    q, step = random_tensor(scheme, shape, seed), step_of(scheme, shape)
    assert fmt.refuse(scheme, step.spec) is None
    packed = fmt.pack(step, q)
    shared = fmt.name == "onnx" and scheme.kind == "e2m1"  # gate and up: half of every byte
    assert sum(a.size for a in packed) <= fmt.target(step).nbytes * (2 if shared else 1)
    back = fmt.unpack(step, packed)
    assert back.leaf_digest() == q.leaf_digest()
    assert back.shape == q.shape
    with np.errstate(over="ignore", invalid="ignore"):
        assert np.array_equal(decode.values(back), decode.values(q), equal_nan=True)


@pytest.mark.parametrize(("fmt", "name"), CASES, ids=lambda c: c if isinstance(c, str) else c.name)
def test_a_tensor_packs_the_same_in_pieces(fmt, name):
    scheme, shape = Scheme.parse(name), (4, 8, 64)
    q, step = random_tensor(scheme, shape, 1), step_of(scheme, shape)
    parts = []
    for i in range(shape[0]):
        scales = None if q.scales is None else q.scales[i : i + 1]
        parts.append(fmt.pack(step, QTensor(q.name, scheme, q.data[i : i + 1], scales)))
    for i, whole in enumerate(fmt.pack(step, q)):
        assert np.array_equal(np.concatenate([p[i].reshape(-1) for p in parts]), whole.reshape(-1))


@pytest.mark.parametrize(
    ("fmt", "name", "shape", "reason"),
    [
        ("gguf", "int4-g32-asym", (4, 64), "zero points"),
        ("gguf", "int8-g48", (4, 96), "groups of 48"),
        ("gptq", "int4-g32-asym", (8, 64), "zero points"),
        ("gptq", "int4-g32", (4, 64), "4 rows"),
        ("gptq", "mxfp4", (2, 8, 64), "compressed-tensors holds MXFP4"),
        ("compressed-tensors", "int8-g32-asym", (8, 64), "zero points"),
        ("onnx", "int4-g32-asym", (8, 64), "zero points"),
        ("onnx", "int4-g48", (2, 8, 96), "powers of two"),
        ("onnx", "mxfp4", (2, 8, 64), "only CUDA"),
        ("onnx", "mxfp4", (8, 64), "only by FP4 experts"),
    ],
)
def test_what_cannot_be_held_is_refused(fmt, name, shape, reason):
    assert reason in get_format(fmt).refuse(Scheme.parse(name), step_of(Scheme.parse(name), shape).spec)


@pytest.mark.parametrize("fmt", ["gptq", "compressed-tensors"])
def test_embeddings_stay_floats(fmt):
    spec = TensorSpec("model.embed_tokens.weight", (8, 64), "embedding")
    assert "embeddings" in get_format(fmt).refuse(Scheme.parse("int8-g32"), spec)
    assert get_format(fmt).refuse(Scheme.parse("bf16"), spec) is None


def experts(gate, up, down="int4-g32"):
    names = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    specs = [TensorSpec(f"model.layers.0.mlp.experts.{n}.weight", (2, 8, 64), "expert", 0) for n in names]
    schemes = map(Scheme.parse, names.values())
    return [Step(spec, "rtn", scheme, scheme) for spec, scheme in zip(specs, schemes, strict=True)]


def test_rows_of_one_stored_matrix_have_one_scheme():
    halves, by_name = get_format("gptq"), get_format("gptq").for_target("by-name")
    assert "int8-g32" in halves.refuse_steps(experts("int4-g32", "int8-g32"))
    assert by_name.refuse_steps(experts("int4-g32", "int8-g32")) is None
    assert halves.refuse_steps(experts("int4-g32", "int4-g32", "int8-g32")) is None
    assert "one scheme" in get_format("compressed-tensors").refuse_steps(experts("int4-g32", "int4-g32", "int8-g32"))


def test_blocks_of_one_group_must_agree():
    fmt, scheme = get_format("gguf"), Scheme.parse("int8-g64")
    step = step_of(scheme, (1, 64))
    packed = fmt.pack(step, random_tensor(scheme, (1, 64), 3))
    packed[0][34] ^= 1  # the scale of the second block of the group
    with pytest.raises(ValueError, match="different scales"):
        fmt.unpack(step, packed)


def test_a_float_that_was_no_bf16_is_seen():
    fmt, scheme = get_format("gguf"), Scheme.parse("bf16")
    step = Step(TensorSpec("model.norm.weight", (8,), "vector"), "keep", scheme, scheme)
    raw = np.full(8, 1.1, np.float32).view(np.uint8)
    with pytest.raises(ValueError, match="not bfloat16"):
        fmt.unpack(step, [raw])
