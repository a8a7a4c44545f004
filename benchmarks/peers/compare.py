"""Outputs of the tools against the release, both in float32 by transformers: a JSON list on stdout.

    python benchmarks/peers/compare.py CHECKPOINT tokens.npz FOLDER ...

Run with a Python that has transformers and gguf. Divergences are over the whole vocabulary, in float64.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decode import Unreadable, decode
from torch import Tensor


def load_release(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM, Mxfp4Config

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    )
    return model.float().eval()


@torch.inference_mode()
def log_probabilities(model: Any, window: Tensor) -> Tensor:
    """float64 [T, V] of one window int64 [T]."""
    logits = model(window[None], use_cache=False).logits[0]
    return torch.log_softmax(logits.double(), -1)


def figures(model: Any, reference: list[Tensor], windows: Tensor) -> dict[str, Any]:
    """KL(release || output) in nats, share of equal most likely tokens, change of the loss on the text itself.

    The windows' own means are kept: two outputs are compared window by window, where the text's
    difficulty, most of the spread, cancels.
    """
    kl, same, loss = [], [], []
    for window, p in zip(windows, reference, strict=True):
        q = log_probabilities(model, window)
        kl.append((p.exp() * (p - q)).sum(-1))
        same.append((p.argmax(-1) == q.argmax(-1)).double())
        loss.append((p - q)[:-1].gather(1, window[1:, None])[:, 0])
    every = torch.cat(kl)
    return {
        "kl_mean": float(every.mean()),
        "kl_p99": float(every.quantile(0.99)),
        "top1": float(torch.cat(same).mean()),
        "delta_nll": float(torch.cat(loss).mean()),
        "kl_windows": [round(float(k.mean()), 6) for k in kl],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("folders", nargs="+", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    windows = torch.from_numpy(np.load(args.tokens)["held_out"])
    model = load_release(args.checkpoint)
    release = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reference = [log_probabilities(model, window) for window in windows]
    report: list[dict[str, Any]] = []
    for folder in args.folders:
        try:
            found = decode(folder, release)
        except Unreadable as error:
            report.append({"unreadable": str(error)})
            continue
        model.load_state_dict(found.tensors)
        report.append({**figures(model, reference, windows), "read_back": found.facts})
    print(json.dumps(report))


if __name__ == "__main__":
    main()
