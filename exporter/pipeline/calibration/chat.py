"""Conversations as the model sees them: through the checkpoint's own chat template."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exporter.checkpoint import Checkpoint
from exporter.errors import BadCheckpoint, ExporterError, MissingExtra, UsageError
from exporter.pipeline.calibration.rows import Row

_WORKER = Path(__file__).with_name("chat_worker.py")
_SECONDS, _SECONDS_EACH = 30.0, 0.05
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def render(checkpoint: Checkpoint, rows: Sequence[Row]) -> list[str]:
    """The chats of `rows` as text, special tokens written out; nothing after the last message.

    Raises BadCheckpoint when the template is missing or unfit, UsageError naming the row that it
    does not take.
    """
    if not rows:
        return []
    if checkpoint.chat_template is None:
        raise BadCheckpoint(
            f"{checkpoint.path}: no chat template, which conversations need",
            hint="copy chat_template.jinja from the source model",
        )
    return rendered(checkpoint.path, checkpoint.chat_template, checkpoint.tokenizer_config or {}, rows)


def rendered(where: Path, template: str, tokenizer_config: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    """The same by the template of `where`. "add_generation_prompt": true in a chat opens the assistant's turn."""
    if importlib.util.find_spec("jinja2") is None:
        raise MissingExtra("jinja2", "validate", "reading conversations")
    settings = {"template": template, "tokens": _tokens(tokenizer_config)}
    lines = _run([settings, *(row.chat for row in rows)], _SECONDS + _SECONDS_EACH * len(rows))
    last = lines[-1] if lines else None
    if isinstance(last, dict):
        reason = " ".join(str(last["error"]).split())[:300]
        if last["number"] < 0:
            raise BadCheckpoint(f"{where}: its chat template cannot be read: {reason}", hint="copy it again")
        raise UsageError(
            f"{rows[last['number']].where}: the chat template does not take this: {reason}",
            hint="repair or remove that conversation",
        )
    if len(lines) != len(rows):
        raise ExporterError(
            f"{rows[len(lines)].where}: the chat template ended without an answer (out of memory?)",
            hint="repair or remove that conversation, or check chat_template.jinja",
        )
    return [str(line) for line in lines]


def _tokens(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """bos_token and its like; some files give each as an object."""
    found = {}
    for name in _SPECIAL:
        token = tokenizer_config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[name] = token
    return found


def _run(lines: Sequence[Any], seconds: float) -> list[Any]:
    """What the worker answers to these lines, as far as it got."""
    with tempfile.TemporaryFile("w+") as question, tempfile.TemporaryFile("w+") as answer:
        for line in lines:
            question.write(json.dumps(line) + "\n")
        question.seek(0)
        try:
            # -I: neither the working directory nor PYTHON* variables choose what is imported.
            subprocess.run(
                [sys.executable, "-I", str(_WORKER)],
                stdin=question,
                stdout=answer,
                stderr=subprocess.DEVNULL,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ExporterError(
                f"the chat template was not done with {len(lines) - 1} conversations after {seconds:.0f} s",
                hint="check chat_template.jinja: a released one takes milliseconds",
            ) from None
        answer.seek(0)
        return [json.loads(line) for line in answer if line.endswith("\n")]
