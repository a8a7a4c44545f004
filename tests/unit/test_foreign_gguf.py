"""GGUF tables of anyone: what is said is read or refused, and a hostile file costs one line, at once."""

import contextlib
import struct
import sys
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporter.errors import ExporterError, MissingExtra, Refused
from exporter.formats.gguf.file import ARRAY, F32, I32, STRING, U16, U32, TensorInfo, Value, encode_head
from exporter.formats.gguf.foreign_tables import HEADER_CAP, TYPES, is_gguf, read_tables
from exporter.pipeline.foreign import compare_config, open_foreign
from tests.foreign_files import gguf_demo, released_like

METADATA = {
    "general.architecture": Value(STRING, "gpt-oss"),
    "split.no": Value(U16, 0),
    "eps": Value(F32, 1e-5),
    "tokens": Value(ARRAY, ["a", "é"], STRING),
    "types": Value(ARRAY, [1, 3], I32),
}
TENSORS = [TensorInfo("token_embd.weight", (2, 32), 39, 0), TensorInfo("output_norm.weight", (8,), 0, 64)]
WHOLE = encode_head(METADATA, TENSORS) + bytes(96)


def head(tensors, metadata=METADATA):
    return encode_head(metadata, tensors) + bytes(96)


def put(raw, at, code, *values):
    raw = bytearray(raw)
    struct.pack_into(code, raw, at, *values)
    return bytes(raw)


def one_key(body, tensors=0):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, 1) + struct.pack("<Q", 1) + b"k" + body


def array_of(count, item=U32, room=32):
    return one_key(struct.pack("<IIQ", ARRAY, item, count) + bytes(room))


def tensor(name="a", dims=(32,), kind=0, offset=0, n_dims=None):
    raw = struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", n_dims or len(dims))
    return raw + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)


def with_tensors(*lines):
    return b"GGUF" + struct.pack("<IQQ", 3, len(lines), 0) + b"".join(lines) + bytes(512)


A_KEY = struct.pack("<Q", 1) + b"a" + struct.pack("<II", U32, 1)
HOSTILE = {
    "nothing in it": (b"", "not a GGUF file"),
    "a zip": (b"PK\x03\x04" + bytes(60), "not a GGUF file"),
    "version 1": (put(WHOLE, 4, "<I", 1), "version 1"),
    "big-endian": (put(WHOLE, 4, ">I", 3), "big-endian"),
    "2^60 tensors": (put(WHOLE, 8, "<Q", 1 << 60), "claims 1,152,921,504,606,846,976 tensors"),
    "2^60 keys": (put(WHOLE, 16, "<Q", 1 << 60), "metadata keys"),
    "a key of 2^62 bytes": (put(WHOLE, 24, "<Q", 1 << 62), "ends inside its header"),
    "an array of 2^40": (array_of(1 << 40), "an array claims 1,099,511,627,776 elements"),
    "an array of 2^63": (array_of(1 << 63), "an array claims"),
    "texts, 2^40 of them": (array_of(1 << 40, STRING), "an array claims"),
    "an array of arrays": (array_of(1, ARRAY), "arrays inside arrays"),
    "an unknown type of value": (one_key(struct.pack("<I", 99) + bytes(64)), "unknown value type 99"),
    "a key twice": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * A_KEY + bytes(64), "occurs twice"),
    "not UTF-8": (one_key(struct.pack("<IQ", STRING, 2) + b"\xff\xfe" + bytes(32)), "not UTF-8"),
    "an alignment of 0": (head([], {"general.alignment": Value(U32, 0)}), "power of two"),
    "an alignment of 48": (head([], {"general.alignment": Value(U32, 48)}), "power of two"),
    "a tensor twice": (with_tensors(tensor(), tensor(offset=128)), "name occurs twice"),
    "tensors on one another": (with_tensors(tensor("a"), tensor("b", offset=96)), "overlaps tensor a"),
    "a tensor beyond the end": (with_tensors(tensor(offset=1 << 40)), "ends at"),
    "a tensor that wraps": (with_tensors(tensor(offset=(1 << 64) - 32)), "ends at"),
    "2^63 numbers": (with_tensors(tensor(dims=(1 << 63,))), "impossible shape"),
    "a product that wraps": (with_tensors(tensor(dims=(1 << 33, 1 << 33))), "impossible shape"),
    "no numbers": (with_tensors(tensor(dims=(0,))), "impossible shape"),
    "no dimensions": (with_tensors(tensor(dims=(), n_dims=0) + bytes(8)), "ends|dimensions"),
    "200 dimensions": (with_tensors(tensor(n_dims=200)), "claims 200 dimensions"),
    "a type that was removed": (with_tensors(tensor(kind=4)), "has type 4"),
    "whole numbers": (with_tensors(tensor(kind=26)), "has type 26"),
    "not aligned": (with_tensors(tensor(offset=1)), "not aligned"),
    "no whole blocks": (with_tensors(tensor(dims=(33,), kind=8)), "no whole blocks of Q8_0"),
    "a name of control characters": (with_tensors(tensor("\x1b[2J")), "cannot be printed"),
    "a name of 1 kB": (with_tensors(tensor("a" * 1024)), "claims 1,024 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tables_are_one_line_at_once(case, tmp_path):
    raw, words = HOSTILE[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    began = time.monotonic()
    with pytest.raises(ExporterError, match=words) as failure:
        read_tables(path)
    assert time.monotonic() - began < 1
    assert failure.value.message.isprintable()
    assert failure.value.message.startswith("m.gguf: ")
    assert failure.value.hint


def test_a_thousand_million_empty_texts_in_a_file_with_the_room(tmp_path):
    """A sparse file costs an attacker nothing: its size must not be what bounds the work."""
    path = tmp_path / "m.gguf"
    with path.open("wb") as f:
        f.write(array_of(1 << 30, STRING, 0))
        f.truncate(16 << 30)
    with pytest.raises(ExporterError, match="claim more than 4,194,304 texts"):
        read_tables(path)
    with path.open("wb") as f:
        f.write(array_of(HEADER_CAP * 2, 0, 0))
        f.truncate(16 << 30)
    with pytest.raises(ExporterError, match="header is longer than"):
        read_tables(path)


def test_what_is_said_is_read(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(WHOLE)
    found = read_tables(path)
    assert found.text("general.architecture") == "gpt-oss"
    assert found.metadata["tokens"].count == 2
    assert found.metadata["types"].numbers == (1, 3)
    embedding = found.tensors["token_embd.weight"]
    assert (embedding.shape, embedding.type.name, embedding.nbytes) == ((2, 32), "MXFP4", 34)
    assert found.tensors["output_norm.weight"].offset == embedding.offset + 64


@given(st.integers(0, len(WHOLE) - 1))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_cut_off_anywhere(tmp_path, at):
    path = tmp_path / "m.gguf"
    path.write_bytes(WHOLE[:at])
    if at >= len(WHOLE) - 96 + 64 + 32:  # all tensors are whole
        read_tables(path)
        return
    with pytest.raises(ExporterError):
        read_tables(path)


@given(st.integers(0, len(WHOLE) - 97), st.integers(1, 255))
@settings(max_examples=200, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_byte_changed_is_read_or_refused(tmp_path, at, change):
    raw = bytearray(WHOLE)
    raw[at] ^= change
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    with contextlib.suppress(ExporterError):
        read_tables(path)


def test_sizes_are_ggufs():
    gguf = pytest.importorskip("gguf")
    for number, kind in TYPES.items():
        qtype = gguf.GGMLQuantizationType[kind.name]
        assert (qtype.value, gguf.GGML_QUANT_SIZES[qtype]) == (number, (kind.block, kind.nbytes))


# Which model


REFUSED = {
    "no number of layers": ({"gpt-oss.block_count": None}, "gpt-oss.block_count is missing"),
    "no window": ({"gpt-oss.attention.sliding_window": None}, "gpt-oss.attention.sliding_window is missing"),
    "4e8 layers": ({"gpt-oss.block_count": 400_000_000}, "num_hidden_layers is 400,000,000, above anything plausible"),
    "1000 layers": ({"gpt-oss.block_count": 1000}, "tensors are missing: blk.4.attn_norm.weight"),
    "3 layers": ({"gpt-oss.block_count": 3}, "does not have: blk.3.attn_k.bias, blk.3.attn_k.weight"),
    "another size": ({"gpt-oss.embedding_length": 96}, "token_embd.weight is [2048, 192], its keys imply [2048, 96]"),
    "another number of experts": ({"gpt-oss.expert_count": 8}, "its keys imply [8"),
    "a rotation of part of a head": ({"gpt-oss.rope.dimension_count": 32}, "rope.dimension_count is 32"),
    "linear scaling": ({"gpt-oss.rope.scaling.type": "linear"}, "gpt-oss uses yarn"),
    "an attention factor": ({"gpt-oss.rope.scaling.attn_factor": 2.0}, "scaling.attn_factor is 2.0"),
    "a key that turns otherwise": ({"gpt-oss.rope.scaling.longrope": 1}, "scaling.longrope is 1"),
    "another base where it slides": ({"gpt-oss.rope.freq_base_swa": 1e4}, "freq_base_swa is 10000.0"),
    "tokens of another model": ({"tokenizer.ggml.tokens": ["a", "b"]}, "2 tokens and 2,048 rows of embeddings"),
    "values of another length": ({"gpt-oss.attention.value_length": 32}, "value_length is 32"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_keys_that_do_not_fit_are_refused(case, tmp_path):
    pytest.importorskip("gguf")
    keys, words = REFUSED[case]
    gguf_demo(tmp_path / "m.gguf", released_like, keys=keys)
    with pytest.raises(Refused) as failure:
        open_foreign(tmp_path / "m.gguf")
    assert words in failure.value.message
    assert failure.value.message.isprintable()
    assert failure.value.hint


@pytest.mark.parametrize(("name", "words"), [("gptoss", "Ollama"), ("llama", '"llama", not gpt-oss')])
def test_other_architectures_are_named(name, words, tmp_path):
    pytest.importorskip("gguf")
    gguf_demo(tmp_path / "m.gguf", released_like, architecture=name)
    with pytest.raises(Refused, match=words):
        open_foreign(tmp_path / "m.gguf")


DIFFERENT = {
    "window": ({"gpt-oss.attention.sliding_window": 127}, ["sliding_window 127, not 128"]),
    "experts used": ({"gpt-oss.expert_used_count": 2}, ["num_experts_per_tok 2, not 4"]),
    "base": ({"gpt-oss.rope.freq_base": 1e6}, ["rope theta 1e+06, not 150000"]),
    "factor": ({"gpt-oss.rope.scaling.factor": 16.0}, ["rope factor 16, not 32"]),
    "no yarn": ({"gpt-oss.rope.scaling.type": "none"}, ["rope default, not yarn"]),
    "epsilon": ({"gpt-oss.attention.layer_norm_rms_epsilon": 1e-6}, ["rms_norm_eps 1e-06, not 1e-05"]),
    "beta": ({"gpt-oss.rope.scaling.yarn_beta_fast": 16.0}, ["rope beta_fast 16, not 32"]),
    "nothing": ({}, []),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_what_a_file_says_otherwise_than_the_checkpoint(case, tmp_path, demo_checkpoint):
    pytest.importorskip("gguf")
    keys, wanted = DIFFERENT[case]
    gguf_demo(tmp_path / "m.gguf", released_like, keys=keys)
    assert compare_config(open_foreign(tmp_path / "m.gguf"), demo_checkpoint.config) == wanted


def test_tensors_that_are_multiplied_by_are_not_passed_over(tmp_path):
    pytest.importorskip("gguf")
    gguf_demo(tmp_path / "m.gguf", released_like, extra={"blk.1.ffn_gate_exps.scale": np.ones(16, np.float32)})
    with pytest.raises(Refused, match=r"does not have: blk.1.ffn_gate_exps.scale"):
        open_foreign(tmp_path / "m.gguf")


def test_a_type_that_needs_gguf_py_says_so(tmp_path, monkeypatch):
    """What our own files hold is read without it."""
    pytest.importorskip("gguf")
    from exporter.formats.gguf import foreign_values

    name = "model.layers.0.self_attn.q_proj.weight"
    gguf_demo(tmp_path / "m.gguf", lambda n: "Q5_0" if n == name else released_like(n))
    foreign = open_foreign(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    foreign_values._gguf_py.cache_clear()
    assert foreign.read("model.norm.weight", 0, 192).shape == (192,)
    assert foreign.read("model.layers.0.mlp.experts.up_proj.weight", 0, 1).shape == (1, 192, 192)
    with pytest.raises(MissingExtra, match="reading Q5_0 tensors needs gguf"):
        foreign.read(name, 0, 1)


def test_a_head_that_is_the_embeddings(tmp_path):
    pytest.importorskip("gguf")
    gguf_demo(tmp_path / "m.gguf", released_like, edit=lambda packed: packed.pop("output.weight"))
    foreign = open_foreign(tmp_path / "m.gguf")
    assert foreign.config.tie_word_embeddings
    assert np.array_equal(foreign.read("lm_head.weight", 3, 9), foreign.read("model.embed_tokens.weight", 3, 9))


def test_a_file_without_a_suffix_is_known_by_its_first_bytes(tmp_path):
    """Ollama calls its files sha256-..."""
    pytest.importorskip("gguf")
    gguf_demo(tmp_path / "m.gguf", released_like)
    (tmp_path / "m.gguf").rename(tmp_path / "sha256-1234")
    assert is_gguf(tmp_path / "sha256-1234")
    assert open_foreign(tmp_path / "sha256-1234").format == "gguf"
