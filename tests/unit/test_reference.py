"""The streamed forward against transformers' GptOssForCausalLM, and its bookkeeping of predictions."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.errors import ExporterError
from exporter.model import ModelConfig, RopeConfig, layer, parameter_count, reference, tensor_specs
from exporter.model.reference import ReferenceLogits, embed, reference_logits, run_layers
from exporter.model.rope import attention_factor, correction_range, inverse_frequencies

torch = pytest.importorskip("torch")
DEMO = Path(__file__).parents[1] / "data" / "tiny-gpt-oss"


class Oracle:
    """transformers' model of the demo checkpoint in float32, and its weights under our names."""

    def __init__(self) -> None:
        import transformers

        torch.set_num_threads(1)  # two test processes on two cores: more threads only wait for each other
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.config = ModelConfig.from_hf(json.loads((DEMO / "config.json").read_text()))
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            DEMO,
            dtype=torch.float32,
            attn_implementation="eager",
            quantization_config=transformers.Mxfp4Config(dequantize=True),
        )
        self.tensors = dict(self._canonical())
        self.reads: Counter[tuple[str, int, int]] = Counter()

    def _canonical(self) -> Iterator[tuple[str, Any]]:
        for name, value in self.model.state_dict().items():
            array = value.numpy()
            if "experts" not in name:
                yield name, array
                continue
            bias = name.endswith("_bias")
            # transformers multiplies from the right: weights are [E, in, out].
            array = array if bias else array.transpose(0, 2, 1)
            stem = name.removesuffix("_bias")
            suffix = ".bias" if bias else ".weight"
            if stem.endswith("gate_up_proj"):
                stem = stem.removesuffix("gate_up_proj")
                yield f"{stem}gate_proj{suffix}", np.ascontiguousarray(array[:, 0::2])
                yield f"{stem}up_proj{suffix}", np.ascontiguousarray(array[:, 1::2])
            else:
                yield stem + suffix, np.ascontiguousarray(array)

    def read(self, name: str, start: int, stop: int) -> Any:
        self.reads[name, start, stop] += 1
        return self.tensors[name][start:stop]

    def logits(self, tokens: Any, truncate: bool) -> Any:
        """float32 [W * T, V]"""
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

        config = self.model.config
        config.rope_parameters["truncate"] = truncate
        self.model.model.rotary_emb = GptOssRotaryEmbedding(config)
        with torch.no_grad():
            out = self.model(torch.from_numpy(tokens), use_cache=False).logits
        return out.reshape(-1, self.config.vocab_size).numpy()


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


def rope(oracle: Oracle, truncate: bool) -> RopeConfig:
    return dataclasses.replace(oracle.config.rope, truncate=truncate)


def text_tokens(windows: int, length: int) -> Any:
    from tokenizers import Tokenizer

    source = Path(json.__file__).parent
    text = "".join((source / f).read_text() for f in ("decoder.py", "encoder.py", "scanner.py", "tool.py"))
    ids = Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(text).ids
    assert len(ids) >= windows * length
    return np.array(ids[: windows * length], np.int64).reshape(windows, length)


def dense(result: ReferenceLogits, vocab: int) -> Any:
    """Log-probabilities [N, V] of a result that keeps the whole vocabulary."""
    out = np.full((result.tokens.size, vocab), np.nan)
    np.put_along_axis(out, result.top_ids.astype(np.int64), result.top_logprobs, axis=1)
    return out


def max_difference(logits: Any, result: ReferenceLogits, vocab: int) -> float:
    """Largest absolute difference in logits, the free constant of each position taken out."""
    apart = logits - dense(result, vocab)
    return float(np.abs(apart - apart.mean(axis=1, keepdims=True)).max())


def test_both_ropes_match_transformers_past_the_window(oracle: Oracle) -> None:
    tokens, vocab = text_tokens(2, 512), oracle.config.vocab_size
    ropes = [rope(oracle, False), rope(oracle, True)]
    released, rounded = reference_logits(oracle.config, oracle.read, tokens, ropes, top_k=vocab)
    for result, truncate in ((released, False), (rounded, True)):
        logits = oracle.logits(tokens, truncate)
        assert max_difference(logits, result, vocab) < 5e-5
        following = torch.log_softmax(torch.from_numpy(logits).double(), 1).numpy()
        targets = np.append(tokens.reshape(-1)[1:], 0)
        wanted = following[np.arange(len(targets)), targets]
        wanted[511::512] = np.nan
        np.testing.assert_allclose(result.target_logprob, wanted, atol=1e-4)
    # The two ropes differ by far more than the tolerance: neither passes for the other.
    assert max_difference(oracle.logits(tokens, True), released, vocab) > 0.5


def test_positions_past_the_trained_4096_match_transformers(oracle: Oracle) -> None:
    # One sliding and one full layer are enough, and transformers' scores for four would take gigabytes.
    tokens, vocab = text_tokens(1, 4200), oracle.config.vocab_size
    config = dataclasses.replace(oracle.config, num_hidden_layers=2)
    (result,) = reference_logits(config, oracle.read, tokens, [rope(oracle, False)], top_k=vocab)
    layers = oracle.model.model.layers
    oracle.model.model.layers = layers[:2]
    try:
        logits = oracle.logits(tokens, False)
    finally:
        oracle.model.model.layers = layers
    assert max_difference(logits, result, vocab) < 2e-4


def test_each_expert_is_decoded_once_for_all_ropes_and_alone(oracle: Oracle) -> None:
    oracle.reads.clear()
    ropes = [rope(oracle, False), rope(oracle, True)]
    reference_logits(oracle.config, oracle.read, text_tokens(2, 64), ropes, top_k=8)
    experts = {key: n for key, n in oracle.reads.items() if ".experts." in key[0] and key[0].endswith(".weight")}
    assert experts
    assert all(stop - start == 1 for _, start, stop in experts)
    assert set(oracle.reads.values()) == {1}


def test_small_score_blocks_change_nothing(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, vocab = text_tokens(1, 300), oracle.config.vocab_size
    ropes = [rope(oracle, False)]
    (whole,) = reference_logits(oracle.config, oracle.read, tokens, ropes, top_k=vocab)
    monkeypatch.setattr(layer, "_SCORES", 1)  # 16 queries at a time
    monkeypatch.setattr(layer, "_ROWS", 7)  # and 7 rows to an expert
    (blocks,) = reference_logits(oracle.config, oracle.read, tokens, ropes, top_k=vocab)
    np.testing.assert_allclose(dense(blocks, vocab), dense(whole, vocab), atol=5e-5)


def test_progress_counts_every_parameter(oracle: Oracle) -> None:
    seen: list[tuple[int, int]] = []
    reference_logits(
        oracle.config,
        oracle.read,
        text_tokens(1, 8),
        [oracle.config.rope],
        on_progress=lambda done, total: seen.append((done, total)),
    )
    total = parameter_count(oracle.config)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (total, total)
    # The last step only adds norms and biases: what was counted before is the real work.
    assert seen[-2][0] > 0.97 * total


def test_calibration_sees_the_input_of_every_weight(oracle: Oracle) -> None:
    c, tokens = oracle.config, text_tokens(1, 48)
    seen: dict[tuple[str, int | None], list[Any]] = {}

    def observe(names: tuple[str, ...], expert: int | None, rows: Any) -> None:
        for name in names:
            seen.setdefault((name, expert), []).append(rows.clone())

    x = embed(c, oracle.read, tokens, "cpu")[None]
    run_layers(c, oracle.read, x, [c.rope], "cpu", observe=observe)
    weights = {
        s.name: s.shape for s in tensor_specs(c) if s.role in ("linear", "router") and s.name.endswith(".weight")
    }
    experts = {s.name: s.shape for s in tensor_specs(c) if s.role == "expert"}
    assert {name for name, _ in seen} == weights.keys() | experts.keys()
    for name, shape in weights.items():
        (rows,) = seen[name, None]
        assert rows.shape == (48, shape[1])
    for name, shape in experts.items():
        rows = torch.cat([r for (n, _), parts in seen.items() if n == name for r in parts])
        assert rows.shape == (48 * c.num_experts_per_tok, shape[2])


def test_a_damaged_weight_is_named_by_layer(oracle: Oracle) -> None:
    def read(name: str, start: int, stop: int) -> Any:
        rows = oracle.read(name, start, stop)
        return rows * np.float32(np.nan) if name == "model.layers.2.self_attn.sinks" else rows

    with pytest.raises(ExporterError, match="not finite after layer 2"):
        reference_logits(oracle.config, read, text_tokens(1, 8), [oracle.config.rope])


def test_a_token_outside_the_vocabulary_is_refused(oracle: Oracle) -> None:
    for token in (-1, oracle.config.vocab_size):
        with pytest.raises(ExporterError, match=f"token {token} is outside"):
            reference_logits(oracle.config, oracle.read, np.full((1, 4), token), [oracle.config.rope])


@pytest.mark.parametrize("k", [1, 7, 300, 1000, 5000])
def test_the_head_in_slices_equals_the_head_at_once(k: int, oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_ROWS", 5)
    rng = torch.Generator().manual_seed(k)
    rows, weight = torch.randn(13, 32, generator=rng), torch.randn(1000, 32, generator=rng)
    tokens = torch.randint(0, 1000, (1, 13), generator=rng).numpy()
    config = dataclasses.replace(oracle.config, vocab_size=1000)
    head = reference._Head(config, rows, reference.following(tokens), k)
    for start, stop in ((0, 3), (3, 400), (400, 999), (999, 1000)):
        head.add(weight[start:stop], start)
    (result,) = head.results(tokens, 1)
    log_p = torch.log_softmax((rows @ weight.T).double(), dim=1).numpy()
    order = np.argsort(-log_p, axis=1)
    k = min(k, 1000)
    assert all(len(set(row)) == k for row in result.top_ids.tolist())
    np.testing.assert_allclose(result.top_logprobs, np.take_along_axis(log_p, order[:, :k], 1), atol=2e-5)
    there = np.take_along_axis(log_p, result.top_ids.astype(np.int64), 1)  # near ties may swap places
    np.testing.assert_allclose(result.top_logprobs, there, atol=2e-5)
    with np.errstate(divide="ignore"):
        tail = np.log(np.take_along_axis(np.exp(log_p), order[:, k:], 1).sum(axis=1))
    np.testing.assert_allclose(result.tail_logprob, tail, atol=2e-5)
    np.testing.assert_allclose(result.target_logprob[:-1], log_p[np.arange(12), tokens[0, 1:]], atol=2e-5)
    assert np.isnan(result.target_logprob[-1])


def some_logits() -> ReferenceLogits:
    return ReferenceLogits(
        tokens=np.array([[3, 1]]),
        top_ids=np.array([[1, 0], [2, 3]], np.int32),
        top_logprobs=np.log(np.array([[0.5, 0.25], [0.75, 0.125]], np.float32)),
        tail_logprob=np.array([np.log(0.25), -np.inf], np.float32),
        target_logprob=np.array([np.log(0.5), np.nan], np.float32),
    )


def test_saved_logits_load_the_same(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    some_logits().save(path)
    loaded = ReferenceLogits.load(path)
    for name in ReferenceLogits.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(loaded, name), getattr(some_logits(), name))
    assert [p.name for p in tmp_path.iterdir()] == ["reference.npz"]


def test_damaged_logits_are_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    some_logits().save(path)
    whole = path.read_bytes()
    for damaged in (b"", b"text", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(ExporterError, match="cannot be read"):
            ReferenceLogits.load(path)
    with pytest.raises(ExporterError, match="cannot be read"):
        ReferenceLogits.load(tmp_path / "missing.npz")
    dataclasses.replace(some_logits(), tail_logprob=np.zeros(3, np.float32)).save(path)
    with pytest.raises(ExporterError, match="3 positions for 2 tokens"):
        ReferenceLogits.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    some_logits().save(path)
    before = path.read_bytes()
    broken = dataclasses.replace(some_logits(), target_logprob=np.array([object()]))  # not storable
    with pytest.raises(ValueError, match="pickle"):
        broken.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["reference.npz"]


def test_rope_matches_transformers(oracle: Oracle) -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

    for truncate in (False, True):
        oracle.model.config.rope_parameters["truncate"] = truncate
        theirs = GptOssRotaryEmbedding(oracle.model.config)
        ours = inverse_frequencies(rope(oracle, truncate), oracle.config.head_dim)
        np.testing.assert_allclose(ours, theirs.inv_freq.numpy(), rtol=3e-7)
        assert attention_factor(rope(oracle, truncate)) == pytest.approx(theirs.attention_scaling, rel=1e-12)


def test_the_yarn_range_is_the_published_one(oracle: Oracle) -> None:
    assert correction_range(rope(oracle, False), 64) == pytest.approx((8.0927791, 17.3980245))
    assert correction_range(rope(oracle, True), 64) == (8, 18)


def test_plain_rope_is_not_stretched() -> None:
    plain = RopeConfig(theta=10000.0)
    np.testing.assert_allclose(inverse_frequencies(plain, 4), [1, 0.01])
    assert attention_factor(plain) == 1
