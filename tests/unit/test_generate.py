"""Text written by the model itself: its logits against the reference, and that a stop changes nothing."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest

from exporter.checkpoint import Checkpoint
from exporter.errors import ExporterError
from exporter.model.generate import BLOCK, Decoder, _uniform, generate, sample
from exporter.model.reference import reference_logits
from exporter.numerics import decode

torch = pytest.importorskip("torch")
KEEP = 1 << 30


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Source:
    """The demo's weights, with a count of what was read; `change` alters them on the way."""

    def __init__(self, checkpoint: Checkpoint, layers: int = 4) -> None:
        self.config = dataclasses.replace(checkpoint.config, num_hidden_layers=layers)
        self.checkpoint, self.reads = checkpoint, Counter[tuple[str, int, int]]()
        self.change = lambda name, rows: rows

    def read(self, name: str, start: int, stop: int) -> Any:
        self.reads[name, start, stop] += 1
        return self.change(name, decode.values(self.checkpoint.read(name, start, stop)))


def beginning(*first: int) -> Any:
    """A script that forces the first tokens of all windows, and nothing after."""

    def script(tokens: Any) -> Any:
        windows, t = tokens.shape
        return np.full(windows, first[t] if t < len(first) else -1, np.int64)

    return script


@pytest.mark.parametrize(
    ("layers", "chunks"),
    [(2, [1] * 300), (4, [32] * 9 + [12]), (4, [5, 27, 1, 31, 32, 32, 20, 12, 32] * 2)],
    ids=["one by one", "blocks", "mixed"],
)
def test_logits_are_the_references_past_the_window(demo_checkpoint: Checkpoint, layers: int, chunks: list[int]) -> None:
    source = Source(demo_checkpoint, layers)
    c, length = source.config, min(sum(chunks), 300)
    assert length > 2 * c.sliding_window
    tokens = np.random.default_rng(1).integers(0, c.vocab_size, (2, length))
    (expected,) = reference_logits(c, source.read, tokens, [c.rope], top_k=c.vocab_size)
    dense = np.empty((tokens.size, c.vocab_size))
    np.put_along_axis(dense, expected.top_ids.astype(np.int64), expected.top_logprobs, axis=1)
    decoder = Decoder(c, source.read, 2, length, keep_bytes=KEEP)
    found = []
    for chunk in chunks:
        if decoder.position < length:
            start = decoder.position
            decoder.advance(tokens[:, start : start + chunk] * 0)  # a wrong turn, taken back
            decoder.rewind(start)
            found.append(decoder.advance(tokens[:, start : start + chunk], every=True))
            decoder.commit()
    logits = torch.log_softmax(torch.cat(found, 1).double(), -1).numpy().reshape(dense.shape)
    assert np.abs(logits - dense).max() < 5e-5


def test_a_stopped_run_ends_with_the_same_tokens(demo_checkpoint: Checkpoint) -> None:
    source = Source(demo_checkpoint, layers=2)
    length = 5 * BLOCK + 7  # the window of 128 is crossed
    blocks: list[Any] = []
    settings: dict[str, Any] = {"windows": 3, "length": length, "keep_bytes": KEEP}
    whole = generate(source.config, source.read, beginning(2038, 7), on_block=blocks.append, **settings)
    assert (whole[:, :2] == [2038, 7]).all()
    assert len({tuple(row) for row in whole.tolist()}) == 3
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), whole)
    for done in (1, 5, 6):
        fresh: list[Any] = []
        again = generate(
            source.config, source.read, beginning(2038, 7), known=blocks[:done], on_block=fresh.append, **settings
        )
        np.testing.assert_array_equal(again, whole)
        assert len(fresh) == len(blocks) - done


def test_what_is_kept_changes_nothing_and_is_read_once(demo_checkpoint: Checkpoint) -> None:
    results, reads = [], []
    for keep in (0, 3_000_000, KEEP):
        source = Source(demo_checkpoint)
        # Not a bfloat16: kept as it is, or the tokens differ.
        source.change = lambda name, rows: rows * np.float32(1.0009) if "k_proj" in name else rows
        results.append(generate(source.config, source.read, beginning(2038), 4, 16, seed=5, keep_bytes=keep))
        reads.append(Counter({key: n for key, n in source.reads.items() if "embed" not in key[0]}))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    assert set(reads[2].values()) == {1}
    assert reads[0].total() > reads[1].total() > reads[2].total()


def test_seeds_and_temperatures(demo_checkpoint: Checkpoint) -> None:
    source = Source(demo_checkpoint, layers=1)
    cold = [
        generate(source.config, source.read, beginning(2038), 2, 20, seed=seed, temperature=0, keep_bytes=KEEP)
        for seed in (0, 1)
    ]
    np.testing.assert_array_equal(*cold)
    np.testing.assert_array_equal(cold[0][0], cold[0][1])
    warm = [generate(source.config, source.read, beginning(2038), 2, 20, seed=s, keep_bytes=KEEP) for s in (0, 1)]
    assert (warm[0] != warm[1]).any()
    draws = {tuple(_uniform(seed, step, 3).tolist()) for seed in (0, 1) for step in range(50)}
    assert len(draws) == 100
    assert 0.4 < np.mean(list(draws)) < 0.6


def test_a_script_speaks_in_the_middle(demo_checkpoint: Checkpoint) -> None:
    source = Source(demo_checkpoint, layers=1)

    def script(tokens: Any) -> Any:
        t = tokens.shape[1]
        return np.array([2038 if t < 3 else -1, 2038 if t == 0 else 11 if t in (9, 10) else -1])

    tokens = generate(source.config, source.read, script, 2, 12, keep_bytes=KEEP)
    assert tokens[0, :3].tolist() == [2038] * 3
    assert tokens[1, [0, 9, 10]].tolist() == [2038, 11, 11]
    assert (tokens[0, 3:] != 2038).any()
    with pytest.raises(ValueError, match="must give the first token"):
        generate(source.config, source.read, lambda t: np.array([-1, 3]), 2, 12)


def test_sampling_takes_each_token_as_often_as_it_is_likely() -> None:
    p = np.array([0.0, 0.5, 0.125, 0.0, 0.375])
    with np.errstate(divide="ignore"):
        logits = torch.tensor(np.maximum(np.log(p), -1e30), dtype=torch.float32).expand(1000, -1)
    uniform = torch.arange(1000, dtype=torch.float64) / 1000
    count = np.bincount(sample(logits, uniform, 1.0, 1.0), minlength=5)
    np.testing.assert_array_equal(count, [0, 500, 125, 0, 375])
    count = np.bincount(sample(logits, uniform, 1.0, 0.6), minlength=5)  # 0.5 alone does not reach 0.6
    np.testing.assert_allclose(count, [0, 1000 * 4 / 7, 0, 0, 1000 * 3 / 7], atol=1)
    assert set(sample(logits, uniform, 1.0, 0.49)) == {1}
    assert set(sample(logits, uniform, 0.0, 1.0)) == {1}
    cooler = np.bincount(sample(logits, uniform, 0.5, 1.0), minlength=5)
    np.testing.assert_allclose(cooler, 1000 * p**2 / (p**2).sum(), atol=1)
    last = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert sample(torch.tensor([[0.0, -1e30]]), last, 1.0, 1.0).tolist() == [0]


def test_a_damaged_weight_is_an_error(demo_checkpoint: Checkpoint) -> None:
    source = Source(demo_checkpoint, layers=1)
    source.change = lambda name, rows: rows * np.float32(np.nan) if name == "model.norm.weight" else rows
    with pytest.raises(ExporterError, match="logits are not finite"):
        generate(source.config, source.read, beginning(2038), 1, 4)
