"""The GGUF container: golden bytes, hostile files, the tokenizer's rules."""

import contextlib
import json
import struct
from pathlib import Path

import pytest

from exporter.errors import ExporterError
from exporter.formats.gguf import file, tensor_name
from exporter.formats.gguf.file import ARRAY, F32, I32, STRING, U16, U32, TensorInfo, Value, encode_head, read_gguf
from exporter.formats.gguf.tokenizer import pre_tokenizer_name, refuse_tokenizer
from tests.conftest import DEMO

GOLDEN = Path(__file__).parents[1] / "golden" / "head.gguf.hex"
METADATA = {
    "general.architecture": Value(STRING, "gpt-oss"),
    "split.no": Value(U16, 1),
    "n": Value(U32, 7),
    "eps": Value(F32, 1e-5),
    "tokens": Value(ARRAY, ["a", "é"], STRING),
    "types": Value(ARRAY, [1, 3], I32),
}
TENSORS = [TensorInfo("token_embd.weight", (2, 32), 39, 0), TensorInfo("output_norm.weight", (8,), 0, 64)]


def head():
    return encode_head(METADATA, TENSORS)


def test_golden_bytes():
    assert head().hex() == "".join(GOLDEN.read_text().split())


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "t.gguf"
    path.write_bytes(head() + bytes(96))
    found = read_gguf(path)
    assert found.tensors == TENSORS
    assert found.data_start == len(head())
    assert {k: v.value for k, v in found.metadata.items()} == {
        k: pytest.approx(v.value) if v.type == F32 else v.value for k, v in METADATA.items()
    }


def hostile(edit):
    raw = bytearray(head() + bytes(96))
    return bytes(edit(raw))


def put(raw, at, code, *values):
    struct.pack_into(code, raw, at, *values)
    return raw


def array_of(count):
    body = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k"
    return body + struct.pack("<IIQ", ARRAY, U32, count) + bytes(32)


HOSTILE = {
    "empty": b"",
    "not GGUF": b"PK\x03\x04" + bytes(60),
    "version 1": hostile(lambda r: put(r, 4, "<I", 1)),
    "2^60 tensors": hostile(lambda r: put(r, 8, "<Q", 1 << 60)),
    "2^60 keys": hostile(lambda r: put(r, 16, "<Q", 1 << 60)),
    "a key of 2^62 bytes": hostile(lambda r: put(r, 24, "<Q", 1 << 62)),
    "an array of 2^40": array_of(1 << 40),
    "an array of 2^63": array_of(1 << 63),
    "unknown value type": hostile(lambda r: put(r, 24 + 8 + 20, "<I", 99)),
    "cut in the table": head()[:-40],
    "cut in a key": head()[:60],
    "a key twice": b"GGUF"
    + struct.pack("<IQQ", 3, 0, 2)
    + 2 * (struct.pack("<Q", 1) + b"a" + struct.pack("<II", U32, 1)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_at_once(case, tmp_path):
    path = tmp_path / "h.gguf"
    path.write_bytes(HOSTILE[case])
    with pytest.raises(ExporterError) as e:
        read_gguf(path)
    assert "h.gguf" in e.value.message


def test_no_byte_of_a_header_can_do_worse_than_an_error(tmp_path):
    """Every byte of a small header, flipped: a clean error or a file that reads as something."""
    path, raw = tmp_path / "f.gguf", head() + bytes(96)
    for i in range(len(head())):
        damaged = bytearray(raw)
        damaged[i] ^= 0xFF
        path.write_bytes(damaged)
        with contextlib.suppress(ExporterError):
            read_gguf(path)


@pytest.mark.parametrize(
    ("canonical", "name"),
    [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.layers.3.self_attn.q_proj.bias", "blk.3.attn_q.bias"),
        ("model.layers.3.self_attn.sinks", "blk.3.attn_sinks.weight"),
        ("model.layers.11.mlp.router.weight", "blk.11.ffn_gate_inp.weight"),
        ("model.layers.11.mlp.experts.gate_proj.bias", "blk.11.ffn_gate_exps.bias"),
        ("model.layers.0.post_attention_layernorm.weight", "blk.0.post_attention_norm.weight"),
    ],
)
def test_names(canonical, name):
    assert tensor_name(canonical) == name


@pytest.fixture
def tokenizer():
    return json.loads((DEMO / "tokenizer.json").read_text())


def test_the_regex_names_the_rules(tokenizer):
    assert pre_tokenizer_name(tokenizer) == "gpt-4o"
    assert refuse_tokenizer(tokenizer, 2048) is None


def test_a_retrained_vocabulary_is_no_obstacle(tokenizer):
    tokenizer["model"]["vocab"] = {t: i for i, t in enumerate(sorted(tokenizer["model"]["vocab"]))}
    assert pre_tokenizer_name(tokenizer) == "gpt-4o"


@pytest.mark.parametrize("pre", [None, {"type": "ByteLevel"}, {"type": "Split", "pattern": {"Regex": r"\d+"}}])
def test_other_rules_have_no_name(tokenizer, pre):
    tokenizer["pre_tokenizer"] = pre
    assert pre_tokenizer_name(tokenizer) is None
    assert "o200k" in refuse_tokenizer(tokenizer, 2048)


def test_alignment():
    assert [file.align(n) for n in (0, 1, 32, 33)] == [0, 32, 32, 64]
