"""Number formats against slow, obvious versions."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from exporter.numerics import decode, e2m1, intq
from exporter.numerics.bits import pack_nibbles, unpack_nibbles
from exporter.numerics.floats import bf16_to_f32, f32_is_bf16, f32_to_bf16
from exporter.types import QTensor, Scheme

finite = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100)
blocks = hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.just(64)), elements=finite)
codes4 = hnp.arrays(
    np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 20).map(lambda n: 2 * n)), elements=st.integers(0, 15)
)


@given(codes4)
def test_nibbles_return(codes):
    packed = pack_nibbles(codes)
    assert packed.shape[-1] * 2 == codes.shape[-1]
    assert np.array_equal(unpack_nibbles(packed), codes)


def test_nibble_order_is_even_low():
    assert pack_nibbles(np.array([1, 2, 3, 4], np.uint8)).tolist() == [0x21, 0x43]


@given(hnp.arrays(np.uint16, 40))
def test_bf16_widens_exactly_and_returns(bits):
    wide = bf16_to_f32(bits)
    assert f32_is_bf16(wide)
    back = f32_to_bf16(wide)
    nan = np.isnan(wide)
    assert np.array_equal(back[~nan], bits[~nan])
    assert np.isnan(bf16_to_f32(back)[nan]).all()


@settings(deadline=None)
@given(hnp.arrays(np.float32, 20, elements=finite))
def test_bf16_rounds_to_the_nearest_even(values):
    torch = pytest.importorskip("torch")
    want = torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(f32_to_bf16(values), want)


def slow_code(value: float, exponent: int) -> int:
    """The nearest e2m1 code, ties to even, tried one by one in exact arithmetic."""
    magnitude = abs(value) / 2.0**exponent
    errors = [(abs(magnitude - float(level)), code % 2, code) for code, level in enumerate(e2m1.MAGNITUDES)]
    best = min(errors)[2] if magnitude <= 6 else 7
    return best | (8 if math.copysign(1, value) < 0 else 0)


@settings(deadline=None, max_examples=60)
@given(blocks, st.sampled_from(["floor", "ceil6", "round175"]))
def test_mxfp4_codes_are_the_nearest(values, rule):
    data, scales = e2m1.quantize(values, rule)
    codes = unpack_nibbles(data)
    for row in range(values.shape[0]):
        for k in range(values.shape[1]):
            exponent = int(scales[row, k // 32]) - 127
            assert codes[row, k] == slow_code(float(values[row, k]), exponent)


@settings(deadline=None)
@given(blocks)
def test_mse_is_never_worse_than_any_other_rule(values):
    def error(rule):
        back = e2m1.dequantize(*e2m1.quantize(values, rule)).astype(np.float64)
        return np.square(back - values).reshape(-1, 32).sum(-1)

    found = error("mse")
    for rule in ("floor", "ceil6", "round175"):
        # float32 sums decide the search; they may differ from the exact ones in the last digits.
        assert (found <= error(rule) * (1 + 1e-5) + 1e-70).all()


@given(
    hnp.arrays(np.uint8, (2, 32), elements=st.integers(0, 255)),
    hnp.arrays(np.uint8, (2, 2), elements=st.integers(1, 250)),
)
def test_dequantized_blocks_are_on_the_grid(data, scales):
    values = e2m1.dequantize(data, scales)
    packed, exact = e2m1.repack_exact(values)
    assert exact.all()
    back = e2m1.dequantize(*packed)
    assert np.array_equal(back.view(np.uint32), values.view(np.uint32))  # -0.0 too


@given(blocks)
def test_a_block_is_exact_only_if_every_value_returns(values):
    packed, exact = e2m1.repack_exact(values)
    same = (e2m1.dequantize(*packed) == values).reshape(-1, 2, 32).all(-1)
    assert np.array_equal(exact, same)


def test_one_value_off_the_grid_is_seen():
    values = e2m1.dequantize(np.full((1, 16), 0x52, np.uint8), np.full((1, 1), 120, np.uint8))
    values[0, 7] = np.nextafter(values[0, 7], np.float32(9))
    assert not e2m1.repack_exact(values)[1].any()


@pytest.mark.parametrize("scale", [0, 1, 2, 127, 253, 254])
def test_extreme_scales_decode_exactly(scale):
    level = np.arange(16, dtype=np.uint8)
    data = pack_nibbles(np.concatenate([level, level])[None])
    found = e2m1.dequantize(data, np.array([[scale]], np.uint8))[0, :16]
    for level, value in zip(e2m1.LEVELS, found.tolist(), strict=True):
        want = float(level) * 2.0 ** (scale - 127)
        assert value == (want if abs(want) <= float(np.finfo(np.float32).max) else math.copysign(math.inf, want))


def test_scale_255_is_not_a_number():
    assert np.isnan(e2m1.dequantize(np.zeros((1, 16), np.uint8), np.array([[255]], np.uint8))).all()


def slow_int(row: np.ndarray, scheme: Scheme) -> tuple[list[int], float]:
    """One group, step by step: scale to f16 first, then codes against the rounded scale."""
    top = 2 ** (scheme.bits - 1) - 1
    scale = np.float16(np.float32(np.abs(row).max()) / np.float32(top))
    if scale == 0:
        return [scheme.zero] * len(row), 0.0
    codes = [int(np.clip(np.rint(np.float32(v) / np.float32(scale)), -top, top)) + scheme.zero for v in row]
    return codes, float(scale)


@settings(deadline=None)
@given(
    hnp.arrays(np.float32, (2, 64), elements=st.floats(-1e4, 1e4, width=32)),
    st.sampled_from(["int8-g32", "int4-g32", "int8-g64", "int4-g64"]),
)
def test_integers_match_the_slow_version(values, name):
    scheme = Scheme.parse(name)
    data, scales = intq.quantize(values, scheme)
    q = QTensor("t", scheme, data, scales)
    codes = decode.codes(q).reshape(-1, scheme.group)
    for group, row in enumerate(values.reshape(-1, scheme.group)):
        want, scale = slow_int(row, scheme)
        assert float(scales.reshape(-1)[group]) == scale
        assert codes[group].tolist() == want
    # Within half a step, but for what f16 rounding of the scale cuts off at the ends.
    step = np.repeat(scales.astype(np.float32), scheme.group, axis=-1)
    assert (np.abs(decode.values(q) - values) <= step * 0.5 + np.abs(values) * 2**-10 + 6e-5).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_is_refused(bad):
    values = np.zeros((1, 32), np.float32)
    values[0, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        intq.quantize(values, Scheme.parse("int8-g32"))
    with pytest.raises(ValueError, match="NaN or infinity"):
        e2m1.quantize(values)


def test_a_scale_beyond_float16_is_refused():
    with pytest.raises(ValueError, match="beyond float16"):
        intq.quantize(np.full((1, 32), 1e9, np.float32), Scheme.parse("int8-g32"))
