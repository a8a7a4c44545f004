"""What decides a conversation beside the weights: the chat template, the tokens that end an answer, the first token.

A template can put words into every prompt, and a wrong end makes a model that never stops; no logit shows either. So
both templates render the same conversations, in a process of limited time and memory, and the texts are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.checkpoint import Checkpoint
from exporter.checkpoint.headers import read_json
from exporter.checkpoint.source import read_template
from exporter.errors import ExporterError
from exporter.formats.gguf.foreign import GgufModel
from exporter.pipeline.calibration.chat import rendered
from exporter.pipeline.calibration.rows import Row
from exporter.validate.onnx_file import printable

_CAP = 1 << 20  # bytes of a small file
_SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Search.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
    },
}
_CHATS: tuple[dict[str, Any], ...] = (
    {"messages": [{"role": "user", "content": "What is 2 + 2?"}], "add_generation_prompt": True},
    {
        "messages": [
            {"role": "system", "content": "Answer in one line."},
            {"role": "user", "content": "Hi <b>&\u00e9</b>"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "And\n\n\u4e2d\u6587?"},
        ]
    },
    {"messages": [{"role": "user", "content": "Look it up."}], "tools": [_SEARCH], "add_generation_prompt": True},
)


@dataclass(frozen=True)
class Manners:
    """template: None where there is none; named: others beside it. stops: tokens that end an answer, as it says.

    adds_start: whether a start token comes before every prompt.
    """

    template: str | None
    stops: tuple[int, ...]
    adds_start: bool
    named: tuple[str, ...] = ()


def of_gguf(model: GgufModel) -> Manners:
    """As the file's own keys say."""
    return Manners(model.template, model.stops, model.adds_start, model.named_templates)


def of_folder(folder: Path) -> Manners | None:
    """As the small files of a folder say; None where there are none. Raises BadCheckpoint for damaged ones."""
    names = ("chat_template.jinja", "tokenizer_config.json", "generation_config.json", "config.json")
    here = {name: folder / name for name in names if (folder / name).is_file()}
    if not here.keys() - {"config.json"}:
        return None
    said = {name: read_json(path, _CAP) for name, path in here.items() if path.suffix == ".json"}
    tokenizer = said.get("tokenizer_config.json", {})
    stops = _stops(said.get("generation_config.json", {}).get("eos_token_id")) or _stops(
        said.get("config.json", {}).get("eos_token_id")
    )
    template = read_template(here.get("chat_template.jinja"), tokenizer)
    return Manners(template, stops, tokenizer.get("add_bos_token") is True)


def _stops(value: object) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(each for each in values if type(each) is int)


def compare_manners(mine: Manners, checkpoint: Checkpoint) -> dict[str, Any]:
    """`chat` of a report: differs, one line each; equal: none does; template.

    template: "equal", "renders equally", "differs", "missing", or "not compared" where the checkpoint has none.
    """
    differs = []
    generation = checkpoint.generation_config or {}
    known = set(_stops(generation.get("eos_token_id"))) | set(_stops(checkpoint.config.eos_token_id))
    if known and not mine.stops:
        differs.append("it names no token that ends an answer")
    elif known and not known & set(mine.stops):
        differs.append(f"an answer ends with token {mine.stops[0]}, not {min(known)}")
    if mine.adds_start and (checkpoint.tokenizer_config or {}).get("add_bos_token") is not True:
        differs.append("it puts a start token before every prompt")
    differs += [f"it has another template beside its own: {printable(name, 48)}" for name in mine.named]
    template, why = _templates(mine, checkpoint)
    return {"template": template, "differs": differs + why, "equal": not differs and not why}


def _templates(mine: Manners, checkpoint: Checkpoint) -> tuple[str, list[str]]:
    theirs = checkpoint.chat_template
    if theirs is None:
        return ("missing" if mine.template is None else "not compared"), []
    if mine.template is None:
        return "missing", ["it has no chat template"]
    if mine.template == theirs:
        return "equal", []
    for number, chat in enumerate(_CHATS, 1):
        rows, config = [Row(f"conversation {number}", chat=chat)], checkpoint.tokenizer_config or {}
        try:
            (wanted,) = rendered(checkpoint.path, theirs, config, rows)
        except ExporterError:
            continue  # the checkpoint's own does not take this conversation
        try:
            (found,) = rendered(Path("its"), mine.template, config, rows)
        except ExporterError as error:
            return "differs", [f"its chat template fails: {error.message}"]
        if found != wanted:
            at = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), -1)
            near = found[max(0, at) :][:60] if at >= 0 else found[len(wanted) :][:60]
            return "differs", [f"its chat template writes otherwise: {printable(near, 60)!r}"]
    return "renders equally", []
