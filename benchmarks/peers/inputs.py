"""What every tool is given: one file of token ids, and the bf16 copy that the other tools need.

    python benchmarks/peers/inputs.py CHECKPOINT --tokens tokens.npz --bf16 FOLDER

Run with a Python that has exporter and transformers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np

LENGTH = 256
CALIBRATION, HELD_OUT = 64, 16
BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def write_tokens(checkpoint: Path, path: Path) -> dict[str, dict[str, str]]:
    """calibration int64 [64, 256] and held_out int64 [16, 256]; which text each is of, and a digest of its ids."""
    from exporter.validate import text

    tokenizer = checkpoint / "tokenizer.json"
    found = {
        "calibration": text.windows(tokenizer, text.standard_library("calibration"), CALIBRATION, LENGTH),
        "held_out": text.windows(tokenizer, text.standard_library("held-out"), HELD_OUT, LENGTH),
    }
    np.savez(path, allow_pickle=False, **{part: windows.tokens for part, windows in found.items()})
    return {
        part: {
            "text": windows.source,
            "windows": "x".join(map(str, windows.tokens.shape)),
            "sha256_of_ids": hashlib.sha256(windows.tokens.tobytes()).hexdigest(),
        }
        for part, windows in found.items()
    }


def write_bf16(checkpoint: Path, folder: Path) -> None:
    """The checkpoint with its experts decoded to bf16 (every MXFP4 number is one), fused as transformers has them."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, Mxfp4Config

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    del config["quantization_config"]
    config["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for name in BESIDE:
        if (checkpoint / name).exists():
            shutil.copyfile(checkpoint / name, folder / name)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--bf16", type=Path)
    args = parser.parse_args()
    if args.tokens:
        print(json.dumps(write_tokens(args.checkpoint, args.tokens)))
    if args.bf16:
        write_bf16(args.checkpoint, args.bf16)


if __name__ == "__main__":
    main()
