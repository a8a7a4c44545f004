"""README.md and profiles.json of a folder: what a person needs on the machine that has the GPU."""

from __future__ import annotations

import json

from exporter.formats.base import ExportJob
from exporter.formats.tensorrt.shapes import GRAPHS, PIECE, Shapes, shapes
from exporter.formats.tensorrt.targets import GPUS, Target

_KINDS = ("minShapes", "optShapes", "maxShapes")


def profiles(job: ExportJob, context: int) -> dict[str, Shapes]:
    """The optimization profile of each graph, by input."""
    return {graph: shapes(graph, job.config, context) for graph in GRAPHS}


def profiles_json(job: ExportJob, target: Target, context: int) -> bytes:
    """profiles.json: {"sms": [...], "graphs": {"decode": {input: {"min", "opt", "max"}}}}."""
    graphs = {
        graph: {name: dict(zip(("min", "opt", "max"), each, strict=True)) for name, each in found.items()}
        for graph, found in profiles(job, context).items()
    }
    body = {"sms": list(target.sms), "context": context, "graphs": graphs}
    return (json.dumps(body, indent=1) + "\n").encode()


def command(program: str, graph: str, found: Shapes) -> str:
    """The command line of `trtexec` or `tensorrt_rtx` that makes an engine of one graph."""
    lines = [f"{program} --onnx={graph}.onnx --saveEngine={graph}.engine"]
    for i, kind in enumerate(_KINDS):
        every = ",".join(f"{name}:{'x'.join(map(str, each[i]))}" for name, each in found.items())
        lines.append(f"  --{kind}={every}")
    return " \\\n".join(lines)


def readme(job: ExportJob, target: Target, context: int) -> bytes:
    """README.md."""
    found = profiles(job, context)
    gpus = "\n".join(f"| SM{sm} | {GPUS[sm]} |" for sm in target.sms)
    commands = "\n\n".join(command("tensorrt_rtx", graph, each) for graph, each in found.items())
    turing = _TURING if target.oldest < 80 else ""
    fp4 = _FP4 if any(step.scheme.kind == "e2m1" for step in job.steps) else ""
    return _TEXT.format(
        model=job.model_name,
        recipe=job.provenance.recipe,
        gpus=gpus,
        context=f"{context:,}",
        piece=min(PIECE, context),
        commands=commands,
        turing=turing,
        fp4=fp4,
    ).encode()


_FP4 = """
and NVIDIA's `TRT_MXFP8DequantizeLinear`, which decodes MXFP4"""

_TURING = """
Turing (SM75) must be asked for by name, which neither program's default does: in Python,
`config.num_compute_capabilities = 1; config.set_compute_capability(trt.ComputeCapability.SM75, 0)`.
"""

_TEXT = """# {model}: ONNX graphs for TensorRT

Recipe {recipe}. Two graphs over one set of weights (`weights.data`), in operators of ONNX's own domain (opset 23){fp4},
for TensorRT-RTX and for TensorRT from 10.15 on. Engines are made on the machine that runs them, or anywhere with
TensorRT-RTX: it needs no GPU to build.

| compute capability | GPUs |
|---|---|
{gpus}

`decode.onnx` makes one token at a time and dequantizes only the experts that were chosen. `prefill.onnx` takes a prompt
in chunks of up to {piece} tokens and sends them through all experts. Each engine holds all weights: where memory is
short, load `prefill` alone (it takes single tokens too) or `decode` alone (prompts token by token).

## Make the engines

For {context} tokens in all; `profiles.json` has the same shapes for programs. `trtexec` of TensorRT takes the same
options as `tensorrt_rtx` of TensorRT-RTX. What was proved was built from Python, as `scripts/build_engines.py` of
exporter does. Building takes about three times the bytes of the weights in the memory of the machine that does it.

```
{commands}
```
{turing}
## Inputs and outputs

`input_ids`, `position_ids` int64 [B, S] (positions count from 0 for the first token that is not padding; in the shapes
above B = 1); `attention_mask` int64 [B, P + S], 0 for padding; `past_key_values.N.key` and `.value` float16
[B, kv_heads, P, head_dim], P = 0 at the start. `logits` float32 [B, S, vocabulary]; `present.N.key` and `.value` are
the next call's past.

`report.json` says what was proved, and on what: no engine ran on a GPU unless it says `"executed_on_gpu": true`.
TensorRT-LLM does not read this folder: it takes the format `mxfp4`.
"""
