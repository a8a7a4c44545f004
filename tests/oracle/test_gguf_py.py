"""GGUF against gguf-py, which we did not write: block types value by value, and a whole artifact."""

import json

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from exporter.formats import get_format  # noqa: E402
from exporter.formats.gguf import file  # noqa: E402
from exporter.numerics import decode  # noqa: E402
from exporter.types import Scheme  # noqa: E402
from tests.property.test_formats import random_tensor, step_of  # noqa: E402

FMT = get_format("gguf")


def decoded_by_gguf_py(packed: np.ndarray, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    qtype = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[qtype]
    rows = packed.reshape(*shape[:-1], shape[-1] // block * size)
    return gguf.dequantize(rows, qtype)


def values_agree(scheme: Scheme, seed: int = 5) -> bool:
    """Whether gguf-py reads the numbers that we say we stored."""
    shape = (2, 3, 192)
    q, step = random_tensor(scheme, shape, seed), step_of(scheme, shape)
    if scheme.name == "mxfp4":
        q.scales[:] = np.clip(q.scales, 2, 250)  # gguf-py does not decode the subnormal ones
    found = decoded_by_gguf_py(FMT.pack(step, q)[0], FMT.target(step).type, shape)
    return np.array_equal(found, decode.values(q))


@pytest.mark.parametrize("name", ["mxfp4", "int8-g32", "int4-g32", "int8-g64", "int4-g64"])
def test_gguf_py_reads_the_same_numbers(name):
    assert values_agree(Scheme.parse(name))


def test_sizes_and_ids_are_ggufs():
    from exporter.formats.gguf.blocks import BY_ID

    for kind in BY_ID.values():
        qtype = gguf.GGMLQuantizationType[kind.name]
        assert qtype.value == kind.id
        assert gguf.GGML_QUANT_SIZES[qtype] == (kind.block, kind.nbytes)


def swapped_nibbles(q):
    return np.left_shift(q.data, 4) | np.right_shift(q.data, 4)


FAULTS = {
    "nibbles swapped": ("mxfp4", lambda q: setattr_copy(q, data=swapped_nibbles(q))),
    "scale off by one": ("mxfp4", lambda q: setattr_copy(q, scales=(q.scales + 1).astype(np.uint8))),
    "zero off by one": ("int8-g32", lambda q: setattr_copy(q, data=(q.data + 1).astype(np.uint8))),
    "wrong axis": ("int4-g32", lambda q: setattr_copy(q, data=np.ascontiguousarray(q.data[:, ::-1]))),
    "blocks out of order": ("int8-g32", lambda q: setattr_copy(q, data=np.roll(q.data, 32, axis=-1))),
}


def setattr_copy(q, **changes):
    import dataclasses

    return dataclasses.replace(q, **changes)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, monkeypatch):
    name, break_it = FAULTS[fault]
    pack = FMT.pack
    monkeypatch.setattr(FMT, "pack", lambda step, q: pack(step, break_it(q)), raising=False)
    assert not values_agree(Scheme.parse(name))


@pytest.fixture(scope="module")
def artifact(demo_run):
    return demo_run.folder


def test_gguf_py_reads_the_artifact(artifact, demo_checkpoint):
    """Every tensor of the demo artifact, decoded by gguf-py, equals the checkpoint's own numbers."""
    path = next(artifact.glob("*.gguf"))
    reader = gguf.GGUFReader(path)
    assert len(reader.tensors) == len(demo_checkpoint.specs)
    by_name = {t.name: t for t in reader.tensors}
    manifest = json.loads((artifact / "manifest.json").read_text())
    from exporter.formats.gguf import tensor_name

    for spec in demo_checkpoint.specs:
        tensor = by_name[tensor_name(spec.name)]
        assert tuple(reversed(tensor.shape.tolist())) == spec.shape
        found = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(spec.shape)
        want = decode.values(demo_checkpoint.read(spec.name, 0, spec.shape[0])).reshape(spec.shape)
        entry = manifest["tensors"][spec.name]
        if entry["method"] in ("pass", "keep"):
            assert np.array_equal(found, want), spec.name
        else:
            assert np.abs(found - want).max() <= np.abs(want).max() / 127 * 0.51 + 1e-6, spec.name


def test_metadata_is_what_the_model_says(artifact, demo_checkpoint):
    reader = gguf.GGUFReader(next(artifact.glob("*.gguf")))
    get = lambda key: reader.get_field(key).contents()  # noqa: E731
    c = demo_checkpoint.config
    assert get("general.architecture") == "gpt-oss"
    assert get("gpt-oss.block_count") == c.num_hidden_layers
    assert get("gpt-oss.expert_count") == c.num_local_experts
    assert get("gpt-oss.attention.sliding_window") == c.sliding_window
    assert get("gpt-oss.rope.freq_base") == c.rope.theta
    assert get("tokenizer.ggml.pre") == "gpt-4o"
    assert get("tokenizer.ggml.eos_token_id") == c.eos_token_id
    tokenizer = json.loads(demo_checkpoint.tokenizer_file.read_text())
    tokens = get("tokenizer.ggml.tokens")
    assert len(tokens) == c.vocab_size
    assert all(tokens[i] == text for text, i in tokenizer["model"]["vocab"].items())
    assert get("tokenizer.chat_template") == demo_checkpoint.chat_template


def test_our_reader_agrees_with_gguf_py(artifact):
    path = next(artifact.glob("*.gguf"))
    ours, theirs = file.read_gguf(path), gguf.GGUFReader(path)
    assert ours.data_start == theirs.data_offset
    assert [(t.name, t.type, ours.data_start + t.offset) for t in ours.tensors] == [
        (t.name, t.tensor_type.value, t.data_offset) for t in theirs.tensors
    ]
    for key, value in ours.metadata.items():
        assert (
            theirs.get_field(key).contents() == pytest.approx(value.value)
            if isinstance(value.value, float)
            else theirs.get_field(key).contents() == value.value
        ), key


@pytest.mark.parametrize("name", ["openai/gpt-oss-20b", "openai/gpt-oss-120b"])
def test_the_size_label_is_gguf_pys(name):
    from exporter.formats.gguf.keys import _short
    from exporter.model import parameter_count, tensor_specs
    from exporter.model.released import RELEASED

    config = RELEASED[name]
    experts = sum(s.elements for s in tensor_specs(config) if s.role == "expert")
    one, total = experts // config.num_local_experts, parameter_count(config)
    want = gguf.size_label(total, total - experts, one, config.num_local_experts)
    assert f"{config.num_local_experts}x{_short(total - experts + one)}" == want
    for n in (12_345, 999_999, 1_000_000, 1_500_000, 9_960_000, 653_000_000, 2_400_000_000, 3 * 10**12):
        assert _short(n) == gguf.utility.model_weight_count_rounded_notation(n), n
