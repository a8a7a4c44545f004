"""Calibration text from elsewhere: written by the model, datasets on the Hub, parquet."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from exporter.checkpoint import Checkpoint
from exporter.checkpoint.hub_dataset import HubDataset, choose, parse_dataset
from exporter.errors import ExporterError, MissingExtra, UsageError
from exporter.pipeline.calibration import calibration_windows
from exporter.pipeline.calibration.openings import OPENINGS
from exporter.pipeline.calibration.written import Script
from exporter.pipeline.progress import Progress
from exporter.types.recipe import CalibrationSpec
from exporter.validate import text as texts
from tests.calibration import CHATS, DEMO, decoded, get, lines
from tests.loopback_hub import Flip, LoopbackHub

torch = pytest.importorskip("torch")
# --- written by the model --------------------------------------------------------------------------


def test_the_model_writes_once_and_goes_on_where_it_was_stopped(
    demo_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    whole = get("self", demo_checkpoint, tmp_path / "a", 4, 72)
    (file,) = (tmp_path / "a").iterdir()
    content = file.read_bytes()
    starts = decoded(whole).split("<|startoftext|>")
    assert starts[0].startswith(f"<|start|>user<|message|>{OPENINGS[0]}<|end|><|start|>assistant")
    assert len(starts) == 2
    assert "written by the model itself" in whole.source

    class Stop(Progress):
        left = 50

        def advance(self, amount: int, label: str = "") -> None:
            self.left -= amount
            if self.left < 0:
                raise KeyboardInterrupt

    setting = CalibrationSpec("self", 4, 72)
    with pytest.raises(KeyboardInterrupt):
        calibration_windows(setting, demo_checkpoint, tmp_path / "b", "cpu", Stop())
    (other,) = (tmp_path / "b").iterdir()
    assert content.startswith(other.read_bytes())
    assert 0 < other.stat().st_size < len(content)
    with other.open("ab") as f:
        f.write(b'{"tokens": [[1, 2')  # torn by a crash
    assert (get("self", demo_checkpoint, tmp_path / "b", 4, 72).tokens == whole.tokens).all()
    assert other.read_bytes() == content
    other.write_bytes(content.replace(b"[[", b"[[-", 1))  # damaged: written anew
    assert (get("self", demo_checkpoint, tmp_path / "b", 4, 72).sha256) == whole.sha256
    assert other.read_bytes() == content

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model was asked again")

    monkeypatch.setattr("exporter.model.generate.Decoder", never)
    assert get("self", demo_checkpoint, tmp_path / "a", 4, 72).sha256 == whole.sha256
    with pytest.raises(AssertionError, match="asked again"):
        get("self", demo_checkpoint, tmp_path / "a", 5, 72)
    with pytest.raises(UsageError, match="1 windows of 1 tokens"):
        get("self", demo_checkpoint, tmp_path, 1, 1)


def test_an_opening_follows_where_an_answer_ends(demo_checkpoint: Checkpoint) -> None:
    tokenizer = texts.load_tokenizer(DEMO / "tokenizer.json")
    script, written_so_far = Script(demo_checkpoint, 4), np.zeros((4, 0), np.int64)
    spoken: list[list[int]] = [[], [], [], []]
    for _ in range(200):
        due = script(written_so_far)
        tokens = np.where(due < 0, 2040, due)  # the model says <|return|> at once
        for window, token in enumerate(tokens):
            spoken[window].append(int(token))
        written_so_far = np.concatenate((written_so_far, tokens[:, None]), axis=1)
    said = [tokenizer.decode(window, skip_special_tokens=False) for window in spoken]
    turn = "<|start|>user<|message|>{}<|end|><|start|>assistant<|return|>"
    assert said[0].startswith(turn.format(OPENINGS[0]) + turn.format(OPENINGS[7]))
    assert said[1].startswith(turn.format(OPENINGS[1]) + turn.format(OPENINGS[8]))
    assert said[3].startswith("<|startoftext|><|return|>" + turn.format(OPENINGS[3]))
    again = Script(demo_checkpoint, 4)
    np.testing.assert_array_equal(again(written_so_far), script(written_so_far))  # a resumed run
    assert len(set(OPENINGS)) == len(OPENINGS)


# --- datasets on the Hub ---------------------------------------------------------------------------

ROWS = "".join(json.dumps({"text": f"row {i} of the training split"}) + "\n" for i in range(40)).encode()
DATASET = {
    "README.md": b"# data",
    "dataset_infos.json": b"{}",
    "data/train-00000.jsonl": ROWS,
    "data/train-00001.jsonl": ROWS.replace(b"row", b"line"),
    "data/test.jsonl": ROWS.replace(b"training", b"test"),
    "other/notes.txt": b"A note that is long enough for a window of sixteen tokens, or so it seems to be.",
    "columns.json": b'[{"prompt": "p", "chosen": "c"}]',
}


@pytest.fixture
def hub(impatient: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    from huggingface_hub import constants

    with LoopbackHub() as running:
        running.repo("datasets/org/chats", DATASET)
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield running


def fetched(hub: LoopbackHub) -> list[str]:
    return [r.path.split("/resolve/")[1].split("/", 1)[1] for r in hub.asked("GET", "/resolve/")]


def test_a_dataset_gives_its_training_split_and_no_more_files_than_needed(
    hub: LoopbackHub, demo_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    found = get("org/chats", demo_checkpoint, tmp_path)
    assert decoded(found).startswith("row 0 of the training")
    assert fetched(hub) == ["data/train-00000.jsonl"]
    commit = hub.repos["datasets/org/chats"].refs["main"]
    assert found.source == f"org/chats@{commit} on the Hub"
    whole = get("org/chats", demo_checkpoint, tmp_path, 40, 16)
    assert "line 0" in decoded(whole)
    assert fetched(hub) == ["data/train-00000.jsonl", "data/train-00001.jsonl"]
    hub.requests.clear()
    again = get(f"org/chats@{commit}:data/train-00000.jsonl", demo_checkpoint, tmp_path)
    assert (again.tokens == found.tokens).all()
    assert hub.requests == []  # a commit in the cache needs no network


@pytest.mark.parametrize(
    ("part", "starts"),
    [("test", "row 0 of the test"), ("other/notes.txt", "A note"), ("other", "A note"), ("train-00001", "line 0")],
)
def test_a_part_of_a_dataset(
    hub: LoopbackHub, demo_checkpoint: Checkpoint, tmp_path: Path, part: str, starts: str
) -> None:
    assert decoded(get(f"org/chats@main:{part}", demo_checkpoint, tmp_path)).startswith(starts)


def test_a_dataset_that_cannot_be_used(hub: LoopbackHub, demo_checkpoint: Checkpoint, tmp_path: Path) -> None:
    def problem(text: str) -> str:
        with pytest.raises(ExporterError) as caught:
            get(text, demo_checkpoint, tmp_path)
        assert caught.value.hint
        assert "\n" not in caught.value.message
        return caught.value.message

    hub.repo("datasets/org/pictures", {"README.md": b"", "train/a.png": b"\x89PNG"})
    assert "no dataset org/none on" in problem("org/none")
    assert "org/chats@v9: no such branch" in problem("org/chats@v9")
    assert "no text files called valid (it has columns.json, data/test.jsonl" in problem("org/chats:valid")
    assert "no text files (it has none)" in problem("org/pictures")
    assert "columns.json[1]: neither" in problem("org/chats:columns.json")
    assert "it has prompt, chosen" in problem("org/chats:columns.json")
    hub.repos["datasets/org/chats"].gated = True
    assert "org/chats is gated" in problem("org/chats:test")
    hub.repos["datasets/org/chats"].gated = False
    hub.inject("GET", "test.jsonl", Flip(3))
    assert "data/test.jsonl is damaged: its bytes are not those that the Hub lists" in problem("org/chats:test")
    assert decoded(get("org/chats:test", demo_checkpoint, tmp_path)).startswith("row 0 of the test")


def test_names_of_datasets() -> None:
    found = parse_dataset("org/name@v1:data/a b.jsonl")
    assert found is not None
    assert (found.repo.repo, found.repo.revision, found.part) == ("org/name", "v1", "data/a b.jsonl")
    assert str(found) == "org/name@v1:data/a b.jsonl"
    assert isinstance(parse_dataset("org/name"), HubDataset)
    for text in ("name", "a/b/c", "../b", "a--b/c", "https://hub/a/b", "org/name@", "org/name:"):
        assert parse_dataset(text) is None
    names = ["training.txt", "x/trained.txt", "x/train/1.txt"]
    assert choose(names, None) == ["x/train/1.txt"]
    assert choose(["a.txt", "b.txt"], None) == ["a.txt", "b.txt"]
    assert choose(["a.txt", "b.txt"], "train") == []


# --- parquet ---------------------------------------------------------------------------------------


def test_parquet_without_its_library(
    demo_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match="pyarrow") as caught:
        get(tmp_path / "a.parquet", demo_checkpoint, tmp_path)
    assert "exporter[datasets]" in (caught.value.hint or "")


def test_parquet_is_read_like_jsonl(demo_checkpoint: Checkpoint, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    chats = [{**CHATS[0], "id": 1}, {**CHATS[1], "id": 2}]  # "thinking" and "reasoning" are null in one each
    parquet.write_table(pyarrow.Table.from_pylist(chats), tmp_path / "a.parquet")
    lines(tmp_path / "a.jsonl", *chats)
    found, expected = (get(tmp_path / name, demo_checkpoint, tmp_path) for name in ("a.parquet", "a.jsonl"))
    assert (found.tokens == expected.tokens).all()
    assert found.sha256 == expected.sha256
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "a", "chosen": "b"}]), tmp_path / "b.parquet")
    with pytest.raises(UsageError, match=r"b.parquet: neither .* \(it has prompt, chosen\)"):
        get(tmp_path / "b.parquet", demo_checkpoint, tmp_path)
    whole = (tmp_path / "a.parquet").read_bytes()
    for damaged in (b"", whole[:-9], whole[:20] + b"\xff" * 30 + whole[50:]):
        (tmp_path / "c.parquet").write_bytes(damaged)
        with pytest.raises(UsageError, match=r"c\.parquet is not a sound parquet file"):
            get(tmp_path / "c.parquet", demo_checkpoint, tmp_path)
