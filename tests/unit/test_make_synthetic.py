"""The synthetic checkpoint is sound: it is what the speed figures are measured on."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from exporter.checkpoint import open_checkpoint
from exporter.model.config import ModelConfig
from exporter.model.released import RELEASED
from exporter.model.tensors import released_bytes
from exporter.numerics.bits import unpack_nibbles
from scripts import make_synthetic

SMALL = dataclasses.replace(
    RELEASED["openai/gpt-oss-20b"],
    hidden_size=64,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
    num_hidden_layers=4,
    layer_types=RELEASED["openai/gpt-oss-20b"].layer_types[:4],
    vocab_size=3000,
)


def write(out: Path, config: ModelConfig = SMALL, seed: int = 0) -> Path:
    out.mkdir()
    make_synthetic.write_config(out, config)
    make_synthetic.write_tokenizer(out, config, seed)
    make_synthetic.write_weights(out, config, 3, seed)
    return out


@pytest.mark.parametrize(("repo", "count"), [("openai/gpt-oss-20b", 3), ("openai/gpt-oss-120b", 15)])
def test_released_shapes_fall_into_as_many_shards(repo: str, count: int) -> None:
    groups = make_synthetic.shards(RELEASED[repo], count)
    sizes = [sum(t.nbytes for t in g) for g in groups]
    assert len(groups) == count
    assert sum(sizes) == released_bytes(RELEASED[repo])
    assert max(sizes) < 5.2e9


def test_a_small_one_opens_everywhere(tmp_path: Path) -> None:
    out = write(tmp_path / "a")
    names = sorted(p.name for p in out.glob("*.safetensors"))
    assert names == [f"model-{i:05d}-of-00002.safetensors" for i in range(3)]  # off by one, as released
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == released_bytes(SMALL)
    seen: dict[str, str] = {}
    for name in names:
        with safe_open(out / name, "pt") as f:
            seen |= dict.fromkeys(f.keys(), name)
            for key in f.keys():  # noqa: SIM118
                tensor = f.get_tensor(key)
                if key.endswith("_scales"):
                    assert 115 <= int(tensor.min()) <= int(tensor.max()) <= 122
                elif key.endswith("_blocks"):
                    codes = np.bincount(unpack_nibbles(tensor.numpy()).ravel(), minlength=16)
                    assert codes.all()
                else:
                    assert 0 < float(tensor.float().abs().max()) < 8
    assert seen == index["weight_map"]
    assert open_checkpoint(out).config == dataclasses.replace(
        SMALL, bos_token_id=None, eos_token_id=1914, pad_token_id=1911
    )


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    one, same, other = (write(tmp_path / name, seed=s) for name, s in (("1", 3), ("2", 3), ("3", 4)))
    for path in one.iterdir():
        assert path.read_bytes() == (same / path.name).read_bytes()
    assert any(p.read_bytes() != (other / p.name).read_bytes() for p in one.glob("*.safetensors"))


def test_tokenizer_is_valid_byte_level_bpe(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, vocab_size=40_000)
    make_synthetic.write_tokenizer(tmp_path, config, 1)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab, merges = raw["model"]["vocab"], raw["model"]["merges"]
    assert sorted(vocab.values()) == list(range(40_000 - make_synthetic.SPECIALS))
    assert all(a in vocab and b in vocab and a + b in vocab for a, b in merges)
    assert {a + b for a, b in merges} == {t for t in vocab if len(t) > 1}
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "Words, wörter 12345 🚀\n\n  and more"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("<|start|>").ids == [38_910 + 8]
    assert tokenizer.get_vocab_size() == 40_000


def test_released_sizes_of_the_tokenizer() -> None:
    tokens = make_synthetic.make_tokens(199_998, random.Random(0))
    merges = make_synthetic.make_merges(tokens, make_synthetic.MERGES)
    assert len(set(tokens)) == 199_998
    assert len(merges) == 446_189
    special = {199_998 + i: name for i, name in make_synthetic.SPECIAL.items()}
    assert special[200_002] == "return"
    assert special[200_008] == "message"
    assert special[200_012] == "call"
    assert special[200_018] == "endofprompt"
