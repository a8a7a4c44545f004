"""What the tests of calibration text share: conversations, a template, and how they read the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from exporter.checkpoint import Checkpoint
from exporter.pipeline.calibration import calibration_windows
from exporter.pipeline.progress import Progress
from exporter.types.recipe import CalibrationSpec
from exporter.validate import text as texts

DEMO = Path(__file__).parent / "data" / "tiny-gpt-oss"
# What the released template uses of jinja: macros, namespaces, the date, refusals, JSON, loop controls.
TEMPLATE = """
{%- macro said(role, what) %}<|start|>{{ role }}<|message|>{{ what }}<|end|>{% endmacro -%}
{%- set last = namespace(call=none) -%}
{{- bos_token + said("system", "Reasoning: " + (reasoning_effort or "medium")) }}
{%- if tools %}{{ said("developer", tools | tojson) }}{% endif -%}
{%- for message in messages -%}
    {%- if message.role == "note" %}{% continue %}{% endif -%}
    {%- if "<|channel|>" in message.content %}{{ raise_exception("tags in the content") }}{% endif -%}
    {%- if "thinking" in message and loop.last %}
        {{- said("assistant<|channel|>analysis", message.thinking) }}
    {%- endif -%}
    {%- if message.tool_calls %}
        {%- set last.call = message.tool_calls[0].function %}
        {{- said("assistant to=functions." + last.call.name, last.call.arguments | tojson) }}
    {%- else %}
        {{- said(message.role, message.content) }}
    {%- endif -%}
{% endfor %}
"""
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich <3", "day": None}}}
CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "hi & bye"}, {"role": "assistant", "content": "yo", "thinking": "ok"}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "reasoning": "r", "content": "b"}]},
    {
        "messages": [
            {"role": "note", "content": "skip"},
            {"role": "assistant", "tool_calls": [CALL], "content": ""},
            {"role": "tool", "content": "21° \\n"},
        ],
        "tools": [{"type": "function", "function": {"name": "weather", "description": 'now "and" then'}}],
        "reasoning_effort": "high",
    },
]


def get(text: Path | str, checkpoint: Checkpoint, scratch: Path, windows: int = 1, length: int = 16) -> texts.Windows:
    return calibration_windows(
        CalibrationSpec(str(text), windows, length), checkpoint, scratch, "cpu", Progress(), 1 << 30
    )


def decoded(found: texts.Windows) -> str:
    tokenizer = texts.load_tokenizer(DEMO / "tokenizer.json")
    return str(tokenizer.decode(found.tokens.reshape(-1).tolist(), skip_special_tokens=False))


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path
