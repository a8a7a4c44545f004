"""What the tests of the endpoint share: the demo checkpoint with a template that opens the answer, as artifacts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from exporter.pipeline.profiles import source_text
from tests.conftest import DEMO, run_exporter

TEMPLATE = """
{%- if tools %}<|start|>developer<|message|>{{ tools | tojson }}<|end|>{% endif -%}
{%- if reasoning_effort %}<|start|>system<|message|>Reasoning: {{ reasoning_effort }}<|end|>{% endif -%}
{%- for m in messages -%}
{%- if m.role == "note" %}{{ raise_exception("no notes") }}{% endif -%}
<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant<|channel|>final<|message|>{%- endif -%}
"""


def make(base: Path, *formats: tuple[str, str, str]) -> dict[str, Path]:
    """format -> folder of each (format, recipe, target), not proved; "folder" -> the checkpoint itself."""
    model = shutil.copytree(DEMO, base / "tiny")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    cpu = source_text("cpu")
    profile = cpu[: cpu.index("[[artifact]]")] + cpu[cpu.index("[validate]") :]
    for fmt, recipe, target in formats:
        profile += f'\n[[artifact]]\nformat = "{fmt}"\nrecipe = "{recipe}"\ntarget = "{target}"\n'
    (base / "some.toml").write_text(profile)
    out = base / "out"
    done = run_exporter("quantize", "-p", base / "some.toml", model, "--out", out, "--until", "export", "--json")
    assert done.code == 0, done.err
    return {a["format"]: Path(a["path"]) for a in done.json["artifacts"]} | {"folder": model}


def log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True)))
