"""The two released models: configuration and file hashes, so that plans and checks need no download.

Sources: config.json of openai/gpt-oss-20b at 6cee5e81 and openai/gpt-oss-120b at b5c939de; the
hashes are those that several public integrity lists agree on.
"""

from __future__ import annotations

from exporter.model.config import FULL, SLIDING, ModelConfig, RopeConfig


def _config(layers: int, experts: int) -> ModelConfig:
    return ModelConfig(
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        num_local_experts=experts,
        num_experts_per_tok=4,
        vocab_size=201088,
        max_position_embeddings=131072,
        sliding_window=128,
        layer_types=tuple(FULL if i % 2 else SLIDING for i in range(layers)),
        rms_norm_eps=1e-5,
        swiglu_limit=7.0,
        swiglu_alpha=1.702,
        hidden_act="silu",
        tie_word_embeddings=False,
        rope=RopeConfig(150000.0, "yarn", 32.0, 32.0, 1.0, 4096, False),
        bos_token_id=199998,
        eos_token_id=200002,
        pad_token_id=199999,
    )


RELEASED: dict[str, ModelConfig] = {
    "openai/gpt-oss-20b": _config(24, 32),
    "openai/gpt-oss-120b": _config(36, 128),
}

# sha256 by (repository, revision): a download of a known revision is checked against these too.
KNOWN_SHA256: dict[tuple[str, str], dict[str, str]] = {
    ("openai/gpt-oss-20b", "6cee5e81ee83917806bbde320786a8fb61efebee"): {
        "model-00000-of-00002.safetensors": "16d0f997dcfc4462089d536bffe51b4bcea2f872f5c430be09ef8ed392312427",
        "model-00001-of-00002.safetensors": "4fbe328ab445455d6f58dc73852b85873bd626986310abd91cd4d2ce3245eaea",
        "model-00002-of-00002.safetensors": "a18106b209e9ab35c3406db4f6f12a927364a058b21e9d1373d682e20674b303",
        "model.safetensors.index.json": "0e085b977c4c9942f85938828e8c989ed7d5cdabf852e4da6a67c116cd502cd1",
        "config.json": "3a2a26ded679375b7928ddeca59764df7cea83220c1961035f6d6e232659e9ce",
        "generation_config.json": "f9970ada892d2d1f72e3ed0a6535ccebadd11897318794ca671d8c7014c957da",
        "tokenizer.json": "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3",
        "tokenizer_config.json": "9279e942392b742d633c7adbb89ebe002c98399db8926a7af5125c726f404070",
        "special_tokens_map.json": "dd5e191d20c12d2fee1da5bae14ca1db0f5f4215300af691f23cdee97120a293",
        "chat_template.jinja": "a4c9919cbbd4acdd51ccffe22da049264b1b73e59055fa58811a99efbd7c8146",
    },
}


def released_repo(name: str) -> str | None:
    """The Hub id that "openai/gpt-oss-20b", "gpt-oss-20b" or "20b" means (and 120b); None for others."""
    for repo in RELEASED:
        if name in (repo, repo.split("/")[1], repo.rsplit("-", 1)[1]):
            return repo
    return None
