"""Bad input gets one clear line, before any work, with exit code 4; and nothing else ever."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from exporter.checkpoint import describe, open_checkpoint
from exporter.checkpoint.headers import read_header, shown
from exporter.errors import BadCheckpoint, ExporterError
from tests import variants
from tests.variants import DAMAGES, DEMO, damage

# What the line must say, by kind of damage: enough to know what happened and where.
SAYS = {
    "truncated shard": r"model-00001-of-00002\.safetensors: truncated: the header describes [\d,]+ bytes",
    "truncated header": r"model-00001-of-00002\.safetensors: its header claims [\d,]+ bytes, the file has 900",
    "missing shard": r"shards named by .*index\.json are missing: model-00001-of-00002\.safetensors",
    "index leaves the folder": r'lm_head\.weight is said to lie in "\.\./model\.safetensors"',
    "index is absolute": r'said to lie in "/etc/model\.safetensors"',
    "index leaves by a detour": r'said to lie in "a/\.\./\.\./model\.safetensors"',
    "index does not list": r"does not list tensors that the shards hold: lm_head\.weight",
    "index names another file type": r'said to lie in "config\.json"',
    "index names a ghost": r"tensors that their shard does not hold: model\.layers\.9\.ghost",
    "symlink leaves the folder": r"is a link to .*elsewhere\.safetensors, outside",
    "header larger than the file": r"its header claims 9,223,372,036,854,775,808 bytes",
    "header above the cap": r"its header claims 100,000,001 bytes, the limit is 100,000,000",
    "overlap": r"tensor model\.embed_tokens\.weight overlaps the tensor before it",
    "hole": r"tensor model\.embed_tokens\.weight leaves a hole before it",
    "shape disagrees with bytes": r"lm_head\.weight is BF16 \[2049, 192\], which is 786,816 bytes",
    "unknown dtype": r"lm_head\.weight has the unknown dtype Q4",
    "negative shape": r"lm_head\.weight has the impossible shape \[-2048, -192\]",
    "duplicate key": r'the key "lm_head\.weight" occurs twice',
    "trailing bytes": r"4 bytes after the last tensor belong to nothing",
    "nesting bomb": r"config\.json: nested too deeply",
    "nesting bomb in a header": r"\(header\): nested too deeply",
    "pickle": r"pickle files \(pytorch_model\.bin\), which can run code and are never loaded",
    "adapter only": r"a LoRA adapter without the model",
    "no weights": r"no safetensors files",
    "git-lfs pointer": r"a git-lfs pointer",
    "pipe": r"is not a plain file",
    "no config": r"config\.json is missing",
    "absurd layers": r"num_hidden_layers is 400,000,000, above anything plausible",
    "wrong layers": r"config\.json says 5 layers, the weights hold 4",
    "wrong experts": r"has shape \[16, 192\], config\.json implies \[32, 192\]",
    "not gpt-oss": r"not a gpt-oss model \(llama\)",
}


def one_line(error: BadCheckpoint) -> BadCheckpoint:
    assert error.exit_code == 4
    assert "\n" not in error.message
    assert len(error.message) < 1000
    assert error.hint
    return error


def refusal(folder: Path) -> BadCheckpoint:
    with pytest.raises(BadCheckpoint) as caught:
        open_checkpoint(folder)
    return one_line(caught.value)


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_gets_one_clear_line(kind: str, tmp_path: Path) -> None:
    folder = damage(variants.copy(tmp_path / "c"), kind)
    assert re.search(SAYS[kind], refusal(folder).message)


def test_every_damage_has_its_line() -> None:
    assert SAYS.keys() == DAMAGES.keys()


def drop(*names: str) -> variants.Callable[[variants.Tensors], None]:
    return lambda t: [t.pop(n) for n in names] and None


def test_missing_and_unknown_tensors_are_named_and_counted(tmp_path: Path) -> None:
    routers = [f"model.layers.{i}.mlp.router.weight" for i in range(4)]
    error = refusal(variants.edited(tmp_path / "a", drop(*routers)))
    assert "tensors missing (4): model.layers.0.mlp.router.weight" in error.message
    assert "and 1 more" in error.message
    assert "repeat the merge" in (error.hint or "")

    def extra(t: variants.Tensors) -> None:
        t["model.layers.0.self_attn.surprise"] = torch.zeros(3)

    assert (
        "unknown to gpt-oss (1): model.layers.0.self_attn.surprise"
        in refusal(variants.edited(tmp_path / "b", extra)).message
    )


def test_lm_head_may_be_missing_only_when_tied(tmp_path: Path) -> None:
    assert "missing (1): lm_head.weight" in refusal(variants.edited(tmp_path / "a", drop("lm_head.weight"))).message


def test_recomputed_buffers_are_harmless(tmp_path: Path) -> None:
    def buffer(t: variants.Tensors) -> None:
        t["model.rotary_emb.inv_freq"] = torch.ones(32)

    with open_checkpoint(variants.edited(tmp_path / "c", buffer)) as checkpoint:
        assert checkpoint.unused == ["model.rotary_emb.inv_freq"]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("model.layers.0.mlp.experts.down_proj_scales", torch.zeros(16, 192, 5, dtype=torch.uint8), "shape"),
        ("model.layers.0.mlp.experts.down_proj_blocks", torch.zeros(16, 192, 6, 16, dtype=torch.int8), "dtype I8"),
        ("model.layers.0.mlp.experts.down_proj_blocks", torch.zeros(16, 192, 192, dtype=torch.uint8), "shape"),
        ("model.layers.1.self_attn.q_proj.weight", torch.zeros(512, 192, dtype=torch.float64), "dtype F64"),
        ("model.layers.1.self_attn.sinks", torch.zeros(64, dtype=torch.bfloat16), "shape"),
    ],
)  # fmt: skip
def test_wrong_types_and_shapes(name: str, value: torch.Tensor, says: str, tmp_path: Path) -> None:
    error = refusal(variants.edited(tmp_path / "c", lambda t: t.update({name: value})))
    assert f"{name} has {says}" in error.message


def test_float_blocks_with_scales_beside_them_are_refused(tmp_path: Path) -> None:
    """Half converted: floats under the blocks' name, and scales that no longer mean anything."""
    name = "model.layers.0.mlp.experts.down_proj"
    dense = torch.zeros(16, 192, 192, dtype=torch.bfloat16)
    error = refusal(variants.edited(tmp_path / "c", lambda t: t.update({name + "_blocks": dense})))
    assert f"unknown to gpt-oss (1): {name}_scales" in error.message


@pytest.mark.parametrize(
    ("suffix", "says"),
    [
        (".lora_A.default.weight", "merge_and_unload"),
        (".weight.absmax", "bitsandbytes"),
        (".qweight", "quantized by another tool"),
    ],
)
def test_hints_know_the_usual_causes(suffix: str, says: str, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj" + suffix
    assert says in (refusal(variants.edited(tmp_path / "c", lambda t: t.update({name: torch.zeros(4)}))).hint or "")


def test_per_expert_with_one_missing(tmp_path: Path) -> None:
    folder = variants.per_expert(tmp_path / "c")
    victim = "model.layers.2.mlp.experts.down_projs.7.weight"
    for shard in folder.glob("*.safetensors"):
        tensors = variants.load_file(shard)
        if tensors.pop(victim, None) is not None:
            save_file(tensors, shard)
            variants.edit_json(folder / variants.INDEX, lambda i: i["weight_map"].pop(victim))
    assert f"missing (1): {victim}" in refusal(folder).message


def test_per_expert_of_two_types(tmp_path: Path) -> None:
    folder = variants.per_expert(tmp_path / "c")
    name = "model.layers.2.mlp.experts.down_projs.7.weight"
    for shard in folder.glob("*.safetensors"):
        tensors = variants.load_file(shard)
        if name in tensors:
            tensors[name] = tensors[name].float()
            save_file(tensors, shard)
    assert "dtype BF16, other experts of its layer another" in refusal(folder).message


def test_bytes_predicted_from_the_config_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes are checked one by one before; this is the sum, computed another way."""
    monkeypatch.setattr("exporter.checkpoint.source.released_bytes", lambda config: 7408706)
    assert "implies 7,408,706 bytes of tensors, the files hold 7,408,704" in refusal(DEMO).message


def test_reads_in_pieces_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may give less than was asked for (on Linux always above 2 GiB)."""
    whole = os.preadv
    with open_checkpoint(DEMO) as checkpoint:
        want = checkpoint.read("lm_head.weight", 0, 500).leaf_digest()
        monkeypatch.setattr(os, "preadv", lambda fd, b, at: whole(fd, [b[0][:10_007]], at))
        assert checkpoint.read("lm_head.weight", 0, 500).leaf_digest() == want


def test_a_failing_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with open_checkpoint(DEMO) as checkpoint, pytest.raises(ExporterError, match="Input/output error") as caught:
        checkpoint.read("lm_head.weight", 0, 1)
    assert caught.value.exit_code == 1


def test_shards_without_index_missing_one_or_double(tmp_path: Path) -> None:
    folder = variants.no_index(tmp_path / "a")
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "shards are missing: model-00002-of-00003.safetensors" in refusal(folder).message
    folder = variants.no_index(tmp_path / "b")
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "again.safetensors")
    assert "tensors are in two files" in refusal(folder).message


def test_stale_index_is_named(tmp_path: Path) -> None:
    folder = variants.single_file(tmp_path / "c")
    shutil.copy(DEMO / variants.INDEX, folder)
    assert "delete model.safetensors.index.json" in (refusal(folder).hint or "")


def test_a_file_or_nothing_is_not_a_folder(tmp_path: Path) -> None:
    assert "is a file" in refusal(DEMO / "model-00001-of-00002.safetensors").message
    assert "no such folder" in refusal(tmp_path / "nowhere").message


def test_a_link_that_leads_to_itself(tmp_path: Path) -> None:
    folder = variants.copy(tmp_path / "c")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")
    refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_small_files_may_not_leave_either(name: str, tmp_path: Path) -> None:
    folder = variants.copy(tmp_path / "c")
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    assert "outside the checkpoint's folder" in refusal(folder).message


def test_hostile_expert_counts_end_soon(tmp_path: Path) -> None:
    """1,024 layers of 4,096 experts would be 25 million names: the search gives up long before."""
    folder = tmp_path / "c"
    folder.mkdir()
    config = {**variants.demo_config(), "num_hidden_layers": 1024, "num_local_experts": 4096}
    del config["layer_types"]
    (folder / "config.json").write_text(json.dumps(config))
    stem = "model.layers.{}.mlp.experts.{}.0.{}"
    names = [
        stem.format(i, p, k) for i in range(1024) for p in ("gate_up_projs", "down_projs") for k in ("weight", "bias")
    ]
    save_file({n: torch.zeros(0) for n in names}, folder / "model.safetensors")
    assert re.search(r"tensors missing \(1\d,\d{3}\): model\.embed_tokens", refusal(folder).message)


def test_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    """With mmap this is a SIGBUS."""
    folder = variants.copy(tmp_path / "c")
    shard = folder / "model-00001-of-00002.safetensors"
    with open_checkpoint(folder) as checkpoint:
        checkpoint.read("lm_head.weight", 0, 1)
        os.truncate(shard, 10_000)
        with pytest.raises(ExporterError, match="the file shrank after it was opened"):
            checkpoint.read("model.layers.1.mlp.experts.gate_proj.weight", 15, 16)
        checkpoint.close()
        with pytest.raises(ExporterError, match=r"has 10,000 bytes, had 4,445,640"):
            checkpoint.read("lm_head.weight", 0, 1)


def test_names_are_shown_safely() -> None:
    assert shown("a\x1b[31m\nb") == r"a\x1b[31m\nb"
    assert shown("größe \ud800") == r"größe \ud800"
    assert len(shown("x" * 10_000)) == 96


def test_a_config_may_not_write_on_the_terminal(tmp_path: Path) -> None:
    folder = variants.copy(tmp_path / "c")
    variants.edit_json(folder / "config.json", lambda c: c.update(model_type="\x1b[2J\n" + "x" * 100_000))
    assert refusal(folder).message.isprintable()


# Fuzzing: whatever the bytes, BadCheckpoint or success


SMALL = {"a": torch.arange(6, dtype=torch.uint8).reshape(2, 3), "b": torch.ones(4)}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("fuzz") / "small.safetensors"
    save_file(SMALL, path)
    return path.read_bytes()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_bytes_give_a_header_or_a_refusal(
    small: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    raw = bytearray(small)
    for at in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=4)):
        raw[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(bytes(raw[:cut]) if data.draw(st.booleans()) else bytes(raw))
    try:
        header = read_header(path)
    except BadCheckpoint as e:
        one_line(e)
    else:
        assert sum(r.nbytes for r in header.refs.values()) <= path.stat().st_size


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from([2**31, 2**63, 10**400, "yarn", "full_attention", -1, 0]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(key=st.sampled_from(sorted(variants.demo_config())), value=VALUES)
def test_any_config_value_gives_a_model_or_a_refusal(
    key: str, value: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "config-fuzz"
    if not folder.exists():
        variants.copy(folder)
    config = copy.deepcopy(variants.demo_config())
    config[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    try:
        describe(open_checkpoint(folder))
    except BadCheckpoint as e:
        one_line(e)


def test_memory_stays_at_a_few_leaves(tmp_path: Path) -> None:
    """Reading more than 30 MB of transposed experts takes little more memory than one of them."""
    script = textwrap.dedent(
        """
        import resource, sys
        from pathlib import Path
        from exporter.checkpoint import open_checkpoint
        from exporter.types import leaves
        c = open_checkpoint(Path(sys.argv[1]))
        for s in c.specs[:3]: c.read(s.name, 0, 1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for s in c.specs:
            for a, b in leaves(s.shape): c.read(s.name, a, b)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        """
    )
    folder = variants.fused_f32(tmp_path / "c")
    assert sum(f.stat().st_size for f in folder.glob("*.safetensors")) > 30 << 20
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
    grown = int(done.stdout) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 8 << 20
