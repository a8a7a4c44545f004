"""How to run folders of safetensors: who reads them, and who reads them wrongly."""

from __future__ import annotations

import json
import shlex

from exporter.publish.card.facts import Item
from exporter.publish.card.markup import block, cleaned

_READ_BACK = "The proof read the weights back from the files and computed with exporter's own forward."
_NOTHING = "It was not proved."


def _proved(item: Item) -> str:
    return _READ_BACK if item.status else _NOTHING


def _source(item: Item, repo: str, command: str, folder: str) -> tuple[str, str]:
    """What readers are given, and the command before it: they take the root of a repository by its name."""
    return (folder, command) if item.prefix else (cleaned(repo), "")


def mxfp4(item: Item, repo: str, command: str, folder: str) -> str:
    name, before = _source(item, repo, command, folder)
    quoted = shlex.quote(name)
    limit = f" --max-model-len {item.context}" if item.context else ""
    script = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"name = {json.dumps(name, ensure_ascii=False)}\n"
        "tokenizer = AutoTokenizer.from_pretrained(name)\n"
        'model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="auto")\n'
        'chat = [{"role": "user", "content": "Why is the sky blue?"}]\n'
        'ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)\n'
        "answer = model.generate(**ids.to(model.device), max_new_tokens=256)\n"
        "print(tokenizer.decode(answer[0]))"
    )
    serve = [*([before] if before else []), f"vllm serve {quoted}{limit}"]
    return "\n\n".join(
        [
            f"This is the layout of the release: what loads that loads this. {_proved(item)}",
            "**vLLM**, not run by us:",
            block("sh", "\n".join(serve)),
            "**transformers**, from 4.55 on. It keeps MXFP4 on GPUs that have the kernels (Triton 3.4); anywhere else "
            "it widens the weights to bfloat16, which takes four times the memory. On a small model of this layout "
            "these lines ran on a CPU, widened; on this one they were not run.",
            block("sh", "pip install torch transformers accelerate kernels"),
            block("python", script),
            "**TensorRT-LLM**, PyTorch backend, not run by us:",
            block("sh", f"trtllm-serve {quoted} --backend pytorch"),
        ]
    )


def gptq(item: Item, repo: str, command: str, folder: str) -> str:
    if item.target.startswith("by-name"):
        return (
            f"For readers that take `gate_proj` and `up_proj` at their word. {_proved(item)} "
            "**GPTQModel and auto-round compute nonsense from this folder, without a word**: they take the folder "
            "of target `gptqmodel`.\n\n" + block("sh", command)
        )
    name, before = _source(item, repo, command, folder)
    script = (
        "import torch\n"
        "from gptqmodel import GPTQModel\n\n"
        "# Scales are float16: bfloat16 would round them.\n"
        f"model = GPTQModel.load({json.dumps(name, ensure_ascii=False)}, dtype=torch.float16)\n"
        'answer = model.generate("The sky is blue because", max_new_tokens=64)\n'
        "print(model.tokenizer.decode(answer[0]))"
    )
    return "\n\n".join(
        [
            f"**GPTQModel**, from 7.7 on: it loaded folders of this kind on a CPU and gave their logits. "
            f"This one, and these lines, were not run. {_proved(item)}",
            block("sh", "\n".join(filter(None, ("pip install gptqmodel", before)))),
            block("python", script),
            "**transformers** alone (optimum) replaces linear layers only, and gpt-oss's experts are none there. "
            "**vLLM, SGLang**: not run by us; see logits before you serve it.",
        ]
    )


def compressed_tensors(item: Item, command: str, folder: str) -> str:
    return "\n\n".join(
        [
            f"**transformers with compressed-tensors**. {_proved(item)} transformers does not know single experts of "
            "gpt-oss: alone it starts with random ones, after a warning. `register_experts` in exporter's "
            "`scripts/load_folder.py` tells it in a dozen lines; the script loads the folder and compares it with "
            "its own weights.",
            block(
                "sh",
                f"pip install transformers compressed-tensors\n{command}\n"
                f"python scripts/load_folder.py {shlex.quote(folder)}",
            ),
            "**vLLM, SGLang**: not run by us; see logits before you serve it.",
        ]
    )
