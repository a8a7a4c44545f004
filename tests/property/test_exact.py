"""MXFP4 as power-of-two integers: every number equal, or refused. And the tokens that top an expert up."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from exporter.errors import BadCheckpoint, Refused
from exporter.numerics import decode, intq
from exporter.quantize.exact import from_floats, from_mxfp4
from exporter.quantize.hessian import topped_up
from exporter.types import QTensor, Scheme

INT8, INT8_G64, MXFP4 = (Scheme.parse(n) for n in ("int8-g32", "int8-g64", "mxfp4"))
ALL_CODES = np.tile(np.arange(16, dtype=np.uint8), 2)
# e8m0 exponents whose half, as the scale of twice the FP4 number, is a power of two that float16 holds exactly.
FIRST, LAST = 128 - 24, 128 + 15


def mxfp4(codes, scales):
    """uint8 codes [..., K] and e8m0 scales [..., K / 32] as a QTensor called t."""
    codes = np.asarray(codes, np.uint8)
    return QTensor("t", MXFP4, codes[..., 0::2] | codes[..., 1::2] << 4, np.asarray(scales, np.uint8))


def as_floats(values):
    return QTensor("t", Scheme.parse("f32"), np.ascontiguousarray(values, np.float32).view(np.uint8))


@pytest.mark.parametrize("scale", range(FIRST, LAST + 1))
def test_every_code_under_every_exponent_is_equal(scale):
    q = mxfp4(ALL_CODES[None], [[scale]])
    made = from_mxfp4(q, INT8)
    assert np.array_equal(decode.values(made), decode.values(q))
    assert made.scales.tolist() == [[2.0 ** (scale - 128)]]
    # code - 128 = 2 * fp4, by hand.
    twice = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]
    assert (made.data[0].astype(int) - 128).tolist() == twice * 2


def holds(group):
    """Whether some float16 power of two makes integers of 8 bits of all these numbers: tried."""
    tried = (group.astype(np.float64) / 2.0**e for e in range(-24, 16))
    return any(np.abs(t).max() <= 127 and (t == np.rint(t)).all() for t in tried)


def fill(codes):
    """A 6.0 and a 0.5 in every block: it then uses all that lies between, and its exponent is the only one for it."""
    codes[..., 0::32], codes[..., 1::32] = 7, 1
    return codes


numbers = hnp.arrays(np.uint8, (4, 128), elements=st.integers(0, 15))


@settings(deadline=None)
@given(numbers, hnp.arrays(np.uint8, (4, 4), elements=st.integers(FIRST - 4, LAST + 5)), st.booleans())
def test_all_is_equal_or_refused(codes, scales, whole):
    """Groups of 32: refused only where no integers and no scale could do it, and how many is said."""
    q = mxfp4(fill(codes) if whole else codes, scales)
    want = decode.values(q)
    impossible = sum(not holds(g) for g in want.reshape(-1, 32))
    if impossible:
        with pytest.raises(Refused, match=f"^t: {impossible} groups"):
            from_mxfp4(q, INT8)
    else:
        made = from_mxfp4(q, INT8)
        assert (made.scheme, made.shape) == (INT8, q.shape)
        assert np.array_equal(decode.values(made), want)


@settings(deadline=None)
@given(numbers, st.integers(FIRST - 2, LAST + 2), hnp.arrays(np.uint8, (4, 4), elements=st.integers(0, 4)))
def test_groups_of_two_blocks_are_equal_or_refused(codes, base, apart):
    q = mxfp4(fill(codes), base + apart)
    want = decode.values(q)
    impossible = sum(not holds(g) for g in want.reshape(-1, 64))
    if impossible:
        with pytest.raises(Refused, match=f"^t: {impossible} groups"):
            from_mxfp4(q, INT8_G64)
    else:
        assert np.array_equal(decode.values(from_mxfp4(q, INT8_G64)), want)


@pytest.mark.parametrize("scale", [0, FIRST - 1, LAST + 4, 254])
def test_exponents_out_of_reach_are_refused_by_name(scale):
    codes = np.zeros((2, 64), np.uint8)
    codes[1, 40] = 1  # 0.5: half of the smallest integer one exponent below; 2^18 of the largest above
    scales = np.full((2, 2), 127)
    scales[1, 1] = scale
    codes[1, 41] = 7  # 6.0
    with pytest.raises(Refused, match="t: 1 groups") as e:
        from_mxfp4(mxfp4(codes, scales), INT8)
    assert "mxfp4" in e.value.hint


@pytest.mark.parametrize("scale", [LAST + 1, LAST + 3])
def test_codes_reach_beyond_the_largest_scale(scale):
    """12 * 8 = 96 is still a code: three exponents more than float16 scales have."""
    q = mxfp4(ALL_CODES[None], [[scale]])
    made = from_mxfp4(q, INT8)
    assert np.array_equal(decode.values(made), decode.values(q))
    assert made.scales.tolist() == [[2.0**15]]


@pytest.mark.parametrize(("apart", "held"), [(0, True), (3, True), (4, False), (9, False)])
@pytest.mark.parametrize("larger", [0, 1])
def test_groups_of_64_hold_blocks_three_exponents_apart(apart, held, larger):
    """12 * 2^3 < 128 <= 12 * 2^4, whichever of the two blocks is the larger."""
    scales = np.full((1, 2), 120)
    scales[0, larger] += apart
    q = mxfp4(np.tile(ALL_CODES, 2)[None], scales)
    if held:
        made = from_mxfp4(q, INT8_G64)
        assert np.array_equal(decode.values(made), decode.values(q))
        assert made.scales.tolist() == [[2.0 ** (120 - 128)]]
    else:
        with pytest.raises(Refused):
            from_mxfp4(q, INT8_G64)


@pytest.mark.parametrize("code", [0, 8])
@pytest.mark.parametrize("scale", [0, 120, 254])
def test_blocks_of_zeros_take_any_scale(code, scale):
    """Alone, and beside a block that decides the scale of their group; a scale of zeros is a number still."""
    codes = np.full((1, 64), code, np.uint8)
    alone = from_mxfp4(mxfp4(codes, [[scale, scale]]), INT8_G64)
    assert (alone.data == 128).all()
    assert np.isfinite(alone.scales).all()
    codes[0, 32:] = ALL_CODES
    q = mxfp4(codes, [[scale, 115]])
    beside = from_mxfp4(q, INT8_G64)
    assert np.array_equal(decode.values(beside), decode.values(q))
    assert beside.scales.tolist() == [[2.0 ** (115 - 128)]]


@settings(deadline=None)
@given(
    numbers,
    hnp.arrays(np.uint8, (4, 4), elements=st.integers(116, 121)),
    hnp.arrays(np.bool_, (4, 4)),
    st.sampled_from([INT8, INT8_G64]),
)
def test_floats_on_the_grid_are_moved_and_the_others_rounded(codes, scales, spoiled, scheme):
    """Blocks of a fine-tune: those that were left alone come out equal, and are counted; others as by rounding."""
    values = decode.values(mxfp4(fill(codes), scales))
    blocks = values.reshape(4, 4, 32)
    blocks[spoiled, 2] += np.float32(1e-5)
    groups = values.reshape(-1, scheme.group)
    made = from_floats(as_floats(values), scheme)
    back = decode.values(made.q).reshape(groups.shape)
    rounded = decode.values(QTensor("t", scheme, *intq.quantize(values, scheme))).reshape(groups.shape)
    moved = ~spoiled.reshape(len(groups), -1).any(axis=1) & [holds(g) for g in groups]
    assert (made.exact, made.blocks) == (int(moved.sum()), len(groups))
    assert np.array_equal(back[moved], groups[moved])
    assert np.array_equal(back[~moved], rounded[~moved])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_floats_that_are_not_finite_are_refused_by_name(bad):
    values = np.ones((1, 64), np.float32)
    values[0, 40] = bad
    with pytest.raises(BadCheckpoint, match="t: ") as e:
        from_floats(as_floats(values), INT8)
    assert "exporter doctor" in e.value.hint


# Tokens


@given(st.sets(st.integers(0, 299)), st.integers(1, 300), st.integers(0, 400))
def test_topped_up(routed, total, want):
    """The routed ones, all of them and in order, and exactly as many others as are missing."""
    rows = sorted(r for r in routed if r < total)
    found = topped_up(torch.tensor(rows, dtype=torch.int64), total, want).tolist()
    assert len(found) == max(len(rows), min(want, total))
    assert found == sorted(set(found))
    assert set(rows) <= set(found)
    assert not found or 0 <= found[0] <= found[-1] < total


@given(st.sets(st.integers(0, 299)), st.integers(0, 300))
def test_what_is_added_is_spread_over_the_text(routed, want):
    """Between two neighbours that were added lie about as many of the others everywhere."""
    rows = sorted(routed)
    found = topped_up(torch.tensor(rows, dtype=torch.int64), 300, want).tolist()
    others = [i for i in range(300) if i not in routed]
    places = [others.index(i) for i in found if i not in routed]
    if places:
        even = len(others) / len(places)
        gaps = np.diff([*places, len(others)])
        assert places[0] == 0
        assert gaps.min() >= np.floor(even)
        assert gaps.max() <= np.ceil(even)
