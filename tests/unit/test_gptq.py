"""Calibrated rounding of one matrix: against a plain loop, against numpy, and at its edges."""

import numpy as np
import pytest
import torch

from exporter.errors import ExporterError
from exporter.numerics import decode
from exporter.quantize import gptq as fast
from exporter.quantize.grids import grid_for
from exporter.quantize.hessian import Moments
from exporter.quantize.solve import Problem, naming
from exporter.types import Scheme
from exporter.types.recipe import GptqSpec
from tests import plain_gptq as plain

SCHEMES = {
    "int4 absmax": Scheme.parse("int4-g32", "absmax"),
    "int4 mse": Scheme.parse("int4-g32", "mse"),
    "int4 signed": Scheme.parse("int4-g32", "signed-mse"),
    "int4 signed g64": Scheme.parse("int4-g64", "signed-mse"),
    "int8": Scheme.parse("int8-g32", "absmax"),
    "mxfp4 mse": Scheme.parse("mxfp4", "mse"),
    "mxfp4 floor": Scheme.parse("mxfp4", "floor"),
}


@pytest.fixture(autouse=True)
def one_thread():
    with fast.one_thread():
        yield


def inputs(k, tokens=None, seed=0):
    """Correlated inputs [n, K] of very different sizes, as a model's are."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(k, k)) / np.sqrt(k) + np.eye(k)
    return (rng.normal(size=(tokens or 4 * k, k)) @ mixing * rng.lognormal(0, 0.7, k)).astype(np.float32)


def matrix(k, rows=16, seed=0):
    """Weights [N, K]."""
    rng = np.random.default_rng(1000 + seed)
    return (rng.normal(size=(rows, k)) * rng.lognormal(-3, 0.3, (rows, 1))).astype(np.float32)


def moments(x, released=None):
    m = Moments(x.shape[1], "cpu")
    m.add(torch.from_numpy(x), torch.from_numpy(x if released is None else released))
    return m


def batch(*matrices):
    """[N, K] each -> [B, K, N]."""
    return torch.stack([torch.from_numpy(m).T for m in matrices]).contiguous()


def rounded(w, x, scheme, damp=0.01):
    """levels [N, K], scales [N, K / group] and values [N, K] of the fast loop."""
    found = fast.gptq(batch(w), fast.factor(moments(x).hessian[None], damp), grid_for(scheme))
    return tuple(t[0].T.double().numpy() for t in (found.levels, found.scales, found.values()))


# One block of columns, less, one and a rest that is a group, two with a border inside and outside.
SIZES = [("int4 signed", k) for k in (32, 64, 256, 288, 320)] + [("int4 signed g64", k) for k in (64, 320)]
CASES = [*SIZES, *((name, 96) for name in SCHEMES if "g64" not in name)]


@pytest.mark.parametrize(("name", "k"), CASES)
def test_agrees_with_the_plain_loop(name, k):
    """The same levels and scales as one row, one column at a time in float64.

    In float32 a number halfway between two levels may fall to the other side, and all that follows in that
    row is rounded for another error: such a row is as good but not equal. One of the sixteen is allowed.
    """
    scheme, w, x = SCHEMES[name], matrix(k), inputs(k)
    h = x.T.astype(np.float64) @ x
    levels, scales, values = rounded(w, x, scheme)
    want_levels, want_scales = plain.plain_gptq(w, h, scheme, 0.01)
    same = (levels == want_levels).all(axis=1) & (scales == want_scales).all(axis=1)
    assert same.mean() >= 15 / 16
    want = want_levels * np.repeat(want_scales, scheme.group, axis=1)
    assert plain.objective(w, values, h) == pytest.approx(plain.objective(w, want, h), rel=0.01)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("k", [64, 320])
def test_what_is_lost_is_the_objective(name, k):
    """The sum of squares that the loop keeps is |(W - Q) X|^2 of each output, damping included."""
    w, x = matrix(k), inputs(k)
    found = fast.gptq(batch(w), fast.factor(moments(x).hessian[None], 0.01), grid_for(SCHEMES[name]))
    h, values = plain.damped(x.T.astype(np.float64) @ x, 0.01), found.values()[0].T.numpy()
    want = [plain.objective(w[i : i + 1], values[i : i + 1], h) for i in range(len(w))]
    np.testing.assert_allclose(found.lost[0], want, rtol=1e-3)


@pytest.mark.parametrize("name", ["int4 signed", "mxfp4 mse"])
def test_a_batch_is_its_matrices_one_by_one(name):
    scheme, ws, xs = SCHEMES[name], [matrix(96, seed=s) for s in range(3)], [inputs(96, seed=s) for s in range(3)]
    f = fast.factor(torch.stack([moments(x).hessian for x in xs]), 0.01)
    found = fast.gptq(batch(*ws), f, grid_for(scheme))
    for i, (w, x) in enumerate(zip(ws, xs, strict=True)):
        levels, scales, _ = rounded(w, x, scheme)
        assert (found.levels[i].T.numpy() == levels).all(axis=1).mean() >= 15 / 16
        assert (found.scales[i].T.numpy() == scales).all(axis=1).mean() >= 15 / 16


@pytest.mark.parametrize("name", ["int4 signed", "int4 absmax", "mxfp4 mse"])
def test_errors_are_made_good(name):
    """Better than rounding to nearest on the same grid by a wide margin: that is what the Hessian is for."""
    scheme, w, x = SCHEMES[name], matrix(96), inputs(96)
    h, nothing = moments(x).hessian[None], torch.eye(96)[None]
    nearest = fast.gptq(batch(w), fast.factor(nothing, 0.01), grid_for(scheme)).values()[0].T.numpy()
    lost = plain.objective(w, nearest, h[0].numpy())
    assert plain.objective(w, rounded(w, x, scheme)[2], h[0].numpy()) < 0.7 * lost


# The factor


def test_the_factor_is_of_the_damped_inverse():
    h = moments(inputs(64)).hessian
    f = fast.factor(h[None], 0.02)
    want = plain.damped(h.double().numpy(), 0.02)
    assert f.damp == 0.02
    upper = f.upper[0].double().numpy()
    assert np.array_equal(upper, np.triu(upper))
    np.testing.assert_allclose(upper.T @ upper @ want, np.eye(64), atol=1e-3)


def test_dead_inputs_are_merely_rounded():
    """An input that is always zero takes no part: its weights go to the nearest level and no error goes to them."""
    w, x, dead = matrix(64), inputs(64), [0, 13, 31, 63]
    x[:, dead] = 0
    scheme = SCHEMES["int4 signed"]
    levels, scales, values = rounded(w, x, scheme)
    want_levels, _ = plain.plain_gptq(w, x.T.astype(np.float64) @ x, scheme, 0.01)
    assert (levels == want_levels).all(axis=1).mean() >= 15 / 16
    scale = np.repeat(scales, 32, axis=1)
    lowest, highest = np.minimum(-8 * scale, 7 * scale), np.maximum(-8 * scale, 7 * scale)
    inside = (w >= lowest) & (w <= highest)
    off = np.abs(values - w) <= np.abs(scale) * 0.5 + 1e-6
    assert off[:, dead][inside[:, dead]].all()
    assert inside[:, dead].mean() > 0.9


@pytest.mark.parametrize("name", ["int4 signed", "mxfp4 mse"])
def test_inputs_of_nothing_leave_rounding_to_nearest(name):
    """An expert that only ever sees zeros: nothing to make good, every number to its own nearest level."""
    w = matrix(64)
    problem = Problem([moments(np.zeros((100, 64), np.float32))], [0], GptqSpec())
    [[(q, facts)]] = problem.solve(["w"], SCHEMES[name], [[w]], "cpu")
    levels, scales = plain.plain_gptq(w, np.zeros((64, 64)), SCHEMES[name], 0.01)
    assert np.array_equal(decode.values(q), levels * np.repeat(scales, 32, axis=1))
    assert (facts.damp, facts.error) == (0.01, 0.0)


def test_damp_is_raised_where_the_hessian_does_not_factor():
    one = np.random.default_rng(0).lognormal(0, 1, 64).astype(np.float32)
    found = Problem([moments(np.tile(one, (500, 1)))], [0], GptqSpec(damp=1e-9))
    assert 1e-6 < found.factor.damp < 1e-2
    [[(_, facts)]] = found.solve(["w"], SCHEMES["int4 signed"], [[matrix(64)]], "cpu")
    assert facts.damp == found.factor.damp
    assert 0 < facts.error < 0.05


def test_a_hessian_that_never_factors_is_said():
    h = torch.eye(32)
    h[3, 4] = h[4, 3] = 1000.0  # no damping makes this positive
    with pytest.raises(ExporterError, match="does not factor") as e:
        fast.factor(h[None], 0.01)
    assert "--calibration" in e.value.hint


# Drift


def test_moments_are_sums_over_tokens():
    x, released = inputs(32, 100), inputs(32, 100, seed=5)
    m = Moments(32, "cpu")
    for part in (slice(0, 1), slice(1, 70), slice(70, 100)):
        m.add(torch.from_numpy(x[part]), torch.from_numpy(released[part]))
    assert m.tokens == 100
    np.testing.assert_allclose(m.hessian, x.T @ x, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(m.drift, x.T @ (released - x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("ridge", [1e-3, 0.5])
def test_the_correction_is_least_squares(ridge):
    """W + M W is what numpy finds to give, from these inputs, the released outputs; the ridge holds it to W."""
    x, w = inputs(48, 300), matrix(48).astype(np.float64).T  # [K, N]
    released = x + 0.3 * inputs(48, 300, seed=9)
    m = moments(x, released)
    found = fast.correction(m.hessian[None], m.drift[None], torch.tensor([[ridge]]))[0].double().numpy()
    strength = np.sqrt(ridge * np.square(x.astype(np.float64)).sum(0).mean()) * np.eye(48)
    want, *_ = np.linalg.lstsq(np.vstack([x, strength]), np.vstack([released @ w, strength @ w]), rcond=None)
    np.testing.assert_allclose(w + found @ w, want, atol=1e-4 * np.abs(want).max())


def test_drifted_inputs_still_give_the_released_outputs():
    """The whole of it: outputs from inputs that drifted are nearer to the released ones than without correction."""
    x, w = inputs(64, 4000), matrix(64)
    mixing = np.random.default_rng(5).normal(size=(64, 64)) * 0.02
    released = (x + x @ mixing).astype(np.float32)

    def lost(m):
        [[(q, _)]] = Problem([m], [0], GptqSpec()).solve(["w"], SCHEMES["int8"], [[w]], "cpu")
        return np.square(released @ w.T - x @ decode.values(q).T).sum()

    assert lost(moments(x, released)) < 0.2 * lost(moments(x))


def test_few_tokens_are_believed_less():
    """The ridge is 2 K / tokens of the mean diagonal, and each matrix of a batch has its own."""
    x = np.random.default_rng(0).normal(size=(8000, 32)).astype(np.float32)  # H is as good as n times one
    many, few = moments(x, 1.1 * x), moments(x, 1.1 * x)
    few.tokens = 64
    trust = Problem([many, few], [0, 0], GptqSpec()).correction.diagonal(dim1=1, dim2=2).mean(1)
    assert trust.tolist() == pytest.approx([0.1 / (1 + 0.01), 0.1 / (1 + 1)], rel=0.01)


# What is stored


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_stored_is_what_was_chosen(name):
    """Codes and scales decode to level * scale, to the bit: scales were of their stored type before any code."""
    scheme, w, x = SCHEMES[name], matrix(192), inputs(192)
    grid, f = grid_for(scheme), fast.factor(moments(x).hessian[None], 0.01)
    solved = fast.gptq(batch(w), f, grid)
    q = grid.pack("w", solved.levels[0], solved.scales[0])
    assert q.shape == (16, 192)
    assert np.array_equal(decode.values(q), solved.values()[0].T.numpy())
    if scheme.kind == "int":
        assert np.array_equal(q.scales.astype(np.float32), solved.scales[0].T.numpy())
        codes = decode.codes(q)
        assert (codes.min(), codes.max()) == (scheme.scale_rule == "absmax", 2**scheme.bits - 1)


@pytest.mark.parametrize(("name", "negative"), [("int4 signed", True), ("int4 mse", False), ("int4 absmax", False)])
def test_only_signed_rules_give_negative_scales(name, negative):
    scheme, w, x = SCHEMES[name], matrix(96, rows=64), inputs(96)
    [[(q, _)]] = Problem([moments(x)], [0], GptqSpec()).solve(["w"], scheme, [[w]], "cpu")
    assert bool((q.scales < 0).any()) is negative
    assert (q.scales != 0).all()


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("size", [0.0, 1e-9])
def test_weights_of_nothing(name, size):
    """Zeros, and what float16 scales cannot tell from zeros, beside a row that is neither."""
    w, x = matrix(64), inputs(64)
    w[:15] *= size / np.abs(w).max()
    [[(q, facts)]] = Problem([moments(x)], [0], GptqSpec()).solve(["w"], SCHEMES[name], [[w]], "cpu")
    values = decode.values(q)
    assert np.abs(values[:15]).max() <= size
    assert 0 < facts.error < 0.05  # of the last row


def test_released_mxfp4_in_floats_comes_back_as_it_was():
    """Numbers on the grid are moved, whatever calibration would make of them, and the facts say so."""
    x, w = inputs(64), matrix(64)
    scheme = SCHEMES["mxfp4 floor"]
    [[(q, _)]] = Problem([moments(x)], [0], GptqSpec()).solve(["w"], scheme, [[w]], "cpu")
    on_grid, off = decode.values(q), decode.values(q)
    off[5, np.abs(off[5]).argmax()] *= 1.01  # one number of one block
    problem = Problem([moments(x, 1.1 * x)], [7], GptqSpec())
    [[(again, facts)], [(changed, lossy)]] = problem.solve(["a", "b"], scheme, [[on_grid], [off]], "cpu")
    assert np.array_equal(decode.values(again), on_grid)
    assert (facts.error, facts.tokens, facts.added, facts.damp) == (0.0, 256, 7, 0.0)
    assert lossy.error > 0
    assert not np.array_equal(decode.values(changed), on_grid)


def test_matrices_that_share_their_inputs_are_told_apart():
    """Two names and two experts at once: each result is the one of its own matrix."""
    xs = [inputs(64), inputs(64, seed=1)]
    ws = [[matrix(64, rows, seed) for seed in (10 * rows, 10 * rows + 1)] for rows in (16, 24)]
    problem = Problem([moments(x) for x in xs], [0, 0], GptqSpec())
    found = problem.solve(["a", "b"], SCHEMES["int4 signed"], ws, "cpu")
    for name, matrices, results in zip("ab", ws, found, strict=True):
        for x, w, (q, facts) in zip(xs, matrices, results, strict=True):
            assert (q.name, q.shape) == (name, w.shape)
            off = w - decode.values(q)
            energy = (np.square(w) * np.square(x).sum(0)).sum()
            lost = plain.objective(w, decode.values(q), plain.damped(x.T @ x, 0.01))
            assert facts.error == pytest.approx(lost / energy, rel=0.01)
            assert np.square(off).sum() < 0.05 * np.square(w).sum()


# What cannot be


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_inputs_that_are_not_finite_are_said(bad):
    x = inputs(64)
    x[3, 5] = bad
    with pytest.raises(ExporterError, match="not finite") as e, naming("model.w"):
        Problem([moments(x)], [0], GptqSpec())
    assert e.value.message.startswith("model.w: ")
    assert "exporter doctor" in e.value.hint


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("bad", [np.nan, -np.inf, 3e38])
def test_numbers_that_are_not_finite_are_said(name, bad):
    """In the weights of the second of two matrices, or in the released model's inputs."""
    good, w, x = matrix(64), matrix(64), inputs(64)
    w[3, 5] = bad
    released = x.copy()
    released[3, 5] = bad
    with pytest.raises(ExporterError, match="not finite") as e:
        Problem([moments(x)], [0], GptqSpec()).solve(["model.v", "model.w"], SCHEMES[name], [[good], [w]], "cpu")
    assert e.value.message.startswith("model.w: ")
    with pytest.raises(ExporterError, match="not finite"), naming("model.w"):
        Problem([moments(x, released)], [0], GptqSpec()).solve(["model.w"], SCHEMES[name], [[good]], "cpu")


def test_a_scale_beyond_float16_is_said():
    w = matrix(64)
    w[3, 5] = 1e7
    problem = Problem([moments(inputs(64))], [0], GptqSpec())
    with pytest.raises(ExporterError, match=r"model\.w: a scale is beyond float16"):
        problem.solve(["model.w"], SCHEMES["int4 signed"], [[w]], "cpu")
    [[(q, _)]] = problem.solve(["model.w"], SCHEMES["mxfp4 mse"], [[w]], "cpu")
    assert decode.values(q)[3, 5] == pytest.approx(1e7, rel=0.2)
