"""A text of the user's own to measure on: which rows are conversations, how much of it is used, what is refused."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.errors import ExporterError, Refused, UsageError
from exporter.pipeline.measured import MeasuredText, measured_text
from exporter.pipeline.progress import Progress
from exporter.types.profile import ValidateSpec
from exporter.validate import harmony, text
from tests.calibration import decoded, lines
from tests.conftest import DEMO

SPEC = ValidateSpec(windows=2, length=64)
SAID = [{"role": "user", "content": "What is a list?"}, {"role": "assistant", "content": "A row of things. " * 12}]


def read(path: Path | str, checkpoint: Checkpoint, spec: ValidateSpec = SPEC) -> MeasuredText:
    return measured_text(str(path), checkpoint, spec, Progress())


def prose(count: int) -> list[dict[str, str]]:
    return [{"text": f"Chapter {i}: of the things that were seen on the way to the sea. "} for i in range(count)]


def chats(count: int) -> list[dict[str, object]]:
    return [{"messages": [{"role": "user", "content": f"Question {i}"}, SAID[1]]} for i in range(count)]


def test_plain_text_is_no_conversation(demo_checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *prose(20))
    found = read(path, demo_checkpoint)
    assert found.conversations is None
    assert found.plain is not None
    assert found.plain.tokens.shape == (2, 64)
    assert decoded(found.plain).startswith("Chapter 0: of the things")
    assert found.plain.source == str(path)


def test_messages_are_conversations_of_the_checkpoints_template(demo_checkpoint: Checkpoint, tmp_path: Path) -> None:
    found = read(lines(tmp_path / "a.jsonl", *chats(20)), demo_checkpoint)
    assert found.plain is None
    assert found.conversations is not None
    windows = found.conversations.windows
    assert windows.tokens.shape == (2, 64)
    assert decoded(windows).startswith("<|start|>user<|message|>Question 0<|end|><|start|>assistant<|message|>A row")
    tokenizer = text.load_tokenizer(DEMO / "tokenizer.json")
    assert found.conversations.parts == harmony.labels(windows.tokens.reshape(-1).tolist(), tokenizer)
    assert found.conversations.parts.count("final") > 64


def test_a_mixed_file_is_both(demo_checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *(each for pair in zip(prose(20), chats(20), strict=True) for each in pair))
    found = read(path, demo_checkpoint)
    assert found.plain is not None
    assert found.conversations is not None
    assert "<|start|>" not in decoded(found.plain)
    assert "Chapter" not in decoded(found.conversations.windows)
    alone = read(lines(tmp_path / "b.jsonl", *prose(20)), demo_checkpoint).plain
    assert alone is not None
    np.testing.assert_array_equal(found.plain.tokens, alone.tokens)


def test_a_folder_is_all_its_files(demo_checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    lines(tmp_path / "texts" / "chats.jsonl", *chats(20))
    (tmp_path / "texts" / "plain.txt").write_text("Alone on the shore. " * 60)
    found = read(tmp_path / "texts", demo_checkpoint)
    assert found.plain is not None
    assert found.conversations is not None
    assert decoded(found.plain).startswith("Alone on the shore. Alone")
    assert found.plain.source == found.conversations.windows.source == str(tmp_path / "texts")


def test_blank_rows_are_no_text(demo_checkpoint: Checkpoint, tmp_path: Path) -> None:
    found = read(lines(tmp_path / "a.jsonl", {"text": " \n"}, *chats(20)), demo_checkpoint)
    assert found.plain is None
    assert found.conversations is not None


@pytest.mark.parametrize(("tokens", "shape"), [(129, (2, 64)), (100, (1, 64)), (70, (1, 64)), (50, (1, 32))])
def test_a_short_text_gives_fewer_or_shorter_windows(
    tokens: int, shape: tuple[int, int], demo_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    tokenizer = text.load_tokenizer(DEMO / "tokenizer.json")
    ids = text.encode(tokenizer, " ".join(f"word{i}" for i in range(200)))
    piece = str(tokenizer.decode(ids[:tokens]))
    (tmp_path / "a.txt").write_text(piece)
    assert abs(len(text.encode(tokenizer, piece)) - tokens) < 3
    found = read(tmp_path / "a.txt", demo_checkpoint).plain
    assert found is not None
    assert found.tokens.shape == shape


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a", r"has fewer than 32 tokens of plain text"),
        (b"Just ten words, which is far too few for anything.", r"has fewer than 32 tokens of plain text"),
        (b"", "holds no text"),
        (b" \n\t\n", "holds no text"),
        ("caf\u00e9".encode("latin-1"), "is not UTF-8 text"),
    ],
)
def test_a_text_with_next_to_nothing_is_refused(
    content: bytes, problem: str, demo_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UsageError, match=problem) as caught:
        read(tmp_path / "a.txt", demo_checkpoint)
    assert "a.txt" in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_too_few_conversations_are_refused_by_name(demo_checkpoint: Checkpoint, tmp_path: Path) -> None:
    one = {"messages": [{"role": "user", "content": "Hi"}]}
    path = lines(tmp_path / "a.jsonl", *prose(20), one)
    with pytest.raises(UsageError, match="fewer than 32 tokens of conversations"):
        read(path, demo_checkpoint)


def test_a_file_whose_name_speaks_of_tokens(demo_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """What a refusal is about is not told by words that the path may have."""
    path = tmp_path / "tokens.jsonl"
    path.write_text(json.dumps({"text": "ok"}) + "\n{nonsense\n")
    with pytest.raises(UsageError, match=r"tokens.jsonl:2: not JSON"):
        read(path, demo_checkpoint)
    foreign = lines(tmp_path / "tokens2.jsonl", *({"text": f"<|im_start|>user {i}<|im_end|>"} for i in range(40)))
    with pytest.raises(Refused, match="are of another model's template"):
        read(foreign, demo_checkpoint)


def test_text_of_another_template_is_refused(demo_checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *({"text": f"<|im_start|>user\nnumber {i}<|im_end|>"} for i in range(40)))
    with pytest.raises(Refused, match=r"are of another model's template \(<\|im_start\|> in .*a.jsonl:1\)"):
        read(path, demo_checkpoint)


def test_conversations_need_a_template(tmp_path: Path) -> None:
    folder = shutil.copytree(DEMO, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    path = lines(tmp_path / "a.jsonl", *chats(20))
    with open_checkpoint(folder) as checkpoint, pytest.raises(ExporterError, match="no chat template"):
        read(path, checkpoint)


def test_no_such_text(demo_checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no text .*nowhere.jsonl"):
        read(tmp_path / "nowhere.jsonl", demo_checkpoint)
    with pytest.raises(UsageError, match="no text self") as caught:
        read("self", demo_checkpoint)
    assert '"self"' not in str(caught.value.hint)  # what calibration takes and this does not


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_of_an_endless_row_no_more_is_tokenized_than_needed(
    demo_checkpoint: Checkpoint, tmp_path: Path, kind: str
) -> None:
    said = "things and more " * 500_000
    path = lines(
        tmp_path / "a.jsonl", {"text": said} if kind == "text" else {"messages": [{**SAID[0], "content": said}]}
    )
    before = time.process_time()
    found = read(path, demo_checkpoint)
    assert time.process_time() - before < 3  # all of it takes 10 s and 2 GB
    windows = found.plain or (found.conversations and found.conversations.windows)
    assert windows
    assert windows.tokens.shape == (2, 64)
