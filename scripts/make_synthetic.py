"""Write a checkpoint with the shapes, layout and tokenizer size of released gpt-oss, of made-up numbers.

    python scripts/make_synthetic.py --model 20b --layers 2 --out gpt-oss-20b-2

Its use is measuring: 13.8 GB (20b) or 3.3 GB (20b with two layers) in the released tensor names,
dtypes and sharding, without a download. Numbers have plausible sizes and come from a seed; they
repeat every few MB, so that writing costs what the disk costs. Memory stays under 250 MB.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import string
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from exporter.model.config import ModelConfig
from exporter.model.released import RELEASED
from exporter.model.tensors import parameter_count, released_bytes
from exporter.numerics.e2m1 import MAGNITUDES
from exporter.numerics.floats import f32_to_bf16

DEMO = Path(__file__).parents[1] / "tests" / "data" / "tiny-gpt-oss"
SHARDS = {"20b": 3, "120b": 15}  # as released
SPECIAL = {
    0: "startoftext",
    1: "endoftext",
    4: "return",
    5: "constrain",
    7: "channel",
    8: "start",
    9: "end",
    10: "message",
    14: "call",
    20: "endofprompt",
}  # by distance from the first special id, 199998 as released
SPECIALS = 1090  # up to id 201087
MERGES = 446_189  # o200k
POOL = 8 << 20  # numbers in each pool of random ones


# --- weights ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tensor:
    """One tensor of the released layout; `kind` says which made-up numbers fill it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str

    @property
    def nbytes(self) -> int:
        count = 1
        for n in self.shape:
            count *= n
        return count * (2 if self.dtype == "BF16" else 1)


def tensors(c: ModelConfig) -> Iterator[Tensor]:
    """Names, dtypes and shapes of the release, in file order."""
    h, e, ff = c.hidden_size, c.num_local_experts, c.intermediate_size
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    yield Tensor("model.embed_tokens.weight", "BF16", (c.vocab_size, h), "embedding")
    for i in range(c.num_hidden_layers):
        p = f"model.layers.{i}."
        yield Tensor(p + "input_layernorm.weight", "BF16", (h,), "norm")
        for name, rows, columns in (("q", q, h), ("k", kv, h), ("v", kv, h), ("o", h, q)):
            yield Tensor(f"{p}self_attn.{name}_proj.weight", "BF16", (rows, columns), "linear")
            yield Tensor(f"{p}self_attn.{name}_proj.bias", "BF16", (rows,), "bias")
        yield Tensor(p + "self_attn.sinks", "BF16", (c.num_attention_heads,), "sinks")
        yield Tensor(p + "post_attention_layernorm.weight", "BF16", (h,), "norm")
        yield Tensor(p + "mlp.router.weight", "BF16", (e, h), "linear")
        yield Tensor(p + "mlp.router.bias", "BF16", (e,), "bias")
        for name, rows, columns in (("gate_up", 2 * ff, h), ("down", h, ff)):
            x = f"{p}mlp.experts.{name}_proj"
            yield Tensor(x + "_bias", "BF16", (e, rows), "bias")
            yield Tensor(x + "_blocks", "U8", (e, rows, columns // 32, 16), "codes")
            yield Tensor(x + "_scales", "U8", (e, rows, columns // 32), "scales")
    yield Tensor("model.norm.weight", "BF16", (h,), "norm")
    yield Tensor("lm_head.weight", "BF16", (c.vocab_size, h), "linear")


class Numbers:
    """Pools of random bytes by kind. A tensor takes its bytes from a place that its name decides."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        normal = rng.standard_normal(POOL, np.float32)
        self.pools: dict[str, npt.NDArray[np.uint8]] = {
            "linear": f32_to_bf16(normal * np.float32(0.02)).view(np.uint8),
            "embedding": f32_to_bf16(normal * np.float32(0.5)).view(np.uint8),
            "bias": f32_to_bf16(normal[: 1 << 20] * np.float32(0.1)).view(np.uint8),
            "norm": f32_to_bf16(1 + normal[: 1 << 20] * np.float32(0.1)).view(np.uint8),
            "sinks": f32_to_bf16(normal[: 1 << 20]).view(np.uint8),
            "codes": _codes(normal),
            "scales": rng.integers(115, 123, POOL, np.uint8),
        }
        self.seed = seed

    def chunks(self, t: Tensor) -> Iterator[memoryview]:
        pool, left = self.pools[t.kind], t.nbytes
        at = random.Random(f"{self.seed} {t.name}").randrange(pool.size // 2) & ~1
        while left:
            piece = pool[at : at + left]
            yield piece.data
            left -= piece.size
            at = 0


def _codes(normal: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Packed FP4 codes distributed as those of bell-shaped weights are."""
    mids = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2
    codes = np.searchsorted(mids, np.abs(normal) * 2).astype(np.uint8)
    codes |= (normal < 0).astype(np.uint8) << 3
    return (codes[0::2] | codes[1::2] << 4).astype(np.uint8)


def shards(c: ModelConfig, count: int) -> list[list[Tensor]]:
    """Tensors by shard, of about equal sizes; at most `count`, fewer when tensors are too large."""
    groups: list[list[Tensor]] = [[] for _ in range(count)]
    total, before = released_bytes(c), 0
    for t in tensors(c):
        middle = before + t.nbytes // 2
        groups[min(count - 1, middle * count // total)].append(t)
        before += t.nbytes
    if before != total:
        raise SystemExit(f"{before:,} bytes of tensors where the configuration needs {total:,}")
    return [g for g in groups if g]


def write_shard(path: Path, group: list[Tensor], numbers: Numbers) -> None:
    """One safetensors file: length of the header, header padded to 8 bytes, tensors one after another."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for t in group:
        header[t.name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for t in group:
            for chunk in numbers.chunks(t):
                _write_all(out.fileno(), chunk)


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def write_weights(out: Path, c: ModelConfig, count: int, seed: int) -> None:
    numbers = Numbers(seed)
    groups = shards(c, count)
    # The release counts from 0 and writes "of" one too few; so does this.
    names = [f"model-{i:05d}-of-{len(groups) - 1:05d}.safetensors" for i in range(len(groups))]
    where = {t.name: name for name, group in zip(names, groups, strict=True) for t in group}
    for name, group in zip(names, groups, strict=True):
        print(f"  {name}  {sum(t.nbytes for t in group) / 1e9:.2f} GB", file=sys.stderr)
        write_shard(out / name, group, numbers)
    index = {"metadata": {"total_size": released_bytes(c)}, "weight_map": dict(sorted(where.items()))}
    _write_json(out / "model.safetensors.index.json", index)


# --- tokenizer -------------------------------------------------------------------------------------


def byte_letters() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE, in id order (GPT-2 `encoder.py`)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in set(shown)]
    return [*map(chr, shown), *(chr(256 + i) for i in range(len(hidden)))]


def make_tokens(count: int, rng: random.Random) -> list[str]:
    """`count` different tokens; every one longer than a byte is two earlier ones joined."""
    tokens = byte_letters()
    short = list(string.ascii_lowercase)
    pairs = [a + b for a in short for b in short]
    triples = [a + b for a in pairs for b in short]
    for group in (pairs, ["Ġ" + a for a in short], ["Ġ" + a for a in pairs], triples):
        tokens += group
    tokens += ["Ġ" + a for a in triples]
    tokens = tokens[:count]
    seen, tails = set(tokens), pairs + triples
    grown = tokens[256:]  # every prefix of these is a token too: they fall apart in several ways
    while len(tokens) < count:
        if rng.random() < 0.6:
            joined = rng.choice(grown) + rng.choice(short)
            target = grown
        else:
            joined = tokens[rng.randrange(256, len(tokens))] + rng.choice(tails)
            target = []
        if len(joined) <= 12 and joined not in seen:
            seen.add(joined)
            tokens.append(joined)
            target.append(joined)
    return tokens


def make_merges(tokens: list[str], limit: int) -> list[list[str]]:
    """Up to `limit` merges in the order of their results; at least one for every longer token.

    The released file too lists every way in which a token falls into two tokens.
    """
    known = set(tokens)
    ways = [
        [[t[:i], t[i:]] for i in range(len(t) - 1, 0, -1) if t[:i] in known and t[i:] in known] for t in tokens[256:]
    ]
    spare = limit - len(ways)
    merges: list[list[str]] = []
    for found in ways:
        extra = min(len(found) - 1, max(spare, 0))
        merges += found[: 1 + extra]
        spare -= extra
    return merges


def write_tokenizer(out: Path, c: ModelConfig, seed: int) -> None:
    """tokenizer.json with the released pre-tokenizer, special ids and sizes, of made-up words."""
    first = c.vocab_size - SPECIALS
    tokens = make_tokens(first, random.Random(seed))
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {t: i for i, t in enumerate(tokens)}
    tokenizer["model"]["merges"] = make_merges(tokens, MERGES * first // 199_998)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"] = [
        {"id": first + i, "content": f"<|{SPECIAL.get(i, f'reserved_{first + i}')}|>", **plain} for i in range(SPECIALS)
    ]
    _write_json(out / "tokenizer.json", tokenizer)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        shutil.copyfile(DEMO / name, out / name)


# --- configuration ---------------------------------------------------------------------------------


def write_config(out: Path, c: ModelConfig) -> None:
    raw = json.loads((DEMO / "config.json").read_text())
    first = c.vocab_size - SPECIALS
    raw |= {
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "layer_types": list(c.layer_types),
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "num_local_experts": c.num_local_experts,
        "vocab_size": c.vocab_size,
        "eos_token_id": first + 4,
        "pad_token_id": first + 1,
    }
    raw.pop("bos_token_id", None)  # the released config.json has none
    raw["rope_scaling"].pop("rope_theta", None)
    _write_json(out / "config.json", raw)
    generation = {
        "bos_token_id": first,
        "do_sample": True,
        "eos_token_id": [first + 4, first + 1, first + 14],
        "pad_token_id": first + 1,
        "transformers_version": raw["transformers_version"],
    }
    _write_json(out / "generation_config.json", generation)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=sorted(SHARDS), default="20b")
    parser.add_argument("--layers", type=int, help="default: as released (24 or 36)")
    parser.add_argument("--vocab", type=int, help="ids in the tokenizer and rows of the embeddings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")
    args = parser.parse_args()
    config = RELEASED[f"openai/gpt-oss-{args.model}"]
    layers, vocab = args.layers or config.num_hidden_layers, args.vocab or config.vocab_size
    if not 1 <= layers <= config.num_hidden_layers or vocab < SPECIALS + 256:
        parser.error(f"--layers is 1 to {config.num_hidden_layers}, --vocab at least {SPECIALS + 256}")
    config = dataclasses.replace(
        config, num_hidden_layers=layers, layer_types=config.layer_types[:layers], vocab_size=vocab
    )
    if args.out.exists():
        parser.error(f"{args.out} exists")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    need, free = released_bytes(config), shutil.disk_usage(args.out.parent).free
    if need > free:
        parser.error(f"needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free at {args.out.parent}")
    print(f"{args.model}, {layers} layers, {parameter_count(config):,} parameters", file=sys.stderr)
    started, part = time.monotonic(), args.out.with_name(args.out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    write_config(part, config)
    write_tokenizer(part, config, args.seed)
    write_weights(part, config, SHARDS[args.model], args.seed)
    part.rename(args.out)
    print(f"{args.out}: {need / 1e9:.2f} GB in {time.monotonic() - started:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
