"""The doctor names each fault, in the right place, with a cure; and calls a sound checkpoint sound."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.checkpoint import Diagnosis, Finding, describe, diagnose, open_checkpoint
from exporter.model import released
from tests import variants
from tests.variants import DAMAGES, DEMO, VARIANTS, damage, edit_json

P = "model.layers.1."
E = P + "mlp.experts."


def only(diagnosis: Diagnosis, text: str) -> Finding:
    """The one finding that says `text`."""
    found = [f for f in diagnosis.findings if text in f.what]
    assert len(found) == 1, diagnosis.findings
    return found[0]


def worse_than_notes(diagnosis: Diagnosis) -> list[Finding]:
    return [f for f in diagnosis.findings if f.level != "note"]


def test_the_demo_is_sound() -> None:
    seen: list[tuple[int, int]] = []
    diagnosis = diagnose(DEMO, on_progress=lambda done, total: seen.append((done, total)))
    assert diagnosis.sound
    assert diagnosis.deep
    assert worse_than_notes(diagnosis) == []
    assert seen[-1][0] == seen[-1][1] == 7408704
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)
    assert diagnosis.tokenizer["tokens"] == 2048
    assert diagnosis.checkpoint is not None
    diagnosis.checkpoint.close()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_sound(name: str, tmp_path: Path) -> None:
    diagnosis = diagnose(VARIANTS[name][0](tmp_path / "c"))
    assert worse_than_notes(diagnosis) == []
    seen_off_by_one = any("off by one" in f.what for f in diagnosis.findings)
    assert seen_off_by_one == (name == "off_by_one_shards")


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_becomes_findings_and_no_exception(kind: str, tmp_path: Path) -> None:
    diagnosis = diagnose(damage(variants.copy(tmp_path / "c"), kind))
    assert not diagnosis.sound
    assert diagnosis.checkpoint is None
    assert diagnosis.findings[0].level == "error"
    assert diagnosis.findings[0].cure


def test_tokenizer_is_examined_even_when_the_weights_are_damaged(tmp_path: Path) -> None:
    folder = damage(variants.copy(tmp_path / "c"), "truncated shard")
    (folder / "tokenizer.json").unlink()
    diagnosis = diagnose(folder)
    assert only(diagnosis, "truncated").level == "error"
    assert only(diagnosis, "tokenizer.json is missing").level == "error"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "no such folder" in diagnose(tmp_path / "nowhere").findings[0].what


# Numbers that no trained model has


def set_to(name: str, value: float, at: Any = ...) -> Callable[[variants.Tensors], None]:
    def edit(t: variants.Tensors) -> None:
        t[name] = t[name].clone()
        t[name][at] = value

    return edit


def same_experts(t: variants.Tensors) -> None:
    for part in ("blocks", "scales"):
        t[E + "gate_up_proj_" + part] = t[E + "gate_up_proj_" + part].clone()
        t[E + "gate_up_proj_" + part][9] = t[E + "gate_up_proj_" + part][4]


NUMBERS: dict[str, tuple[Callable[[variants.Tensors], None], str, str, str]] = {
    "nan": (set_to(P + "self_attn.q_proj.weight", float("nan"), (3, 4)),
            "error", "NaN or infinity", P + "self_attn.q_proj.weight (1 numbers)"),
    "infinity in a norm": (set_to("model.norm.weight", float("-inf"), 7),
                           "error", "NaN or infinity", "model.norm.weight (1 numbers)"),
    "nan everywhere": (set_to(P + "self_attn.sinks", float("nan")),
                       "error", "NaN or infinity", P + "self_attn.sinks (8 numbers)"),
    "scale 255": (set_to(E + "gate_up_proj_scales", 255, (2, 5, 1)),
                  "error", "scale 255", E + "up_proj.weight (1 blocks)"),
    "router": (set_to(P + "mlp.router.weight", 0), "error", "the router is all zero", P + "mlp.router.weight"),
    "norm": (set_to(P + "input_layernorm.weight", 0), "error", "a norm is all zero", P + "input_layernorm.weight"),
    "sinks": (set_to(P + "self_attn.sinks", -0.0), "warning", "sinks are all zero", P + "self_attn.sinks"),
    "bias": (set_to(P + "self_attn.v_proj.bias", 0), "warning", "biases are all zero", P + "self_attn.v_proj.bias"),
    "head": (set_to("lm_head.weight", 0), "error", "weights that are all zero", "lm_head.weight"),
    "reset norm": (set_to(P + "post_attention_layernorm.weight", 1), "warning", "every number is the same",
                   P + "post_attention_layernorm.weight"),
    "expert": (set_to(E + "down_proj_blocks", 0x80, 6), "error", "experts that are all zero",
               E + "down_proj.weight (experts 6)"),
    "rows": (set_to(E + "down_proj_blocks", 0, (6, slice(0, 3))), "note", "rows of experts that are all zero",
             E + "down_proj.weight (3 rows)"),
    "all experts": (set_to(E + "down_proj_blocks", 0), "error", "weights that are all zero", E + "down_proj.weight"),
    "absurd": (set_to(P + "self_attn.o_proj.weight", -3e9, (0, 0)), "warning", "magnitudes above 65504",
               P + "self_attn.o_proj.weight (up to 3e+09)"),
    "absurd scale": (set_to(E + "down_proj_scales", 160, (0, 0, 0)), "warning", "magnitudes above 65504",
                     E + "down_proj.weight (up to 5.15e+10)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers(kind: str, tmp_path: Path) -> None:
    edit, level, what, where = NUMBERS[kind]
    diagnosis = diagnose(variants.edited(tmp_path / "c", edit))
    finding = only(diagnosis, what)
    assert (finding.level, finding.where) == (level, where)
    others = [f for f in worse_than_notes(diagnosis) if f is not finding]
    assert others == []
    if level != "note":
        assert finding.cure
    assert worse_than_notes(diagnose(variants.edited(tmp_path / "d", edit), deep=False)) == []


def test_equal_experts_in_gate_and_up(tmp_path: Path) -> None:
    finding = only(diagnose(variants.edited(tmp_path / "c", same_experts)), "equal byte for byte")
    assert finding.level == "warning"
    assert finding.where == f"{E}gate_proj.weight (4 = 9), {E}up_proj.weight (4 = 9)"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_floats_of_every_type_are_examined(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = variants.fused_bf16(tmp_path / "c", dtype=dtype)
    for shard in folder.glob("*.safetensors"):
        tensors = variants.load_file(shard)
        if E + "down_proj" in tensors:
            tensors[E + "down_proj"][3, 5, 7] = float("inf")
            tensors[E + "down_proj"][8] = 0
            variants.save_file(tensors, shard)
    diagnosis = diagnose(folder)
    assert only(diagnosis, "NaN or infinity").where == E + "down_proj.weight (1 numbers)"
    assert only(diagnosis, "experts that are all zero").where == E + "down_proj.weight (experts 8)"


def test_one_fault_in_many_tensors_is_one_finding(tmp_path: Path) -> None:
    def edit(t: variants.Tensors) -> None:
        for i in range(4):
            set_to(f"model.layers.{i}.self_attn.sinks", 0)(t)

    finding = only(diagnose(variants.edited(tmp_path / "c", edit)), "sinks are all zero")
    assert finding.where.endswith("model.layers.2.self_attn.sinks and 1 more")


def test_a_file_that_shrinks_meanwhile_is_a_finding(tmp_path: Path) -> None:
    folder = variants.copy(tmp_path / "c")

    def cut(done: int, total: int) -> None:
        os.truncate(folder / "model-00002-of-00002.safetensors", 5000)

    diagnosis = diagnose(folder, on_progress=cut)
    assert not diagnosis.deep
    assert only(diagnosis, "had 2,971,520 when its header was read").level == "error"


# Tokenizer, special tokens, template, configuration


def tokenizer(edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "tokenizer.json", edit)


def config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda c: c.update(values))


def generation(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "generation_config.json", lambda c: c.update(values))


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _drop_tokens(count: int) -> Callable[[dict[str, Any]], None]:
    """Without the last `count` ordinary tokens."""

    def edit(t: dict[str, Any]) -> None:
        vocab = t["model"]["vocab"]
        t["model"]["vocab"] = {k: i for k, i in vocab.items() if i < 2038 - count}

    return edit


def _rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def edit(t: dict[str, Any]) -> None:
        for a in t["added_tokens"]:
            a["content"] = a["content"].replace(old, new)

    return edit


def _ordinary(t: dict[str, Any]) -> None:
    t["added_tokens"][2]["special"] = False


def _collide(t: dict[str, Any]) -> None:
    t["model"]["vocab"]["one more"] = 17


TEXTS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "no tokenizer": (remove("tokenizer.json"), "error", "tokenizer.json is missing"),
    "fewer ids": (tokenizer(_drop_tokens(100)), "error", "100 of 2,048 ids have no token (100 of them below 2,047)"),
    "reserved ids": (tokenizer(_drop_tokens(20)), "note", "20 of 2,048 ids have no token"),
    "id beyond": (tokenizer(lambda t: t["model"]["vocab"].update(x=5000)), "error",
                  "1 token ids lie outside the vocabulary of 2,048 (5000)"),
    "two tokens, one id": (tokenizer(_collide), "error", "1 ids have two tokens (17)"),
    "not BPE": (tokenizer(lambda t: t.update(model={"type": "Unigram", "vocab": []})), "error", "no model.vocab"),
    "added token without id": (tokenizer(lambda t: t["added_tokens"].append({})), "error", "has no id"),
    "harmony": (tokenizer(_rename("<|channel|>", "<|chan|>")), "warning", "harmony tokens are missing: <|channel|>"),
    "ordinary stop": (tokenizer(_ordinary), "warning", "eos_token_id 2040 is the ordinary token '<|return|>'"),
    "eos not there": (config(eos_token_id=9000), "error", "eos_token_id 9000 is not an id of the tokenizer"),
    "no call stop": (generation(eos_token_id=[2040]), "warning", "<|call|> (2046) is not an eos_token_id"),
    "no generation": (remove("generation_config.json"), "warning", "generation_config.json is missing"),
    "eos disagree": (generation(eos_token_id=[2046]), "warning", "eos_token_id is 2040 in config.json and [2046]"),
    "pad disagrees": (generation(pad_token_id=2047), "warning", "pad_token_id is 2039 in config.json and 2047"),
    "no template": (remove("chat_template.jinja"), "warning", "no chat template"),
    "other template": (lambda f: (f / "chat_template.jinja").write_text("[INST]") and None, "warning",
                       "the chat template is not harmony's"),
    "bitsandbytes": (config(quantization_config={"quant_method": "bitsandbytes"}), "warning",
                     "says quant_method bitsandbytes, but the tensors are MXFP4"),
    "no quantization_config": (config(quantization_config=None), "warning", "has no quantization_config"),
    "truncate": (config(rope_scaling={"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0}),
                 "warning", "YaRN with truncate on"),
    "no yarn": (config(rope_scaling=None), "warning", "plain RoPE without YaRN"),
    "tied but stored": (config(tie_word_embeddings=True), "warning", "tie_word_embeddings is true"),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}") and None, "warning", "a LoRA adapter lies"),
    "pickle beside": (lambda f: (f / "optimizer.pt").write_text("x") and None, "note", "pickle files lie beside"),
    "index total": (lambda f: edit_json(f / variants.INDEX, lambda i: i["metadata"].update(total_size=1)), "warning",
                    "the index says 1 bytes of tensors, the shards hold 7,408,704"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TEXTS)
def test_texts(kind: str, tmp_path: Path) -> None:
    spoil, level, what = TEXTS[kind]
    folder = variants.copy(tmp_path / "c")
    spoil(folder)
    finding = only(diagnose(folder, deep=False), what)
    assert finding.level == level
    if level != "note":
        assert finding.cure


def test_float_weights_that_claim_mxfp4(tmp_path: Path) -> None:
    folder = variants.fused_bf16(tmp_path / "c")
    config(quantization_config={"quant_method": "mxfp4"})(folder)
    assert only(diagnose(folder, deep=False), "says quant_method mxfp4").level == "warning"


def test_the_released_template_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The released file itself is not here: its place in the list of known hashes is taken by the demo's."""
    digest = hashlib.sha256((DEMO / "chat_template.jinja").read_bytes()).hexdigest()
    monkeypatch.setitem(released.KNOWN_SHA256, ("org/name", "1"), {"chat_template.jinja": digest})
    diagnosis = diagnose(DEMO, deep=False)
    assert diagnosis.tokenizer["template"] == "released"
    assert diagnosis.findings == []


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
PLACES = [
    ("tokenizer.json", "added_tokens"), ("tokenizer.json", "model"), ("generation_config.json", "eos_token_id"),
    ("generation_config.json", "pad_token_id"), ("tokenizer_config.json", "eos_token"),
    ("tokenizer_config.json", "chat_template"), ("config.json", "quantization_config"),
    ("config.json", "eos_token_id"), (variants.INDEX, "metadata"), (variants.INDEX, "weight_map"),
]  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(place=st.sampled_from(PLACES), value=VALUES)
def test_any_value_gives_findings_and_no_exception(
    place: tuple[str, str], value: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "doctor-fuzz"
    if not folder.exists():
        variants.copy(folder)
    file, key = place
    edit_json(folder / file, lambda c: c.update({key: value}))
    try:
        diagnosis = diagnose(folder, deep=False)
    finally:
        (folder / file).write_bytes((DEMO / file).read_bytes())
    assert all(f.what.isprintable() and len(f.what) < 1000 for f in diagnosis.findings)


# inspect


def test_describe_is_plain_json(tmp_path: Path) -> None:
    with open_checkpoint(variants.off_by_one_shards(tmp_path / "c"), repo="org/name") as checkpoint:
        found = json.loads(json.dumps(describe(checkpoint)))
    assert found["layout"] == "hf-mxfp4"
    assert found["types"]["expert"] == "mxfp4"
    assert found["predicted_bytes"] == found["tensor_bytes"] == found["index_total_size"] == 7408704
    assert found["parameters"] == 8902176
    assert found["shards_off_by_one"] is True
    assert (found["layers"], found["experts"], found["repo"]) == (4, 16, "org/name")
    assert found["rope"] == {
        "kind": "yarn", "theta": 150000.0, "factor": 32.0, "truncate": False, "spelling": "rope_scaling",
    }  # fmt: skip


def test_describe_tells_types_and_ties_apart(tmp_path: Path) -> None:
    with open_checkpoint(variants.mixed_layers(tmp_path / "a")) as checkpoint:
        found = describe(checkpoint)
    assert found["types"]["expert"] == "mxfp4 bf16"
    assert found["notes"] == ["experts are stored in several ways: hf-fused, hf-mxfp4"]
    with open_checkpoint(variants.tied_head(tmp_path / "b")) as checkpoint:
        found = describe(checkpoint)
    assert found["tied_head"] is True
    assert found["parameters"] == 8902176 - 2048 * 192
    assert found["predicted_bytes"] == found["tensor_bytes"]
    with open_checkpoint(variants.fused_f32(tmp_path / "c")) as checkpoint:
        assert describe(checkpoint)["rope"]["spelling"] == "rope_parameters"
