"""llm-compressor's GPTQ on a bf16 copy: INT4 of attention and experts. Run with a Python that has llmcompressor.

It refuses the release itself ("already quantized in a different format"), dequantized on loading or not.
"""

import sys

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import load_quantizable_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM

checkpoint, tokens, out, group = *sys.argv[1:4], int(sys.argv[4])
torch.set_num_threads(1)
rows = np.load(tokens)["calibration"].tolist()
calibration = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(ids) for ids in rows]})
with load_quantizable_moe():
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group)
recipe = GPTQModifier(
    ignore=["re:.*lm_head", "re:.*router"],
    config_groups={"int4": QuantizationScheme(targets=["Linear"], weights=weights)},
)
oneshot(
    model=model,
    dataset=calibration,
    recipe=recipe,
    max_seq_length=len(rows[0]),
    num_calibration_samples=len(rows),
)
model.save_pretrained(out, save_compressed=True)
