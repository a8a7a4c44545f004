"""Calibration of a whole model: the demo, and a corner of it (a few layers and experts of the same weights)."""

import numpy as np
import pytest
import torch

from exporter.errors import ExporterError
from exporter.model.layer import Layer, rms_norm
from exporter.model.reference import embed, reference_logits, run_layers
from exporter.numerics import decode
from exporter.pipeline.calibrate import StoreNumbers
from exporter.quantize import gptq
from exporter.quantize.hessian import Moments, topped_up
from exporter.quantize.solve import Problem
from exporter.types.recipe import GptqSpec
from exporter.validate import metrics
from tests.corner import DOWN0, EVERYTHING, GATE0, LEAVES, Job, corner, corner_job, tokens_of

KV0 = "model.layers.0.self_attn.k_proj.weight"


@pytest.fixture(autouse=True)
def one_thread():
    with gptq.one_thread():
        yield


@pytest.fixture(scope="module")
def tokens():
    """(for calibration, held out): int64 [8, 128]."""
    return [tokens_of(part) for part in ("calibration", "held-out")]


@pytest.fixture
def job(demo_checkpoint, tmp_path):
    return corner_job(demo_checkpoint, tmp_path / "store")


@pytest.fixture(scope="module")
def whole(demo_checkpoint, tmp_path_factory):
    """The leaves of a job that nobody disturbed."""
    with gptq.one_thread():
        return corner_job(demo_checkpoint, tmp_path_factory.mktemp("whole") / "store").run()


# What comes out


def test_nearer_to_the_release_than_rounding(demo_checkpoint, tokens, tmp_path):
    """INT4 experts of the whole demo, on text that calibration did not see."""
    config, held_out = demo_checkpoint.config, tokens[1][:2]
    jobs = {
        method: Job(demo_checkpoint, config, tokens[0][:3], tmp_path / method, EVERYTHING[:1], method)
        for method in ("gptq", "rtn")
    }
    jobs["gptq"].run()
    released, *others = (
        reference_logits(config, read, held_out, [config.rope])[0]
        for read in (jobs["rtn"].numbers().released, *(j.numbers().final for j in jobs.values()))
    )
    by_gptq, by_rounding = (float(metrics.between(released, other).kl.mean()) for other in others)
    assert by_gptq < 0.75 * by_rounding


@pytest.fixture(scope="module")
def by_hand(demo_checkpoint, tokens, tmp_path_factory):
    """A finished job on more tokens than a matrix has inputs, and every input that its weights see.

    (numbers, {name: rows [n, K]} of the model with the final numbers, the same of the released model)
    """
    config = corner(demo_checkpoint.config)
    job = Job(demo_checkpoint, config, tokens[0][:5], tmp_path_factory.mktemp("hand") / "store")
    with gptq.one_thread():
        job.run()
        numbers, streams = job.numbers(), []
        for read in (numbers.final, numbers.released):
            rows = {}

            def observe(names, expert, part, rows=rows):
                for name in names if expert is None else ():
                    rows.setdefault(name, []).append(part)

            x = embed(config, read, job.tokens, "cpu")
            run_layers(config, read, x[None].contiguous(), [config.rope], "cpu", observe=observe)
            streams.append({name: torch.cat(parts) for name, parts in rows.items()})
    return job, numbers, *streams


def same_codes(numbers, name, leaf, q):
    """Share of codes and scales that a stored leaf and a QTensor have in common."""
    stored = numbers._store.read(numbers.step(name), leaf)
    codes = decode.codes(stored).reshape(-1) == decode.codes(q).reshape(-1)
    return min(codes.mean(), (stored.scales.reshape(-1) == q.scales.reshape(-1)).mean())


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kinds", ["qkv", "o"])
def test_attention_is_rounded_for_the_inputs_it_gets(by_hand, layer, kinds):
    """Moments taken in a plain forward of the finished model and of the released one give the stored codes.

    Sums in another order differ in the last bits, and a few numbers lie between two levels.
    """
    _, numbers, here, released = by_hand
    names = [f"model.layers.{layer}.self_attn.{kind}_proj.weight" for kind in kinds]
    moments = Moments(here[names[0]].shape[1], "cpu")
    moments.add(here[names[0]], released[names[0]])
    weights = [[numbers.released(n, 0, numbers.step(n).spec.shape[0])] for n in names]
    problem = Problem([moments], [0], GptqSpec())
    for name, [(q, _)] in zip(names, problem.solve(names, numbers.step(names[0]).scheme, weights, "cpu"), strict=True):
        assert same_codes(numbers, name, 0, q) > 0.97


@pytest.mark.parametrize("layer", [0, 1])
def test_experts_are_rounded_for_the_inputs_they_get(by_hand, layer):
    """The same for gate, up and down of every expert: its own tokens, topped up where they are few."""
    job, numbers, here, released = by_hand
    config, prefix = job.config, f"model.layers.{layer}."
    plain = Layer(config, layer, numbers.final, "cpu")
    router = prefix + "mlp.router.weight"
    h, r = here[router], released[router]
    logits = h @ plain.weight("mlp.router.weight", 4).T + plain.weight("mlp.router.bias", 4)
    chosen = torch.topk(logits, config.num_experts_per_tok).indices
    seen_by_all = set()
    for expert in range(4):
        routed = (chosen == expert).any(dim=1).nonzero()[:, 0]
        seen = topped_up(routed, len(h), 192)
        seen_by_all.add(len(seen))
        inner = [h[seen], r[seen]]
        for projections in (("gate", "up"), ("down",)):
            names = [plain.expert_name(p) for p in projections]
            moments = Moments(192, "cpu")
            moments.add(*inner)
            weights = [[numbers.released(n, expert, expert + 1)[0]] for n in names]
            found = Problem([moments], [0], GptqSpec()).solve(names, numbers.step(names[0]).scheme, weights, "cpu")
            for name, [(q, _)] in zip(names, found, strict=True):
                assert same_codes(numbers, name, expert, q) > 0.97
                facts = job.facts[name, expert]
                assert (facts["tokens"], facts["added"]) == (len(seen), len(seen) - len(routed))
            inner = [
                plain.swiglu(
                    *(
                        rows @ torch.from_numpy(read(f"{prefix}mlp.experts.{n}_proj.weight", expert, expert + 1)[0]).T
                        + plain.weight(f"mlp.experts.{n}_proj.bias", 4)[expert]
                        for n in ("gate", "up")
                    )
                )
                for rows, read in zip(inner, (numbers.final, numbers.released), strict=True)
            ]
    assert max(seen_by_all) > 192  # not all of them were topped up


def test_the_head_is_rounded_for_the_inputs_it_gets(by_hand):
    job, numbers, *_ = by_hand
    config, moments, rows = job.config, Moments(192, "cpu"), []
    for read in (numbers.final, numbers.released):
        x = embed(config, read, job.tokens, "cpu")[None].contiguous()
        run_layers(config, read, x, [config.rope], "cpu")
        norm = torch.from_numpy(read("model.norm.weight", 0, 192).copy())
        rows.append(rms_norm(x.view(-1, 192), norm, config.rms_norm_eps))
    moments.add(*rows)
    step = numbers.step("lm_head.weight")
    weights = numbers.released("lm_head.weight", 0, 2048)
    [[(q, _)]] = Problem([moments], [0], GptqSpec()).solve([step.name], step.scheme, [[weights]], "cpu")
    assert same_codes(numbers, step.name, 0, q) > 0.97


# Settings


def cut_small(monkeypatch, rows):
    """Tokens, windows and rows of a matrix in pieces of `rows`; leaves of 100 rows."""
    monkeypatch.setattr("exporter.quantize.experts._ROWS", rows)
    monkeypatch.setattr("exporter.quantize.sequential._ROWS", rows)
    monkeypatch.setattr("exporter.types.qtensor._LEAF_ELEMENTS", 192 * 100)


def test_large_matrices_are_rounded_some_leaves_at_a_time(job, whole, monkeypatch):
    cut_small(monkeypatch, 300)  # more than the tokens, less than the head
    cut = job.run()
    counts = {name: len([n for n, _ in cut if n == name]) for name in ("lm_head.weight", KV0)}
    assert counts == {"lm_head.weight": 21, KV0: 2}
    for name in {name for name, _ in whole}:
        pieces = [[leaves[key] for key in sorted(leaves) if key[0] == name] for leaves in (cut, whole)]
        for part in (0, 1):
            a, b = (np.frombuffer(b"".join(leaf[part] for leaf in each), np.uint8) for each in pieces)
            assert a.shape == b.shape
            assert (a == b).mean() > 0.97


def test_tokens_in_pieces_give_numbers_as_good(job, monkeypatch):
    """A sum in another order moves a code here and there, and what comes after it: not the same, but as near."""
    job.run()
    lost = job.lost()
    cut_small(monkeypatch, 50)
    pieces = Job(job.checkpoint, job.config, job.tokens, job.folder.with_name("pieces"))
    pieces.run()
    assert pieces.lost() == pytest.approx(lost, rel=0.1)


def test_experts_at_once_give_numbers_as_good(job, whole):
    alone = job.run()
    lost = job.lost()
    q = "model.layers.0.self_attn.q_proj.weight"
    together = Job(job.checkpoint, job.config, job.tokens, job.folder.with_name("four"))
    found = together.run(at_once=4)
    assert together.lost() == pytest.approx(lost, rel=0.01)
    assert found[q, 0] == alone[q, 0] == whole[q, 0]


def test_one_hessian_for_gate_and_up_of_a_layer(job):
    job.run()
    routed = job.lost()
    shared = Job(job.checkpoint, job.config, np.tile(job.tokens, (2, 1)), job.folder.with_name("shared"))
    shared.run(spec=GptqSpec(hessian="shared"))
    for expert in range(4):
        facts = shared.facts[GATE0, expert]
        assert (facts["tokens"], facts["added"]) == (384, 0)
        assert 192 <= shared.facts[DOWN0, expert]["tokens"] < 384
    assert shared.lost() == pytest.approx(routed, rel=0.5)


class Unrouted(StoreNumbers):
    """The router never chooses expert 2 of layer 0."""

    def final(self, name, start, stop):
        return self._silent(name, super().final(name, start, stop))

    def released(self, name, start, stop):
        return self._silent(name, super().released(name, start, stop))

    def _silent(self, name, values):
        if name == "model.layers.0.mlp.router.bias":
            values = values.copy()
            values[2] = -1e9
        return values


def test_an_expert_that_no_token_is_sent_to(job):
    """It is calibrated on tokens of the others, which is said, and as well as they are."""
    tokens = np.tile(job.tokens, (2, 1))  # 384, twice as many as an expert is topped up to
    unrouted = Job(job.checkpoint, job.config, tokens, job.folder.with_name("unrouted"))
    unrouted.run(Unrouted)
    for name in (GATE0, DOWN0):
        facts = unrouted.facts[name, 2]
        assert (facts["tokens"], facts["added"]) == (192, 192)
        others = [unrouted.facts[name, e]["error"] for e in (0, 1, 3)]
        assert 0 < facts["error"] < 2 * max(others)


# What cannot be


def spoiled(tensor, value=np.nan):
    class Spoiled(StoreNumbers):
        def released(self, name, start, stop):
            values = super().released(name, start, stop)
            if name == tensor:
                values = values.copy()
                values.reshape(-1)[3] = value
            return values

    return Spoiled


@pytest.mark.parametrize(
    ("tensor", "words", "kept"),
    [
        ("model.layers.1.mlp.experts.down_proj.bias", "hidden states are not finite after layer 1", 32),
        ("model.layers.1.input_layernorm.weight", "model.layers.1.self_attn.q_proj.weight: ", 16),
        ("model.layers.1.mlp.experts.gate_proj.bias", "model.layers.1.mlp.experts.down_proj.weight: ", 22),
        ("model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.k_proj.weight: ", 16),
        ("model.layers.0.mlp.experts.up_proj.weight", "model.layers.0.mlp.experts.up_proj.weight: ", 4),
    ],
)
def test_numbers_that_are_not_finite_are_named(job, whole, tensor, words, kept):
    """And nothing that was done before is lost."""
    with pytest.raises(ExporterError, match="not finite") as e:
        job.run(spoiled(tensor))
    assert words in e.value.message
    assert "exporter doctor" in e.value.hint
    assert job.committed() == kept
    assert job.run() == whole


def out_of_memory(monkeypatch, calls):
    """Let `Problem.solve` fail at these calls."""
    real, count = Problem.solve, iter(range(10**6))

    def solve(*arguments):
        if next(count) in calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(*arguments)

    monkeypatch.setattr(Problem, "solve", solve)


@pytest.mark.parametrize("call", [2, 3, 6])
def test_without_memory_slices_get_smaller(job, monkeypatch, call):
    """At gate and up, at down, or in the next layer: what is there stays, and the rest is made in halves."""
    out_of_memory(monkeypatch, {call})
    job.run(at_once=4)
    assert job.calibration.experts_at_once == 2
    assert job.committed() == LEAVES
    assert max(job.lost().values()) < 0.01


def test_without_memory_for_one_expert(job, whole, monkeypatch):
    with monkeypatch.context() as patch:
        out_of_memory(patch, range(4, 100))
        with pytest.raises(ExporterError, match="too little memory for one expert of layer 0") as e:
            job.run(at_once=1)
    assert "--device cpu" in e.value.hint
    assert job.committed() == 7
    assert job.run() == whole
