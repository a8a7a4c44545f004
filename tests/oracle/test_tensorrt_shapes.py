"""Graphs for TensorRT of models that have other sizes than the demo, in ONNX Runtime, against the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.checkpoint import open_checkpoint
from exporter.model.reference import reference_logits
from exporter.numerics import decode
from exporter.validate import metrics
from exporter.validate.onnx_kernels import CPU
from exporter.validate.onnx_session import QMOE_GEMM, Decoding, Graph
from tests import variants
from tests.conftest import run_exporter
from tests.oracle.test_tensorrt_graph import PROFILE

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from safetensors.torch import save_file  # noqa: E402

SLIDING, FULL = "sliding_attention", "full_attention"
SIZES: dict[str, dict[str, Any]] = {
    "three queries to a key, a window of seven": {"heads": (6, 2, 40), "layers": (SLIDING, SLIDING, FULL), "window": 7},
    "one full layer, no grouping, one expert of three": {
        "heads": (4, 4, 16),
        "layers": (FULL,),
        "experts": (3, 1),
        "yarn": False,
    },
    "one key for all, sliding layers alone, every expert": {
        "heads": (8, 1, 24),
        "layers": (SLIDING, SLIDING),
        "experts": (4, 4),
        "window": 33,
    },
}
H, INNER, LENGTH = 96, 160, 80


def checkpoint(
    folder: Path, heads: Any, layers: Any, experts: Any = (5, 2), window: int = 128, yarn: bool = True
) -> Path:
    """A bf16 checkpoint of made-up numbers, its tokenizer the demo's. `heads`: of queries, of keys, and their size."""
    variants.copy(folder)
    for shard in folder.glob("*.safetensors*"):
        shard.unlink()
    (q, kv, size), (count, chosen), rng = heads, experts, torch.Generator().manual_seed(len(layers))

    def numbers(*shape: int, scale: float = 0.3, mean: float = 0.0) -> Any:
        return (torch.randn(*shape, generator=rng) * scale + mean).to(torch.bfloat16)

    def change(config: dict[str, Any]) -> None:
        del config["quantization_config"]
        config.update(hidden_size=H, intermediate_size=INNER, num_attention_heads=q, num_key_value_heads=kv)
        config.update(head_dim=size, num_local_experts=count, num_experts_per_tok=chosen, experts_per_token=chosen)
        config.update(num_hidden_layers=len(layers), layer_types=list(layers), sliding_window=window)
        config.update(max_position_embeddings=4096, rope_scaling=config["rope_scaling"] if yarn else None)

    variants.edit_json(folder / "config.json", change)
    words = json.loads((folder / "config.json").read_text())["vocab_size"]
    tensors = {"model.embed_tokens.weight": numbers(words, H, scale=1), "lm_head.weight": numbers(words, H)}
    tensors["model.norm.weight"] = numbers(H, mean=1)
    for i in range(len(layers)):
        stem = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{stem}.{norm}.weight"] = numbers(H, mean=1)
        tensors[f"{stem}.self_attn.sinks"] = numbers(q, scale=2)
        linear = {"q": (q * size, H), "k": (kv * size, H), "v": (kv * size, H), "o": (H, q * size)}
        for kind, shape in linear.items():
            tensors[f"{stem}.self_attn.{kind}_proj.weight"] = numbers(*shape, scale=0.15)
            tensors[f"{stem}.self_attn.{kind}_proj.bias"] = numbers(shape[0])
        tensors[f"{stem}.mlp.router.weight"] = numbers(count, H)
        tensors[f"{stem}.mlp.router.bias"] = numbers(count)
        for kind, shape in {"gate_up": (H, 2 * INNER), "down": (INNER, H)}.items():
            tensors[f"{stem}.mlp.experts.{kind}_proj"] = numbers(count, *shape, scale=0.1)
            tensors[f"{stem}.mlp.experts.{kind}_proj_bias"] = numbers(count, shape[1])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", SIZES)
def test_other_sizes_are_the_reference(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(QMOE_GEMM, "fp32")
    torch.set_num_threads(1)
    model = checkpoint(tmp_path / "model", **SIZES[name])
    profile = tmp_path / "one.toml"
    profile.write_text(PROFILE + '[[artifact]]\nformat = "tensorrt"\nrecipe = "f32"\ntarget = "sm80"\n')
    done = run_exporter(
        "quantize", "-p", profile, model, "--context", 4096, "--out", tmp_path / "out", "--until", "export", "--json"
    )
    assert done.code == 0, done.err
    folder = Path(done.json["artifacts"][0]["path"])
    paths = [folder / f"{graph}.onnx" for graph in ("prefill", "decode")]
    graphs = [Graph(path, threads=1, provider=CPU, activations="float32") for path in paths]
    with open_checkpoint(model) as opened:
        config = opened.config
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, LENGTH))
        (release,) = reference_logits(
            config, lambda *rows: decode.values(opened.read(*rows)), tokens, [config.rope], top_k=config.vocab_size
        )
    logits = Decoding(graphs[0]).append(tokens[0])
    assert metrics.compare(release, 0, logits).kl.max() < 1e-9
    decoding = Decoding(*graphs)
    pieces = [decoding.append(tokens[0, : LENGTH // 2]), *(decoding.append([t]) for t in tokens[0, LENGTH // 2 :])]
    assert np.abs(np.concatenate(pieces) - logits).max() < 1e-4
