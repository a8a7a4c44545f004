"""Load a gptq or compressed-tensors folder in its reader, and compare logits with the same weights decoded here.

Run it with a Python that has the reader; exporter is not needed:

    python scripts/load_folder.py FOLDER [--windows 4] [--length 256] [--dtype float16]

A gptq folder needs gptqmodel, a compressed-tensors folder transformers and compressed-tensors. Prints one JSON
object: the largest difference of a logit, mean KL in nats, the share of equal top tokens, against float32. The
weights are decoded from the files by a few lines of their own, so this is an oracle for the writer, too.
"""

from __future__ import annotations

import argparse
import json
import os
import sysconfig
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with one, its loader refuses to start on two cores

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GptOssForCausalLM

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float16")
    arguments = parser.parse_args()
    tokens = text_tokens(arguments.folder, arguments.windows, arguments.length)
    method = AutoConfig.from_pretrained(arguments.folder).quantization_config["quant_method"]
    readers = {"gptq": in_gptqmodel, "compressed-tensors": in_transformers}
    if method not in readers:
        raise SystemExit(f"{arguments.folder}: {method}; this compares {' and '.join(readers)} folders")
    load = readers[method]
    with torch.inference_mode():
        wanted = decoded_model(arguments.folder)(tokens).logits.double()
        found = load(arguments.folder, getattr(torch, arguments.dtype))(tokens).logits.double()
    p, q = wanted.log_softmax(-1), found.log_softmax(-1)
    figures = {
        "reader": load.__name__.removeprefix("in_"),
        "dtype": arguments.dtype,
        "tokens": tokens.numel(),
        "max_abs_logit_difference": float((wanted - found).abs().max()),
        "kl_mean": float((p.exp() * (p - q)).sum(-1).mean()),
        "top1": float((wanted.argmax(-1) == found.argmax(-1)).double().mean()),
    }
    print(json.dumps(figures))


def text_tokens(folder: Path, windows: int, length: int) -> torch.Tensor:
    """Ids [windows, length] of modules of the running Python's standard library."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids: list[int] = []
    for name in ("argparse", "calendar", "textwrap", "json/decoder", "difflib", "heapq", "fractions", "statistics"):
        ids += tokenizer.encode((Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text("utf-8"))
    return torch.tensor(ids[: windows * length]).view(windows, length)


# The readers


def in_gptqmodel(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """On the CPU. GPTQModel takes float16 and bfloat16 only."""
    from gptqmodel import BACKEND, GPTQModel

    return GPTQModel.load(str(folder), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=dtype).model.eval()


def in_transformers(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    register_experts()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    # Experts come out in the type of their scales (bfloat16 for MXFP4), whatever was asked for.
    changed: torch.nn.Module = model.to(dtype).eval()
    return changed


def register_experts() -> None:
    """Tell transformers how single experts become gpt-oss's stacked matrices; it knows for other models only.

    Without this it finds no experts in the folder and starts with random ones, after a warning.
    """
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import Concatenate, Interleave, MergeModulelist, Transpose, WeightConverter

    def converter(names: list[str], kind: str, target: str, *then: Any) -> WeightConverter:
        sources = [f"mlp.experts.*.{name}_proj.{kind}" for name in names]
        return WeightConverter(sources, f"mlp.experts.{target}", operations=[MergeModulelist(dim=0), *then])

    in_turns = (Concatenate(dim=1), Interleave(dim=1, inverse=True))
    converters = [
        converter(["gate", "up"], "weight", "gate_up_proj", *in_turns, Transpose(1, 2)),
        converter(["gate", "up"], "bias", "gate_up_proj_bias", *in_turns),
        converter(["down"], "weight", "down_proj", Transpose(1, 2)),
        converter(["down"], "bias", "down_proj_bias"),
    ]
    register_checkpoint_conversion_mapping("gpt_oss", converters, overwrite=True)


# The same weights, decoded


def decoded_model(folder: Path) -> GptOssForCausalLM:
    """The folder's weights in float32, in transformers' own classes."""
    config = AutoConfig.from_pretrained(folder)
    quantization = config.quantization_config
    del config.quantization_config
    raw: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw |= load_file(path)
    parts = (".qweight", ".qzeros", ".scales", ".g_idx", ".weight_packed", ".weight_scale", ".weight_shape")
    state = {name: tensor.float() for name, tensor in raw.items() if not name.endswith(parts)}
    for name in raw:
        layer, _, part = name.rpartition(".")
        if part == "qweight":
            state[f"{layer}.weight"] = decode_gptq(raw, layer, quantization["checkpoint_format"])
        elif part == "weight_packed":
            state[f"{layer}.weight"] = decode_packed(raw, layer)
    halves = quantization.get("exporter", {}).get("gate_up", "").startswith("halves")
    for i in range(config.num_hidden_layers):
        fuse(state, f"model.layers.{i}.mlp.experts.", config.num_local_experts, halves)
    model = GptOssForCausalLM(config).float().eval()
    model.load_state_dict(state)
    return model


def decode_gptq(raw: dict[str, torch.Tensor], layer: str, version: str) -> torch.Tensor:
    """[N, K] of scale * (code - zero)."""
    words, zeros = raw[f"{layer}.qweight"], raw[f"{layer}.qzeros"]
    groups, scales = raw[f"{layer}.g_idx"].long(), raw[f"{layer}.scales"].float()
    bits = 32 * words.shape[0] // len(groups)
    codes = fields(words.T, bits).T  # [K, N]
    zero = fields(zeros, bits) + (1 if version == "gptq" else 0)  # [K / group, N]
    return ((codes - zero[groups]) * scales[groups]).T.contiguous()


def decode_packed(raw: dict[str, torch.Tensor], layer: str) -> torch.Tensor:
    """[N, K] of words of integers, or of bytes of two e2m1 numbers with e8m0 scales."""
    packed, scales = raw[f"{layer}.weight_packed"], raw[f"{layer}.weight_scale"]
    if packed.dtype == torch.uint8:
        codes = torch.stack((packed & 15, packed >> 4), -1).flatten(1).long()
        values = E2M1[codes & 7] * torch.where(codes < 8, 1.0, -1.0)
        return values * torch.exp2(scales.float() - 127).repeat_interleave(32, 1)
    k = int(raw[f"{layer}.weight_shape"][1])
    bits = 32 * packed.shape[1] // k
    codes = fields(packed, bits) - (1 << (bits - 1))
    return codes * scales.float().repeat_interleave(k // scales.shape[1], 1)


def fields(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [n, w] -> its fields of `bits`, low bits first, [n, w * 32 / bits]."""
    at = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words[:, :, None] >> at) & ((1 << bits) - 1)).flatten(1)


def fuse(state: dict[str, torch.Tensor], prefix: str, experts: int, halves: bool) -> None:
    """Replace the layers of single experts by transformers' stacked matrices, gate and up rows in turns."""
    for kind, suffix in (("weight", ""), ("bias", "_bias")):
        gate, up, down = (
            torch.stack([state.pop(f"{prefix}{e}.{name}_proj.{kind}") for e in range(experts)])
            for name in ("gate", "up", "down")
        )
        both = torch.cat((gate, up), 1) if halves else torch.stack((gate, up), 2).flatten(1, 2)  # [E, 2N, ...]
        state[f"{prefix}gate_up_proj{suffix}"] = both.transpose(1, 2) if kind == "weight" else both
        state[f"{prefix}down_proj{suffix}"] = down.transpose(1, 2) if kind == "weight" else down


if __name__ == "__main__":
    main()
