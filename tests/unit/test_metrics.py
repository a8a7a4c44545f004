"""Divergences against an obvious slow computation, and the texts that they are measured on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.errors import ExporterError, UsageError
from exporter.model.reference import ReferenceLogits
from exporter.validate import metrics, text

TOKENIZER = Path(__file__).parents[1] / "data" / "tiny-gpt-oss" / "tokenizer.json"


def log_softmax(logits: Any) -> Any:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


def keep(logits: Any, tokens: Any, k: int) -> ReferenceLogits:
    """What the reference would keep of these logits [W * T, V]."""
    log_p = log_softmax(logits)
    order = np.argsort(-log_p, axis=1)
    kept = np.take_along_axis(log_p, order[:, :k], axis=1)
    with np.errstate(divide="ignore"):
        tail = np.log(np.exp(np.take_along_axis(log_p, order[:, k:], axis=1)).sum(axis=1))
    following = np.full_like(tokens, -1)
    following[:, :-1] = tokens[:, 1:]
    flat = following.reshape(-1)
    target = np.where(flat < 0, np.nan, log_p[np.arange(len(flat)), flat])
    f32 = np.float32
    return ReferenceLogits(
        tokens, order[:, :k].astype(np.int32), kept.astype(f32), tail.astype(f32), target.astype(f32)
    )


def case(seed: int, vocab: int = 500, shape: tuple[int, int] = (2, 16), noise: float = 0.3) -> tuple[Any, Any, Any]:
    """Logits of a reference and of an artifact near it, float32 [W * T, V], and tokens [W, T]."""
    rng = np.random.default_rng(seed)
    reference = (rng.normal(size=(shape[0] * shape[1], vocab)) * 3).astype(np.float32)
    artifact = (reference + rng.normal(size=reference.shape) * noise).astype(np.float32)
    return reference, artifact, rng.integers(0, vocab, shape)


def true_kl(reference: Any, artifact: Any) -> Any:
    p, q = log_softmax(reference), log_softmax(artifact)
    return (np.exp(p) * (p - q)).sum(axis=1)


def test_kl_is_exact_over_the_whole_vocabulary() -> None:
    reference, artifact, tokens = case(0)
    found = metrics.compare(keep(reference, tokens, 500), 0, artifact)
    np.testing.assert_allclose(found.kl, true_kl(reference, artifact), rtol=1e-6)


def test_equal_logits_have_no_divergence() -> None:
    reference, _, tokens = case(1)
    for k in (500, 20):
        found = metrics.compare(keep(reference, tokens, k), 0, reference + np.float32(2))  # a constant is free
        assert np.abs(found.kl).max() < 1e-12
        assert found.same_top.all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 99), st.floats(0.01, 5))
def test_top_k_with_a_tail_never_exceeds_the_true_kl(seed: int, k: int, noise: float) -> None:
    reference, artifact, tokens = case(seed, vocab=100, shape=(1, 8), noise=noise)
    found = metrics.compare(keep(reference, tokens, k), 0, artifact).kl
    assert (found <= true_kl(reference, artifact) * (1 + 1e-5) + 1e-9).all()
    assert (found >= -1e-12).all()


def test_a_tail_of_small_mass_loses_little() -> None:
    reference, artifact, tokens = case(2, vocab=20000)
    exact = true_kl(reference, artifact).mean()
    kept = keep(reference, tokens, 1024)
    assert float(np.exp(kept.tail_logprob).max()) < 0.3  # random logits: text has far less
    found = metrics.compare(kept, 0, artifact).kl.mean()
    assert exact * 0.7 < found < exact


def test_kl_is_of_the_artifact_from_the_reference_and_not_the_reverse() -> None:
    sure, unsure = np.array([[8.0, 0, 0]], np.float32), np.zeros((1, 3), np.float32)
    tokens = np.array([[0]])
    forward = metrics.compare(keep(sure, tokens, 3), 0, unsure).kl[0]
    back = metrics.compare(keep(unsure, tokens, 3), 0, sure).kl[0]
    assert forward == pytest.approx(np.log(3), abs=0.01)
    assert back > 4


def test_windows_and_rows_are_matched_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, artifact, tokens = case(3)
    kept = keep(reference, tokens, 50)
    whole = metrics.compare(kept, 0, artifact)
    monkeypatch.setattr(metrics, "_CHUNK", 1500)  # three rows at a time
    parts = metrics.Positions.join([metrics.compare(kept, at, artifact[at : at + 8]) for at in range(0, 32, 8)])
    for name in metrics.Positions.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
    shifted = metrics.compare(kept, 1, artifact[:-1])
    assert shifted.kl.mean() > 10 * whole.kl.mean()


def test_the_following_token_is_scored_and_window_ends_are_not() -> None:
    reference, artifact, tokens = case(4)
    found = metrics.compare(keep(reference, tokens, 50), 0, artifact)
    ends = [15, 31]
    assert np.isnan(found.reference[ends]).all()
    assert np.isnan(found.artifact[ends]).all()
    log_q = log_softmax(artifact)
    for n in set(range(32)) - set(ends):
        assert found.artifact[n] == pytest.approx(log_q[n, tokens.reshape(-1)[n + 1]])
    report = metrics.summary(found)
    scored = [n for n in range(32) if n not in ends]
    p, q = found.reference[scored], found.artifact[scored]
    assert report["ppl_ratio"] == pytest.approx(np.exp(-q.mean()) / np.exp(-p.mean()))
    assert report["delta_p_rms"] == pytest.approx(np.sqrt(((np.exp(p) - np.exp(q)) ** 2).mean()))
    assert report["ppl"] == pytest.approx(np.exp(-q.mean()))
    assert report["top1"] == (artifact.argmax(1) == reference.argmax(1)).mean()
    assert report["positions"] == 32


def test_logits_that_are_not_numbers_are_not_measured() -> None:
    reference, artifact, tokens = case(5)
    for bad in (np.nan, np.inf):
        artifact[3, 7] = bad
        report = metrics.summary(metrics.compare(keep(reference, tokens, 50), 0, artifact))
        assert report["kl_mean"] is None
        assert report["kl_p99"] is None
        assert report["kl_ci95"] is None
        json.dumps(report, allow_nan=False)


def test_a_smaller_vocabulary_is_refused() -> None:
    reference, artifact, tokens = case(6)
    with pytest.raises(ExporterError, match="predicts 100 tokens"):
        metrics.compare(keep(reference, tokens, 500), 0, artifact[:, :100])


def test_two_references_compare_as_a_reference_and_logits() -> None:
    reference, other, tokens = case(7)
    direct = metrics.compare(keep(reference, tokens, 500), 0, other)
    found = metrics.between(keep(reference, tokens, 500), keep(other, tokens, 500))
    np.testing.assert_allclose(found.kl, direct.kl, rtol=1e-5, atol=1e-12)
    np.testing.assert_array_equal(found.same_top, direct.same_top)
    np.testing.assert_allclose(found.artifact, direct.artifact, atol=1e-5)
    exact = true_kl(reference, other)
    for k in (5, 50, 400):
        partial = metrics.between(keep(reference, tokens, k), keep(other, tokens, k)).kl
        assert (partial <= exact * (1 + 1e-5)).all()
        assert (partial >= -1e-12).all()
    assert partial.mean() > 0.9 * exact.mean()
    with pytest.raises(ValueError, match="different texts"):
        metrics.between(keep(reference, tokens, 5), keep(other, tokens + 1, 5))


def test_references_without_a_common_token_still_compare() -> None:
    tokens = np.array([[0]])
    a = keep(np.array([[9.0, 8, 0, 0]], np.float32), tokens, 2)
    b = keep(np.array([[0.0, 0, 9, 8]], np.float32), tokens, 2)
    assert metrics.between(a, b).kl[0] == pytest.approx(0, abs=1e-6)  # one outcome on both sides: "any other"
    assert metrics.between(a, b).same_top[0] == 0


def test_the_interval_covers_the_mean_and_is_seeded() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        low, high = metrics.bootstrap_mean(rng.exponential(size=64 * 40 + 5))
        covered += low <= 1 <= high
    assert 85 <= covered <= 99
    values = rng.exponential(size=500)
    assert metrics.bootstrap_mean(values) == metrics.bootstrap_mean(values)
    assert metrics.bootstrap_mean(values, seed=1) != metrics.bootstrap_mean(values)


def test_the_interval_knows_that_neighbours_depend_on_each_other() -> None:
    values = np.repeat(np.random.default_rng(0).normal(size=40), 64)
    low, high = metrics.bootstrap_mean(values)
    assert high - low > 3 * 3.92 * values.std() / np.sqrt(len(values))


# The text


def test_held_out_and_calibration_share_no_file(tmp_path: Path) -> None:
    for i in range(60):
        (tmp_path / f"m{i}.py").write_text(f"x = {i}\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_x.py").write_text("assert True\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    held, rest = text.standard_library("held-out", tmp_path), text.standard_library("calibration", tmp_path)
    assert not set(held.documents) & set(rest.documents)
    assert len(held.documents) + len(rest.documents) == 60
    assert 5 <= len(held.documents) <= 25
    again = text.standard_library("held-out", tmp_path)
    assert again.documents == held.documents
    assert again.sha256 == held.sha256 != rest.sha256
    (tmp_path / "m0.py").write_text("changed\n")
    changed = [text.standard_library(part, tmp_path).sha256 for part in ("held-out", "calibration")]  # type: ignore[arg-type]
    assert changed != [held.sha256, rest.sha256]
    with pytest.raises(ExporterError, match="no Python sources"):
        text.standard_library(root=tmp_path / "test")


def test_windows_take_turns_over_documents() -> None:
    tokenizer = text.load_tokenizer(TOKENIZER)
    sample = text.Text(("alpha beta " * 500, "gamma delta " * 500, "short"), "made up")
    found = text.windows(TOKENIZER, sample, 5, 32)
    ids = [text.encode(tokenizer, d) for d in sample.documents]
    stream = [*ids[0][:64], *ids[1][:64], *ids[2], *ids[0][64:128]]
    np.testing.assert_array_equal(found.tokens.reshape(-1), stream[: 5 * 32])
    assert found.tokens.dtype == np.int64
    assert found.sha256 == sample.sha256
    everything = sum(map(len, ids))
    assert text.windows(TOKENIZER, sample, 1, everything).tokens.shape == (1, everything)
    with pytest.raises(UsageError, match=f"has {everything:,} tokens"):
        text.windows(TOKENIZER, sample, 1, everything + 1)
    with pytest.raises(UsageError, match="1 windows of 1 tokens"):
        text.windows(TOKENIZER, sample, 1, 1)


def test_a_tokenizer_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ExporterError, match="is missing"):
        text.load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ExporterError, match="cannot be read"):
        text.load_tokenizer(tmp_path / "tokenizer.json")


def test_pieces_hold_every_special_token_and_real_text() -> None:
    tokenizer = text.load_tokenizer(TOKENIZER)
    sample = text.Text(("def f(x):\n    return x\n",), "made up")
    found = text.pieces(tokenizer, sample)
    assert sample.documents[0] in found
    used = {i for piece in found for i in text.encode(tokenizer, piece)}
    assert {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special} <= used
