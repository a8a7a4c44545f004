"""GPTQModel on a bf16 copy: INT4 of attention and experts. Run with a Python that has gptqmodel.

On two cores it needs GPTQMODEL_CPU_WORKERS=2: its loader asks for two workers of a pool that has one.
It compiles a packing extension with g++ the first time that a machine runs it.
"""

import sys

import numpy as np
import torch
from gptqmodel import GPTQModel, QuantizeConfig

checkpoint, tokens, out, group = *sys.argv[1:4], int(sys.argv[4])
torch.set_num_threads(1)
rows = np.load(tokens)["calibration"].tolist()
calibration = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in rows]
config = QuantizeConfig(bits=4, group_size=group, sym=True, device="cpu", offload_to_disk=False)
model = GPTQModel.load(checkpoint, config)
model.quantize(calibration, batch_size=4)
model.save(out)
