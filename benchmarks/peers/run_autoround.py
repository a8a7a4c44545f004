"""auto-round on a bf16 copy: INT4 of attention and experts, rounded (0 iterations) or tuned.

Run with a Python that has auto_round.
"""

import sys

import numpy as np
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

checkpoint, tokens, out, group, iterations = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
torch.set_num_threads(1)
rows = torch.from_numpy(np.load(tokens)["calibration"])
calibration = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])} for ids in rows]
AutoRound(
    AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16),
    AutoTokenizer.from_pretrained(checkpoint),
    bits=4,
    group_size=group,
    sym=True,
    iters=iterations,
    nsamples=len(rows),
    seqlen=rows.shape[1],
    dataset=calibration,
    device_map="cpu",
    enable_torch_compile=False,
).quantize_and_save(out, format="auto_gptq")
