"""Conversations to measure on: what is in them, that a stop changes nothing, and where there can be none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.errors import ExporterError
from exporter.pipeline import conversations as subject
from exporter.pipeline.calibration.openings import OPENINGS
from exporter.pipeline.conversations import QUESTIONS, Author, Conversations, conversations, greedy, until
from exporter.pipeline.profiles import load_profile
from exporter.pipeline.progress import Progress
from exporter.pipeline.reference import Reference
from exporter.pipeline.source import open_model
from exporter.validate import harmony, text
from tests.conftest import DEMO

torch = pytest.importorskip("torch")
_COUNT, _LENGTH = 4, 256


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def made(demo_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Conversations, Path]:
    """Without a stop, and the folder that has what was written."""
    scratch = tmp_path_factory.mktemp("written")
    return conversations(Author(demo_checkpoint, scratch, "cpu", Progress()), _COUNT, 512), scratch


def said(tokens: Any) -> str:
    tokenizer = text.load_tokenizer(DEMO / "tokenizer.json")
    return str(tokenizer.decode(np.asarray(tokens).reshape(-1).tolist(), skip_special_tokens=False))


def altered(
    folder: Path,
    template: str | None = None,
    tokenizer: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """The demo checkpoint with another template ("" for none), or another tokenizer."""
    shutil.copytree(DEMO, folder)
    if template is not None:
        (folder / "chat_template.jinja").unlink()
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config.pop("chat_template", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    if tokenizer is not None:
        raw = json.loads((folder / "tokenizer.json").read_text())
        tokenizer(raw)
        (folder / "tokenizer.json").write_text(json.dumps(raw))
    return folder


def without(*tags: str) -> Callable[[dict[str, Any]], None]:
    """The same tokens under names that mean nothing."""

    def rename(raw: dict[str, Any]) -> None:
        for token in raw["added_tokens"]:
            if token["content"] in tags:
                token["content"] = token["content"].replace("<|", "<|not_")

    return rename


# What is in them


def test_every_window_thinks_and_then_answers_or_calls(made: tuple[Conversations, Path]) -> None:
    found, _ = made
    assert found.windows.tokens.shape == (_COUNT, _LENGTH)
    tokenizer = text.load_tokenizer(DEMO / "tokenizer.json")
    for w, window in enumerate(found.windows.tokens):
        messages = harmony.parse(window.tolist(), tokenizer)
        first = [(m.role, m.channel, m.recipient) for m in messages[:3]]
        answer = ("assistant", "commentary", "functions.search") if w == 3 else ("assistant", "final", "")
        assert first == [("user", "", ""), ("assistant", "analysis", ""), answer]
        assert messages[0].content == QUESTIONS[w]
        assert messages[1].ended
        assert messages[1].content.strip()
        parts = found.parts[w * _LENGTH : (w + 1) * _LENGTH]
        assert parts.count("analysis") > 20
        assert parts.count("tool call" if w == 3 else "final") > 20
    assert len(found.parts) == found.windows.tokens.size
    assert found.parts == harmony.labels(found.windows.tokens.reshape(-1).tolist(), tokenizer)
    assert "written by the model itself" in found.windows.source


def test_a_call_ends_with_its_own_token(made: tuple[Conversations, Path]) -> None:
    calling = said(made[0].windows.tokens[3])
    assert calling.index("<|call|>") < calling.index("<|start|>user", 10)
    assert "<|return|>" not in calling


def test_its_text_is_not_calibrations(made: tuple[Conversations, Path]) -> None:
    assert not set(QUESTIONS) & set(OPENINGS)
    assert len(set(QUESTIONS)) == len(QUESTIONS)
    mine, theirs = text.standard_library(), text.standard_library("calibration")
    assert max(map(len, set(mine.documents) & set(theirs.documents)), default=0) < 80  # "# This is a package.", twice
    # Nor does the same seed choose the same tokens: the analysis of two windows is not alike either.
    windows = made[0].windows.tokens
    assert len({window.tobytes() for window in windows[:, -64:]}) == _COUNT


class _Stop(Progress):
    """Ends the run after so many tokens, as Control-C does."""

    def __init__(self, tokens: int) -> None:
        self.left = tokens

    def advance(self, amount: int, label: str = "") -> None:
        self.left -= amount
        if self.left < 0:
            raise KeyboardInterrupt


def test_a_stop_changes_nothing(made: tuple[Conversations, Path], demo_checkpoint: Checkpoint, tmp_path: Path) -> None:
    whole, written = made
    with pytest.raises(KeyboardInterrupt):
        conversations(Author(demo_checkpoint, tmp_path, "cpu", _Stop(200)), _COUNT, 512)
    (journal,) = tmp_path.iterdir()
    assert len(journal.read_text().splitlines()) == 6  # blocks of 32
    assert (written / journal.name).read_text().startswith(journal.read_text())
    again = conversations(Author(demo_checkpoint, tmp_path, "cpu", Progress()), _COUNT, 512)
    np.testing.assert_array_equal(again.windows.tokens, whole.windows.tokens)
    assert (again.parts, again.windows.sha256) == (whole.parts, whole.windows.sha256)
    # What is there is not written again: it would not take one token.
    kept = conversations(Author(demo_checkpoint, tmp_path, "cpu", _Stop(32)), _COUNT, 512)
    np.testing.assert_array_equal(kept.windows.tokens, whole.windows.tokens)


def test_a_damaged_record_is_written_again(
    made: tuple[Conversations, Path], demo_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    (journal,) = (p for p in made[1].iterdir() if p.suffix == ".jsonl")
    lines = journal.read_text().splitlines(keepends=True)
    (tmp_path / journal.name).write_text("".join(lines[:7]) + lines[7][:50])  # a stop inside the last line
    again = conversations(Author(demo_checkpoint, tmp_path, "cpu", Progress()), _COUNT, 512)
    np.testing.assert_array_equal(again.windows.tokens, made[0].windows.tokens)


# Openings


def test_the_date_stands_still(tmp_path: Path) -> None:
    template = "<|start|>system<|message|>{{ strftime_now('%Y-%m-%d') }}<|end|>{% for m in messages %}"
    template += "<|start|>{{ m.role }}<|message|>{{ m.content }}{{ tools | length }}<|end|>{% endfor %}"
    with open_checkpoint(altered(tmp_path / "dated", template)) as checkpoint:
        tokenizer = text.load_tokenizer(DEMO / "tokenizer.json")
        rows = [said(row) for row in subject._openings(checkpoint, tokenizer, 4)]
    start = "<|start|>system<|message|>2025-08-05<|end|><|start|>user<|message|>"
    assert rows == [
        f"{start}{QUESTIONS[i]}{1 if i == 3 else 0}<|end|><|start|>assistant"  # every fourth may call a tool
        for i in range(4)
    ]


def test_a_checkpoint_without_a_template_is_asked_all_the_same(tmp_path: Path, demo_checkpoint: Checkpoint) -> None:
    tokenizer = text.load_tokenizer(DEMO / "tokenizer.json")
    with open_checkpoint(altered(tmp_path / "plain", "")) as checkpoint:
        assert checkpoint.chat_template is None
        rows = subject._openings(checkpoint, tokenizer, 20)
    # The demo's own template says no more than this.
    assert rows == subject._openings(demo_checkpoint, tokenizer, 20)
    assert said(rows[17]) == f"<|start|>user<|message|>{QUESTIONS[1]}<|end|><|start|>assistant"


# Answers


def test_answers_are_the_likeliest_tokens(demo_checkpoint: Checkpoint, tmp_path: Path) -> None:
    found = greedy(Author(demo_checkpoint, tmp_path, "cpu", Progress()), 2)
    assert [said(prompt) for prompt in found.prompts] == [
        f"<|start|>user<|message|>{question}<|end|><|start|>assistant" for question in QUESTIONS[:2]
    ]
    assert found.tokens == 32
    assert [len(answer) for answer in found.answers] == [32, 32]
    assert len({token for answer in found.answers for token in answer}) > 8
    # Each is what the plain forward finds likeliest after all before it.
    from exporter.model.reference import reference_logits
    from exporter.numerics import decode

    def read(name: str, start: int, stop: int) -> Any:
        return decode.values(demo_checkpoint.read(name, start, stop))

    row = np.array([found.prompts[0] + found.answers[0]])
    (plain,) = reference_logits(demo_checkpoint.config, read, row, [demo_checkpoint.config.rope], top_k=1)
    at = len(found.prompts[0])
    assert plain.top_ids[at - 1 : -1, 0].tolist() == found.answers[0]


def test_an_answer_stops_with_what_ends_a_turn() -> None:
    assert until([5, 6, 9, 7, 9], frozenset({9, 1})) == [5, 6, 9]
    assert until([5, 6], frozenset({9})) == [5, 6]
    assert until([9], frozenset({9})) == [9]
    assert until([], frozenset({9})) == []


# Where there can be none


@pytest.fixture
def reference_of(tmp_path: Path) -> Callable[[Path], Reference]:
    """A reference on one short window."""
    profile = load_profile("cpu")
    profile = replace(profile, validate=replace(profile.validate, windows=1, length=64))

    def make(folder: Path) -> Reference:
        model = open_model(str(folder), Progress())
        return Reference(model, profile, tmp_path / "out" / "reference", "cpu", Progress())

    return make


def test_a_tokenizer_without_the_format_is_a_reason(tmp_path: Path, reference_of: Callable[[Path], Reference]) -> None:
    folder = altered(tmp_path / "other", tokenizer=without("<|start|>", "<|end|>", "<|message|>", "<|channel|>"))
    with open_checkpoint(folder) as checkpoint, pytest.raises(ExporterError, match=r"has no <\|start\|>"):
        conversations(Author(checkpoint, tmp_path, "cpu", Progress()), 1, 64)
    reference = reference_of(folder)
    assert reference.conversations == "no conversations: the tokenizer has no <|start|>, so it is not one of gpt-oss"
    assert reference.greedy == "no answers: the tokenizer has no <|start|>, so it is not one of gpt-oss"
    further = reference.further(quick=True)
    assert further.columns == []
    assert further.not_run["conversations"].startswith("no conversations: ")


def test_a_template_that_fails_is_a_reason(tmp_path: Path, reference_of: Callable[[Path], Reference]) -> None:
    reference = reference_of(altered(tmp_path / "other", "{{ raise_exception('not for you') }}"))
    assert isinstance(reference.conversations, str)
    assert "the chat template does not take this: " in reference.conversations
    assert "not for you" in reference.conversations
    assert isinstance(reference.greedy, str)


def test_without_channels_the_standard_librarys_text_stands_in(tmp_path: Path) -> None:
    with open_checkpoint(altered(tmp_path / "other", tokenizer=without("<|channel|>"))) as checkpoint:
        found = conversations(Author(checkpoint, tmp_path / "scratch", "cpu", Progress()), 2, 128)
    assert found.windows.tokens.shape == (2, 128)
    assert "standard library" in found.windows.source


def test_a_large_model_reads_conversations_about_sources(
    demo_checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reference_of: Callable[[Path], Reference],
) -> None:
    monkeypatch.setattr(subject, "_SMALL", 1000)
    found = conversations(Author(demo_checkpoint, tmp_path / "written", "cpu", Progress()), 2, 400)
    assert found.windows.tokens.shape == (2, 400)
    assert not (tmp_path / "written").exists()  # the model wrote nothing
    assert set(found.parts) == {"", "header", "analysis", "final"}
    assert found.parts.count("final") > 400
    shown = said(found.windows.tokens[0])
    assert shown.startswith("<|start|>user<|message|>Write a Python module. It begins with: ")
    again = conversations(Author(demo_checkpoint, tmp_path, "cpu", Progress()), 2, 400)
    np.testing.assert_array_equal(again.windows.tokens, found.windows.tokens)
    # On a GPU what it holds whole.
    for whole in (True, False):
        monkeypatch.setattr(subject, "holds", lambda device, parameters, whole=whole: whole and device == "cuda:0")
        assert Author(demo_checkpoint, tmp_path, "cuda:0", Progress()).can_write() is whole
    assert not Author(demo_checkpoint, tmp_path, "cpu", Progress()).can_write()
    reference = reference_of(DEMO)
    assert isinstance(reference.conversations, Conversations)
    assert isinstance(reference.greedy, str)
    assert "takes minutes a token" in reference.greedy
