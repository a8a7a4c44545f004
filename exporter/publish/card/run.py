"""How to run an artifact: the commands for its kind, with its names and its context, and what we did not run ourselves.

Flags as in llama.cpp 0.6 (`--hf-file`, `-fa on`), huggingface_hub 2.4 (`hf download`), onnxruntime-genai 0.18, and the
documentation of Ollama, LM Studio, Foundry Local, vLLM, TensorRT-LLM and transformers.js.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping

from exporter.publish.card.facts import Item
from exporter.publish.card.markup import block, cleaned, code, text
from exporter.publish.card.run_folders import compressed_tensors, gptq, mxfp4

UNNAMED = "USER/NAME"
_MODEST = 8192  # tokens, where nothing says what fits
_PART = re.compile(r"-00001-of-\d{5}\.gguf$")
_CHAT = '[{"role": "user", "content": "Why is the sky blue?"}]'


def how_to_run(item: Item, repo: str) -> str:
    """Markdown without headings. repo: "user/name", or "" for one that has no name yet."""
    kind = _KINDS.get(item.format)
    return kind(item, repo or UNNAMED) if kind else f"No commands are known for {text(item.kind)}."


def download(item: Item, repo: str) -> tuple[str, str]:
    """The command that brings the artifact here, and the folder that it is then in."""
    name = cleaned(repo.rpartition("/")[2])
    only = f" --include {shlex.quote(item.prefix + '/*')}" if item.prefix else ""
    folder = f"{name}/{item.prefix}" if item.prefix else name
    return f"hf download {shlex.quote(repo)}{only} --local-dir {shlex.quote(name)}", folder


def _context(item: Item) -> int:
    return item.context or _MODEST


# GGUF


def _gguf(item: Item, repo: str) -> str:
    parts = sorted(name for name in item.files if name.endswith(".gguf"))
    if not parts:
        return "It holds no .gguf file."
    first, many = item.path(parts[0]), len(parts) > 1
    ran = f"The proof ran it in {text(item.runtime)}. " if item.runtime else "It was run in no runtime by us. "
    server = f"llama-server -hf {shlex.quote(repo)} --hf-file {shlex.quote(first)} -c {_context(item)} -fa on --jinja"
    return "\n\n".join(
        [
            f"**llama.cpp**{' (names the first part; the others follow)' if many else ''}. {ran}"
            "This command line was not run by us.",
            block("sh", server),
            f"`-c {_context(item)}` is {_of_context(item)}: a longer one takes more memory. Where the GPU has less, "
            "`--n-cpu-moe 8` keeps the experts of the first 8 layers in main memory; raise the number until it fits. "
            "`--jinja` takes the chat template of the file.",
            _ollama(item, repo, parts),
            _lm_studio(item, repo, parts),
        ]
    )


def _of_context(item: Item) -> str:
    return "the context that it was planned for" if item.context else "a modest context"


def _ollama(item: Item, repo: str, parts: list[str]) -> str:
    """A file of its own sets the context: Ollama's default may be so long that the model falls back to the CPU."""
    command, folder = download(item, repo)
    merged = cleaned(parts[0])
    lines = [command]
    if len(parts) > 1:
        merged = _PART.sub(".gguf", merged)
        source = shlex.quote(f"{folder}/{parts[0]}")
        lines.append(f"llama-gguf-split --merge {source} {shlex.quote(f'{folder}/{merged}')}")
    name = cleaned(item.model).lower() or "gpt-oss"
    modelfile = f"FROM ./{folder}/{merged}\\nPARAMETER num_ctx {_context(item)}\\n"
    lines += [
        f"printf {shlex.quote(modelfile.replace('%', '%%'))} > Modelfile",
        f"ollama create {shlex.quote(name)} -f Modelfile",
        f"ollama run {shlex.quote(name)}",
    ]
    straight = ""
    if len(parts) == 1 and not item.prefix:
        straight = f"{code(f'ollama run hf.co/{repo}:{parts[0]}')} pulls it too, with Ollama's own context. "
    split = "It does not pull files in parts: they are merged first. " if len(parts) > 1 else ""
    return (
        f"**Ollama**, not run by us. {straight}{split}The file is in llama.cpp's dialect of gpt-oss, not in that of "
        f"Ollama's own library. Memory grows with the context; this sets it:\n\n{block('sh', chr(10).join(lines))}"
    )


def _lm_studio(item: Item, repo: str, parts: list[str]) -> str:
    command, folder = download(item, repo)
    if not item.prefix:
        lines = [f"lms get https://huggingface.co/{cleaned(repo)}"]
    else:
        lines = [command, *(f"lms import {shlex.quote(f'{folder}/{part}')}" for part in parts)]
    return (
        f"**LM Studio**, not run by us. Set the context to {_context(item):,} when it loads, and let no other model "
        f"stay loaded.\n\n{block('sh', chr(10).join(lines))}"
    )


# ONNX


def _onnx(item: Item, repo: str) -> str:
    return _web(item, repo) if item.target == "webgpu" else _genai(item, repo)


def _genai(item: Item, repo: str) -> str:
    command, folder = download(item, repo)
    wheel = "onnxruntime-genai-cuda" if item.target == "cuda" else "onnxruntime-genai"
    script = (
        "import json\n"
        "import onnxruntime_genai as og\n\n"
        f"model = og.Model({json.dumps(folder, ensure_ascii=False)})\n"
        "tokenizer = og.Tokenizer(model)\n"
        f"messages = {_CHAT}\n"
        "chat = tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)\n"
        "params = og.GeneratorParams(model)\n"
        f"params.set_search_options(max_length={_context(item)})\n"
        "generator = og.Generator(model, params)\n"
        "generator.append_tokens(tokenizer.encode(chat))\n"
        "stream = tokenizer.create_stream()\n"
        "while not generator.is_done():\n"
        "    generator.generate_next_token()\n"
        '    print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)'
    )
    ran = f"The proof ran it in {text(item.runtime)}." if item.runtime else "It was run in no runtime by us."
    return "\n\n".join(
        [
            f"**onnxruntime-genai**. {ran} `max_length` holds the prompt and the answer, and takes its memory at once.",
            block("sh", f"pip install {wheel}\n{command}"),
            block("python", script),
            "**ONNX Runtime** alone: `model.onnx`, with the inputs of Hugging Face optimum and an empty cache at the "
            "start.",
            "**Foundry Local**, not run by us: put the folder into its cache (`foundry cache location`), with an "
            "`inference_model.json` beside `genai_config.json` that gives the model a name and a prompt template. "
            "That file is not in this repository.",
        ]
    )


def _web(item: Item, repo: str) -> str:
    graph = next((name for name in item.files if name.startswith("onnx/model") and name.endswith(".onnx")), "")
    dtype = graph.removeprefix("onnx/model").removesuffix(".onnx").lstrip("_") or "fp32"
    command, folder = download(item, repo)
    local = item.prefix != ""
    setup = 'import { pipeline, env } from "@huggingface/transformers";\n'
    if local:  # transformers.js reads config.json from the root of a repository
        setup += 'env.localModelPath = "./";\nenv.allowRemoteModels = false;\n'
    else:
        setup = setup.replace(", env", "")
    where = json.dumps(folder if local else cleaned(repo), ensure_ascii=False)
    script = (
        f'{setup}const generate = await pipeline("text-generation", {where}, '
        f'{{ dtype: {json.dumps(dtype)}, device: "webgpu" }});\n'
        f"const messages = {_CHAT};\n"
        "const answer = await generate(messages, { max_new_tokens: 256 });\n"
        "console.log(answer[0].generated_text.at(-1).content);"
    )
    parts = [
        "**transformers.js**, in a browser with WebGPU: not run by us there. "
        + (f"The proof ran its graph in {text(item.runtime)}." if item.runtime else "Its graph was not run either."),
        *([block("sh", command)] if local else []),
        block("js", script),
    ]
    return "\n\n".join(parts)


# TensorRT


def _tensorrt(item: Item, repo: str) -> str:
    command, folder = download(item, repo)
    sm = item.target.removeprefix("sm")
    if sm not in ("75", "80", "120"):
        sm = "80"
    engine = f"python scripts/build_engines.py {shlex.quote(folder)} --sm {sm}"
    return "\n\n".join(
        [
            "**TensorRT-RTX**. Engines are made on the machine that runs them; `README.md` in the folder has the "
            "command lines of `tensorrt_rtx` and `trtexec` with the shapes of `profiles.json`. Or with exporter's own "
            f"script, for compute capability {sm[:-1]}.{sm[-1]} (`--sm` for another):",
            block("sh", f"{command}\npip install tensorrt-rtx-cu13\n{engine}"),
            "No engine ran on a GPU unless the proof below says so. TensorRT-LLM does not read this folder.",
        ]
    )


_KINDS: Mapping[str, Callable[[Item, str], str]] = {
    "gguf": _gguf,
    "onnx": _onnx,
    "tensorrt": _tensorrt,
    "mxfp4": lambda item, repo: mxfp4(item, repo, *download(item, repo)),
    "gptq": lambda item, repo: gptq(item, repo, *download(item, repo)),
    "compressed-tensors": lambda item, repo: compressed_tensors(item, *download(item, repo)),
}
