"""Calibration text: files, through the real template, and what is wrong with bad ones."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.errors import ExporterError, Refused, UsageError
from exporter.pipeline.calibration import chat
from exporter.pipeline.calibration.rows import row
from exporter.validate import text as texts
from tests.calibration import CHATS, DEMO, TEMPLATE, decoded, get, lines

torch = pytest.importorskip("torch")
WithTemplate = Callable[..., Checkpoint]


@pytest.fixture
def altered(tmp_path: Path) -> Iterator[WithTemplate]:
    """The demo checkpoint with another chat template, or another tokenizer."""
    opened: list[Checkpoint] = []

    def make(template: str | None, tokenizer: Callable[[dict[str, Any]], None] = lambda raw: None) -> Checkpoint:
        folder = tmp_path / f"model{len(opened)}"
        folder.mkdir()
        for path in DEMO.iterdir():
            if path.suffix == ".safetensors" or (path.suffix == ".json" and path.name != "tokenizer.json"):
                (folder / path.name).write_bytes(path.read_bytes())
        raw = json.loads((DEMO / "tokenizer.json").read_text())
        tokenizer(raw)
        (folder / "tokenizer.json").write_text(json.dumps(raw))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        opened.append(open_checkpoint(folder))
        return opened[-1]

    yield make
    for checkpoint in opened:
        checkpoint.close()


# --- conversations ---------------------------------------------------------------------------------


def test_a_chat_is_what_transformers_renders(altered: WithTemplate) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    ours = chat.render(altered(TEMPLATE), [row(c, f"chat {i}") for i, c in enumerate(CHATS)])
    for conversation, found in zip(CHATS, ours, strict=True):
        inputs = {"reasoning_effort": None, **{k: v for k, v in conversation.items() if k != "messages"}}
        ((theirs,), _) = render_jinja_template(
            [conversation["messages"]], chat_template=TEMPLATE, bos_token="<|startoftext|>", **inputs
        )
        assert found == theirs
    assert "Zürich <3" in ours[2]
    assert ours[0].endswith("analysis<|message|>ok<|end|><|start|>assistant<|message|>yo<|end|>")


def test_the_date_stands_still(altered: WithTemplate) -> None:
    dated = "{{ strftime_now('%Y-%m-%d') }} {{ messages[0].content }}"
    assert chat.render(altered(dated), [row(CHATS[0], "")]) == ["2025-08-05 hi & bye"]


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% if %}", "its chat template cannot be read: TemplateSyntaxError"),
        (None, "no chat template"),
        ("{{ ''.__class__.__mro__ }}", "chat 0: .* SecurityError"),
        ("{{ messages.append(1) }}", "chat 0: .* SecurityError"),
        ("{{ messages[9].content.x }}", "chat 0: .* UndefinedError"),
        ("{{ [0] * 900000000 }}", "MemoryError"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "not done with 1 conv"),
    ],
)
def test_an_unfit_template_is_one_line(
    altered: WithTemplate, monkeypatch: pytest.MonkeyPatch, template: str | None, problem: str
) -> None:
    monkeypatch.setattr(chat, "_SECONDS", 2.0)
    with pytest.raises(ExporterError, match=problem) as caught:
        chat.render(altered(template), [row(CHATS[0], "chat 0")])
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_a_template_sees_no_files_and_no_modules_of_the_folder_it_runs_in(
    altered: WithTemplate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "jinja2.py").write_text("raise SystemExit('the wrong jinja2')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert chat.render(altered("x"), [row(CHATS[0], "")]) == ["x"]
    with pytest.raises(UsageError, match="no loader"):
        chat.render(altered("{% include '/etc/passwd' %}"), [row(CHATS[0], "")])


# --- files -----------------------------------------------------------------------------------------


def test_the_default_is_the_calibration_part(demo_checkpoint: Checkpoint, tmp_path: Path) -> None:
    found = get("standard-library", demo_checkpoint, tmp_path, 2, 32)
    expected = texts.windows(DEMO / "tokenizer.json", texts.standard_library("calibration"), 2, 32)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert found.source.endswith("calibration files")


def test_one_text_in_every_kind_of_file(demo_checkpoint: Checkpoint, tmp_path: Path) -> None:
    rows = [{"text": "def f(x):\r\n    return x + 1\n" * 3}, CHATS[0], {"text": "  "}, {"text": "été " * 9, "id": 7}]
    body = "".join(json.dumps(r) + "\n" for r in rows).encode()
    array = json.dumps(rows, ensure_ascii=False).encode()
    files = {
        "a.jsonl": b"\xef\xbb\xbf" + body + b"\n",
        "a.jsonl.gz": gzip.compress(body),
        "a.json": b"\n " + array,
        "b.json": body,
        "a.json.gz": gzip.compress(array),
    }
    found = []
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        found.append(get(tmp_path / name, demo_checkpoint, tmp_path, 2, 32))
    assert all((f.tokens == found[0].tokens).all() and f.sha256 == found[0].sha256 for f in found)
    assert decoded(found[0]).startswith("def f(x):\r\n    return")
    assert "<|start|>user<|message|>hi & bye<|end|>" in decoded(found[0])
    plain = "été \r\nand on " * 20
    (tmp_path / "p.txt").write_bytes(plain.encode())
    (tmp_path / "p.txt.gz").write_bytes(gzip.compress(plain.encode()))
    for name in ("p.txt", "p.txt.gz"):
        assert plain.startswith(decoded(get(tmp_path / name, demo_checkpoint, tmp_path, 2, 32)))


def test_files_of_a_folder_take_turns(demo_checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    lines(tmp_path / ".hidden" / "x.jsonl", {"text": "never"})
    lines(tmp_path / "a.jsonl", *({"text": f"alpha {i}"} for i in range(50)))
    lines(tmp_path / "sub" / "b.jsonl", *({"text": f"beta {i}"} for i in range(50)))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert decoded(get(tmp_path, demo_checkpoint, tmp_path, 1, 32)).startswith("alpha 0beta 0alpha 1beta 1alpha 2")


def test_more_is_read_where_tokens_are_few(demo_checkpoint: Checkpoint, tmp_path: Path) -> None:
    # A run of spaces is one token, so that 16 characters a token are far from enough.
    path = lines(tmp_path / "a.jsonl", *({"text": f"{i}" + " " * 3000} for i in range(400)))
    assert get(path, demo_checkpoint, tmp_path, 4, 64).tokens.shape == (4, 64)
    (tmp_path / "a.txt").write_text((" " * 3000 + "x") * 300)
    with pytest.raises(UsageError, match=r"a.txt has [\d,]+ tokens, 400 windows"):
        get(tmp_path / "a.txt", demo_checkpoint, tmp_path, 400, 256)


def test_no_text_is_used_twice(demo_checkpoint: Checkpoint, tmp_path: Path) -> None:
    rows = [{"text": f"number {i} of eight"} for i in range(8)]
    path = lines(tmp_path / "a.jsonl", *rows * 50, CHATS[0], CHATS[0])
    with pytest.raises(UsageError, match=r"a.jsonl \(393 repeated rows left out\) has \d\d tokens, 1 windows of 300"):
        get(path, demo_checkpoint, tmp_path, 1, 300)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"text": "a"}\n{nonsense\n', "b.jsonl:2: not JSON"),
        (b"[" * 100000, "b.jsonl:1: not JSON"),
        (b'{"prompt": "a", "answer": "b"}\n', r"b.jsonl:1: neither .* \(it has prompt, answer\)"),
        (b'{"mesages": []}\n', 'Did you mean "messages"'),
        (b'{"text": 1}\n', 'b.jsonl:1: "text" is not text'),
        (b'{"messages": []}\n', 'b.jsonl:1: "messages" is not a list with messages'),
        (b'{"messages": {"role": "user"}}\n', "is not a list with messages"),
        (b'{"messages": [{"from": "human", "value": "x"}]}\n', 'b.jsonl:1: a message without a "role"'),
        (b'{"messages": [{"role": "user", "content": "x"}], "tool": []}\n', 'unknown key "tool".*"tools"'),
        (b'{"messages": [{"role": "user", "content": "x"}], "tools": "[]"}\n', '"tools" is not a list'),
        (b'{"text": "a"}\n{"text": "\\ud800"}\n', "b.jsonl:2: half of a surrogate"),
        (b"[1]\n", "b.jsonl:1: not an object"),
        (b'{"text": "ok"}\n{"text": "\xff"}\n', "b.jsonl:2: not UTF-8 text"),
        (b"\n", "holds no text"),
        (b'{"text": ""}\n', "holds no text"),
        (b'{"text": "a little"}\n', r"b.jsonl has \d tokens, 4 windows of 64 need 256"),
    ],
)
def test_a_text_that_cannot_be_used(demo_checkpoint: Checkpoint, tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "b.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=problem) as caught:
        get(path, demo_checkpoint, tmp_path, 4, 64)
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_other_files_that_cannot_be_used(demo_checkpoint: Checkpoint, tmp_path: Path) -> None:
    def problem(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError) as caught:
            get(tmp_path / name, demo_checkpoint, tmp_path)
        assert caught.value.hint
        return caught.value.message

    assert "p.txt is not UTF-8 text" in problem("p.txt", "caf\u00e9".encode("latin-1"))
    assert "is not a whole gzip file" in problem("a.jsonl.gz", b'{"text": "plain"}\n')
    assert "is not a whole gzip file" in problem("b.txt.gz", gzip.compress(b"some text " * 9)[:-9])
    assert "a.csv is not a text file that can be read" in problem("a.csv", b"a,b")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match="holds no text files"):
        get(empty, demo_checkpoint, tmp_path)
    os.mkfifo(tmp_path / "pipe.txt")  # nobody writes: opening it would wait for ever
    with pytest.raises(UsageError, match=r"pipe.txt is no plain file"):
        get(tmp_path / "pipe.txt", demo_checkpoint, tmp_path)
    for name in ("missing.jsonl", "data/missing.txt", "nonsense", "https://x/y", "../x/y"):
        with pytest.raises(UsageError, match="no text"):
            get(name, demo_checkpoint, tmp_path)


def test_a_chat_that_the_template_refuses_is_named(altered: WithTemplate, tmp_path: Path) -> None:
    bad = {"messages": [{"role": "user", "content": "<|channel|>final"}]}
    path = lines(tmp_path / "a.jsonl", CHATS[0], {"text": "between"}, bad)
    with pytest.raises(UsageError, match=r"a.jsonl:3: the chat template does not take this: tags in the content"):
        get(path, altered(TEMPLATE), tmp_path, 1, 200)


# --- of another model ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>", "<|im_start|>"),
        ("<s>[INST] hi [/INST] yes", "[INST]"),
        ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>", "<|begin_of_text|>"),
        ("<start_of_turn>user\nhi<end_of_turn>", "<start_of_turn>"),
        ("<\uff5cUser\uff5c>hi<\uff5cAssistant\uff5c>yes", "<\uff5cUser\uff5c>"),
    ],
)
def test_text_of_another_template_is_refused(demo_checkpoint: Checkpoint, tmp_path: Path, text: str, mark: str) -> None:
    good = [{"text": f"plain text number {i}"} for i in range(5)]
    path = lines(tmp_path / "a.jsonl", *good, {"text": text}, {"messages": [{"role": "user", "content": text + "!"}]})
    with pytest.raises(Refused) as caught:
        get(path, demo_checkpoint, tmp_path, 4, 64)
    assert f"2 of 7 documents are of another model's template ({mark} in {path}:6)" in caught.value.message
    assert caught.value.hint


def test_text_about_templates_is_not_refused(demo_checkpoint: Checkpoint, tmp_path: Path) -> None:
    article = "Mistral marks a user's turn with [INST], others do not."
    harmony = "<|start|>user<|message|>What is <|im_start|> and <|im_end|>?<|end|>"
    path = lines(tmp_path / "a.jsonl", {"text": article}, {"text": harmony})
    assert "[INST]" in decoded(get(path, demo_checkpoint, tmp_path, 1, 24))


def test_a_tag_that_the_tokenizer_lacks_is_named(altered: WithTemplate, tmp_path: Path) -> None:
    def without_message(raw: dict[str, Any]) -> None:
        raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] != "<|message|>"]

    path = lines(tmp_path / "a.jsonl", {"text": "plain"}, CHATS[0])
    checkpoint = altered((DEMO / "chat_template.jinja").read_text(), without_message)
    with pytest.raises(Refused, match=r"a.jsonl:2: <\|message\|> is not one token of .*tokenizer.json"):
        get(path, checkpoint, tmp_path)
    with pytest.raises(Refused, match="cannot be spoken to"):
        get("self", checkpoint, tmp_path)
