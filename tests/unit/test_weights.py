"""Weights compared with the checkpoint's: every planted fault is named, and a sound file has none."""

from functools import partial

import numpy as np
import pytest

pytest.importorskip("gguf")

from exporter.errors import Refused
from exporter.pipeline.diagnosis import short_name
from exporter.pipeline.foreign import Foreign, Stored, open_foreign
from exporter.pipeline.progress import Progress
from exporter.pipeline.weights import compare_weights, limits, type_bits
from exporter.types import leaves
from tests.foreign_files import demo_values, gguf_demo, released_like

GATE, UP, DOWN = (f"blk.2.ffn_{part}_exps.weight" for part in ("gate", "up", "down"))


def all_in(kind):
    """Matrices in one type, the rest as it is kept."""
    return lambda name: released_like(name) if released_like(name) == "F32" else kind


def compared(tmp_path, checkpoint, kind=released_like, edit=None, workers=1, **more):
    gguf_demo(tmp_path / "m.gguf", kind, edit=edit, **more)
    foreign = open_foreign(tmp_path / "m.gguf")
    try:
        return compare_weights(foreign, checkpoint, workers, Progress())
    finally:
        foreign.close()


def test_what_is_released_is_exact(tmp_path, demo_checkpoint):
    found = compared(tmp_path, demo_checkpoint, workers=3)
    assert found == {
        "tensors": 79,
        "exact": 79,
        "compared": sum(v.size for v in demo_values().values()),
        "equal": 1.0,
        "worst": [],
        "groups": found["groups"],
        "kept_exact": True,
        "problems": [],
        "sound": True,
    }
    groups = {g["group"]: g for g in found["groups"]}
    assert groups["experts"] == {
        "group": "experts",
        "stored": {"MXFP4": 12},
        "exact": 12,
        "tensors": 12,
        "relative_error": 0.0,
    }
    assert list(groups) == ["experts", "attention", "embedding", "head", "router", "norms, sinks, biases"]


def test_a_sound_loss_is_measured_and_is_no_problem(tmp_path, demo_checkpoint):
    found = compared(tmp_path, demo_checkpoint, all_in("Q4_0"))
    assert found["problems"] == []
    assert found["kept_exact"]
    values = demo_values()["lm_head.weight"]
    import gguf

    kind = gguf.GGMLQuantizationType.Q4_0
    back = gguf.dequantize(gguf.quantize(values, kind), kind)
    wanted = np.sqrt(((back - values) ** 2).sum() / (values**2).sum())
    head = next(g for g in found["groups"] if g["group"] == "head")
    assert head["relative_error"] == pytest.approx(float(wanted), rel=1e-4)
    assert len(found["worst"]) == 10


# Faults: an edit of the packed tensors, and the words that must be in the only problem


def with_byte(name, expert, block, at, change):
    """One byte of one block of MXFP4."""

    def edit(packed):
        raw = packed[name] = packed[name].copy()
        rows = raw[expert].reshape(-1)
        rows[block * 17 + at] = change(rows[block * 17 + at])

    return edit


def f16_scale(name, block, factor, size):
    """A float16 scale at the front of a block, times a factor."""

    def edit(packed):
        raw = packed[name] = packed[name].copy()
        blocks = raw.reshape(-1, size)
        scale = blocks[block, :2].copy().view(np.float16) * np.float16(factor)
        blocks[block, :2] = scale.view(np.uint8)

    return edit


def replaced(name, make):
    def edit(packed):
        packed[name] = make(packed)

    return edit


def swapped(first, second):
    def edit(packed):
        packed[first], packed[second] = packed[second], packed[first]

    return edit


def nibbles(size, head):
    """The two numbers of every byte swapped."""

    def edit(name, packed):
        blocks = packed[name].copy().reshape(-1, size)
        blocks[:, head:] = (blocks[:, head:] << 4) | (blocks[:, head:] >> 4)
        packed[name] = blocks.reshape(packed[name].shape)

    return edit


def expert(name, e, make):
    def edit(packed):
        raw = packed[name] = packed[name].copy()
        raw[e] = make(raw)

    return edit


def mxfp4_scaled(name, by):
    def edit(packed):
        blocks = packed[name].copy().reshape(-1, 17)
        blocks[:, 0] += by
        packed[name] = blocks.reshape(packed[name].shape)

    return edit


def nudged(numbers):
    """The tenth number a little larger."""
    numbers = numbers.copy()
    numbers[9] += 1 / 256
    return numbers


KEPT = "routers, norms, sinks and biases are to stay as released"
FAULTS = {
    "one scale of MXFP4": (
        released_like,
        with_byte(GATE, 3, 77, 0, lambda b: b + 1),
        "layers.2 experts.gate_proj: 1 block of 18,432 differs; MXFP4 should be exact",
    ),
    "one code of MXFP4": (
        released_like,
        with_byte(DOWN, 15, 5, 9, lambda b: b ^ 0x30),
        "layers.2 experts.down_proj: 1 block of 18,432 differs; MXFP4 should be exact",
    ),
    "one scale of Q8_0 doubled": (
        all_in("Q8_0"),
        f16_scale(UP, 1234, 2, 34),
        "layers.2 experts.up_proj: 1 block of 18,432 is 100% off, more than Q8_0 can be",
    ),
    "one scale of Q8_0 a tenth too large": (
        all_in("Q8_0"),
        f16_scale("blk.1.attn_q.weight", 99, 1.1, 34),
        "layers.1 q_proj: 1 block of 3,072 is 10% off, more than Q8_0 can be",
    ),
    "one scale of Q4_0 halved": (
        all_in("Q4_0"),
        f16_scale(UP, 1234, 0.5, 18),
        "layers.2 experts.up_proj: 1 block of 18,432 is 50% off, more than Q4_0 can be",
    ),
    "nibbles swapped": (
        released_like,
        partial(nibbles(17, 1), GATE),
        "layers.2 experts.gate_proj: both halves of each 32 swapped (nibbles)",
    ),
    "nibbles swapped in 4 bits": (
        all_in("Q4_0"),
        partial(nibbles(18, 2), "blk.0.attn_k.weight"),
        "layers.0 k_proj: both halves of each 32 swapped (nibbles)",
    ),
    "an expert of zeros": (
        released_like,
        expert(DOWN, 5, lambda raw: np.zeros_like(raw[5])),
        "layers.2 experts.down_proj: expert 5: all zeros",
    ),
    "an expert of another's": (
        all_in("Q8_0"),
        expert(DOWN, 5, lambda raw: raw[11]),
        "layers.2 experts.down_proj: expert 5: expert 11's values",
    ),
    "a tensor times two": (
        released_like,
        mxfp4_scaled(DOWN, 1),
        "layers.2 experts.down_proj: 2 times the checkpoint's values",
    ),
    "transposed": (
        all_in("F16"),
        replaced(DOWN, lambda packed: np.swapaxes(packed[DOWN], 1, 2)),
        "layers.2 experts.down_proj: transposed",
    ),
    "queries turned as another model's": (
        released_like,
        replaced(
            "blk.1.attn_q.weight",
            lambda p: np.swapaxes(p["blk.1.attn_q.weight"].reshape(8, 2, 32, -1), 1, 2).reshape(512, -1),
        ),
        "layers.1 q_proj: rows of each head in the order of another rotation",
    ),
    "not finite": (
        released_like,
        with_byte(UP, 0, 0, 0, lambda b: 255),
        "layers.2 experts.up_proj: holds values that are not finite",
    ),
    "not finite in 8 bits": (
        all_in("Q8_0"),
        f16_scale(UP, 5, np.nan, 34),
        "layers.2 experts.up_proj: holds values that are not finite",
    ),
    "infinite": (
        all_in("Q4_0"),
        f16_scale("token_embd.weight", 5, np.inf, 18),
        "embed_tokens: holds values that are not finite",
    ),
    "one number of a norm": (
        released_like,
        replaced("blk.3.attn_norm.weight", lambda p: nudged(p["blk.3.attn_norm.weight"])),
        "layers.3 input_layernorm: 1 block of 6 differs; F32 should be exact",
    ),
    "a bias of zeros": (
        released_like,
        replaced("blk.0.attn_q.bias", lambda p: np.zeros_like(p["blk.0.attn_q.bias"])),
        "layers.0 q_proj.bias: all zeros",
    ),
    "sinks doubled": (
        released_like,
        replaced("blk.0.attn_sinks.weight", lambda p: 2 * p["blk.0.attn_sinks.weight"]),
        "layers.0 sinks: 2 times the checkpoint's values",
    ),
    "a router in 4 bits": (
        lambda n: "Q4_0" if n == "model.layers.1.mlp.router.weight" else released_like(n),
        None,
        f"layers.1 router: stored as Q4_0, 7.62% off; {KEPT}",
    ),
    "a router in 8 bits": (
        lambda n: "Q8_0" if n == "model.layers.1.mlp.router.weight" else released_like(n),
        None,
        f"layers.1 router: stored as Q8_0, 0.48% off; {KEPT}",
    ),
    "embeddings a row down": (
        released_like,
        replaced("token_embd.weight", lambda p: np.roll(p["token_embd.weight"], 1, axis=0)),
        "embed_tokens: 12,288 blocks of 12,288 differ; BF16 should be exact",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_named(fault, tmp_path, demo_checkpoint):
    kind, edit, words = FAULTS[fault]
    found = compared(tmp_path, demo_checkpoint, kind, edit)
    assert found["problems"] == [words]
    assert not found["sound"]
    assert found["worst"][0]["problem"] == words


def test_gate_and_up_swapped(tmp_path, demo_checkpoint):
    for kind in (released_like, all_in("Q4_0")):
        found = compared(tmp_path, demo_checkpoint, kind, swapped(GATE, UP))
        assert found["problems"] == [
            "layers.2 experts.gate_proj: gate holds up's values",
            "layers.2 experts.up_proj: up holds gate's values",
        ]


def test_a_router_in_half_precision_is_no_problem_and_is_said(tmp_path, demo_checkpoint):
    values = demo_values()
    name = "model.layers.1.mlp.router.weight"
    values[name] = values[name] + np.float32(2.0**-14)  # not bfloat16 any more
    found = compared(tmp_path, demo_checkpoint, lambda n: "F16" if n == name else released_like(n), values=values)
    assert not found["kept_exact"]
    assert found["exact"] == 78
    assert found["worst"][0]["name"] == name


def test_another_model_of_the_same_shapes_is_a_few_lines(tmp_path, demo_checkpoint):
    rng = np.random.default_rng(0)
    values = {n: (v * rng.choice([-1, 1], v.shape)).astype(np.float32) for n, v in demo_values().items()}
    found = compared(tmp_path, demo_checkpoint, lambda n: "F32", values=values)
    assert found["exact"] == 0
    assert len(found["problems"]) == 21
    assert found["problems"][-1] == "and 59 more tensors"
    assert len(found["worst"]) == 10
    assert not found["sound"]


def test_it_reads_leaf_by_leaf(tmp_path, demo_checkpoint):
    """Memory stays flat because nobody asks for more than a leaf."""
    gguf_demo(tmp_path / "m.gguf", released_like)
    foreign = open_foreign(tmp_path / "m.gguf")
    asked = []

    def read(name, start, stop):
        asked.append((name, start, stop))
        return foreign.read(name, start, stop)

    spied = Foreign(**{**foreign.__dict__, "read": read})
    compare_weights(spied, demo_checkpoint, 2, Progress())
    wanted = {(s.name, *at) for s in demo_checkpoint.specs for at in leaves(s.shape)}
    assert set(asked) == wanted
    assert len(asked) == len(wanted)


def test_another_model_is_refused(tmp_path, demo_checkpoint):
    values = {n: (v[:8] if ".experts." in n or "router" in n else v) for n, v in demo_values().items()}
    gguf_demo(tmp_path / "m.gguf", lambda n: "F32", values=values, keys={"gpt-oss.expert_count": 8})
    with pytest.raises(Refused, match="num_local_experts 8, not 16"):
        compare_weights(open_foreign(tmp_path / "m.gguf"), demo_checkpoint, 1, Progress())


def test_graphs_are_not_read_here(tmp_path, demo_checkpoint):
    with pytest.raises(Refused, match="not read here"):
        compare_weights(Foreign("onnx", tmp_path / "m.onnx", (), "onnx"), demo_checkpoint, 1, Progress())


TYPES = {
    "MXFP4": 4, "NVFP4": 4, "Q4_K": 4, "IQ4_XS": 4, "Q8_0": 8, "Q6_K": 6, "Q5_1": 5, "IQ2_XXS": 2, "IQ1_M": 1,
    "TQ2_0": 1, "int4 g32 asym act-order": 4, "int8 channel": 8, "FP8 tensor": 8, "MXFP8": 8, "int2 g64": 2,
}  # fmt: skip


def test_every_type_has_limits(demo_checkpoint):
    from exporter.formats.gguf.foreign_tables import TYPES as GGML

    spec = next(s for s in demo_checkpoint.specs if s.role == "linear")
    for kind in {*TYPES, *(t.name for t in GGML.values())}:
        found = limits(Stored(kind, 4.0, False), spec, demo_checkpoint)
        assert 0 <= found.leaf <= 1
    assert {kind: type_bits(kind) for kind in TYPES} == TYPES


def test_names_for_people(demo_checkpoint):
    names = {s.name: short_name(s) for s in demo_checkpoint.specs}
    assert names["model.layers.3.mlp.experts.up_proj.bias"] == "layers.3 experts.up_proj.bias"
    assert names["lm_head.weight"] == "lm_head"
    assert len(set(names.values())) == len(names)
