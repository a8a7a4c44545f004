"""Every format gives back exactly the numbers it was given, for every scheme it says it holds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.errors import Refused
from exporter.formats import all_formats, get_format
from exporter.numerics import decode
from exporter.types import QTensor, Scheme, TensorSpec
from exporter.types.recipe import Step

# gptq's second family of targets cuts gate and up rows apart, and onnx and tensorrt hold FP4 for one: formats of
# their own.
FORMATS = [
    *all_formats().values(),
    get_format("gptq").for_target("by-name"),
    get_format("onnx").for_target("cuda"),
    get_format("onnx").for_target("webgpu"),
    get_format("tensorrt").for_target("sm120"),
]
CASES = [(f, s) for f in FORMATS for s in f.schemes()]
SHAPES = [(3, 16, 64), (8, 192), (1, 8, 128), (2, 24, 2880)]


def random_tensor(scheme: Scheme, shape: tuple[int, ...], seed: int, positive: bool = False) -> QTensor:
    """Any bits at all: every code, every finite scale; or every `positive` one, and zero of a group of zeros."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (*shape[:-1], scheme.data_bytes(shape[-1])), dtype=np.uint8)
    if scheme.kind == "float":
        return QTensor("t", scheme, data)
    lead = (*shape[:-1], shape[-1] // scheme.group)
    if scheme.scale == "e8m0":
        return QTensor("t", scheme, data, rng.integers(0, 255, lead, dtype=np.uint8))
    scales = rng.normal(0, 1, lead).astype(np.float16)
    if positive:
        scales = np.abs(scales)
        scales[..., -1] = 0
        data[..., -scheme.group :] = scheme.zero
    return QTensor("t", scheme, data, scales)


def wants_positive(fmt, scheme: Scheme) -> bool:
    return fmt.name == "tensorrt" and scheme.kind == "int" and scheme.bits == 8


def step_of(scheme: Scheme, shape: tuple[int, ...]) -> Step:
    name = "model.layers.0.mlp.experts.gate_proj.weight" if len(shape) == 3 else "lm_head.weight"
    role = "expert" if len(shape) == 3 else "head"
    return Step(TensorSpec(name, shape, role), "rtn", scheme, scheme)


@pytest.mark.parametrize(("fmt", "name"), CASES, ids=lambda c: c if isinstance(c, str) else c.name)
@settings(deadline=None, max_examples=15)
@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 2**32))
def test_unpack_returns_what_pack_was_given(fmt, name, shape, seed):
    scheme = Scheme.parse(name)
    if fmt.name in ("onnx", "mxfp4") and scheme.kind != "int":
        # FP4 for experts only; no floats for experts on the web and in the released layout.
        shape = SHAPES[0] if scheme.kind == "e2m1" else SHAPES[1]
    q, step = random_tensor(scheme, shape, seed, wants_positive(fmt, scheme)), step_of(scheme, shape)
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
    q, step = random_tensor(scheme, shape, 1, wants_positive(fmt, scheme)), step_of(scheme, shape)
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
        ("mxfp4", "bf16", (2, 8, 64), "experts in MXFP4 only"),
        ("mxfp4", "mxfp4", (8, 64), "MXFP4 for experts only"),
        ("mxfp4", "f16", (8, 64), "take BF16 here"),
        ("onnx", "int4-g32-asym", (8, 64), "zero points"),
        ("onnx", "int4-g48", (2, 8, 96), "powers of two"),
        ("onnx", "mxfp4", (2, 8, 64), "only CUDA"),
        ("onnx", "mxfp4", (8, 64), "only by FP4 experts"),
        ("tensorrt", "int4-g32-asym", (8, 64), "zero points"),
        ("tensorrt", "mxfp4", (2, 8, 64), "FP4 begins with SM120; recipe exact-bf16 holds the same numbers as INT8"),
        ("tensorrt", "mxfp4", (8, 64), "FP4 begins with SM120; int8-g32 is near"),
        ("tensorrt", "int4-g48", (2, 8, 64), "which 48 does not divide"),
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


# TensorRT: FP4 as it was released; an INT8 scale is positive


@pytest.fixture(scope="module")
def blackwell():
    return get_format("tensorrt").for_target("sm120")


def test_tensorrt_takes_fp4_as_it_was_released(blackwell):
    scheme, shape = Scheme.parse("mxfp4"), (3, 16, 64)
    q = random_tensor(scheme, shape, 7)
    codes, scales = blackwell.pack(step_of(scheme, shape), q)
    assert codes.tobytes() == q.data.tobytes()
    assert scales.tobytes() == q.scales.tobytes()


@pytest.mark.parametrize("bits", [4, 8])
def test_tensorrt_takes_codes_with_their_sign(blackwell, bits):
    """Two's complement, low nibble first: ONNX's INT4 and INT8."""
    scheme = Scheme.parse(f"int{bits}-g32")
    codes = (np.arange(64) * (4 if bits == 8 else 1) % (1 << bits)).astype(np.uint8).reshape(2, 32)
    data = codes if bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4
    q = QTensor("t", scheme, data, np.ones((2, 1), np.float16))
    packed, _ = blackwell.pack(step_of(scheme, (2, 32)), q)
    signed = packed.view(np.int8).astype(int)
    if bits == 4:
        low, high = (packed & 15).astype(int), (packed >> 4).astype(int)
        signed = np.stack((low, high), axis=-1).reshape(2, 32)
        signed -= (signed >= 8) * 16
    assert np.array_equal(signed, codes.astype(int) - scheme.zero)


def int8_group(scale: float, codes: int) -> QTensor:
    """Two groups of 32; the first of `codes` under `scale`."""
    data = np.full((1, 64), 200, np.uint8)
    data[:, :32] = codes
    return QTensor("t", Scheme.parse("int8-g32"), data, np.array([[scale, 0.5]], np.float16))


def test_tensorrt_keeps_zeros_under_scale_zero(blackwell):
    q = int8_group(0, 128)
    step = step_of(q.scheme, (1, 64))
    packed = blackwell.pack(step, q)
    assert packed[1].view(np.float16).tolist() == [[2.0**-24, 0.5]]
    assert blackwell.unpack(step, packed).leaf_digest() == q.leaf_digest()


@pytest.mark.parametrize(
    ("scale", "codes"),
    [(0, 129), (-0.5, 130), (-0.5, 128), (-(2.0**-24), 128), (2.0**-24, 128)],
    ids=["zero", "negative", "negative, of zeros", "least negative", "what stands for zero"],
)
def test_tensorrt_refuses_an_int8_scale_that_is_not_positive(blackwell, scale, codes):
    q = int8_group(scale, codes)
    with pytest.raises(Refused, match="t has an INT8 scale that is not positive, which TensorRT does not take"):
        blackwell.pack(Step(TensorSpec("t", (1, 64), "head"), "rtn", q.scheme, q.scheme), q)


def test_tensorrt_keeps_the_least_scale_of_other_codes(blackwell):
    q = int8_group(2.0**-24, 129)
    step = step_of(q.scheme, (1, 64))
    assert blackwell.unpack(step, blackwell.pack(step, q)).leaf_digest() == q.leaf_digest()


def test_tensorrt_takes_signed_int4_scales(blackwell):
    scheme, spec = Scheme.parse("int4-g32", "signed-mse"), TensorSpec("t", (2, 64), "head")
    q = QTensor("t", scheme, np.full((2, 32), 0x71, np.uint8), np.array([[-1, 0], [0.5, -0.25]], np.float16))
    step = Step(spec, "rtn", scheme, scheme)
    assert blackwell.refuse(scheme, spec) is None
    assert blackwell.unpack(step, blackwell.pack(step, q)).leaf_digest() == q.leaf_digest()
    assert "only positive ones for INT8" in blackwell.refuse(Scheme.parse("int8-g32", "signed-mse"), spec)


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
