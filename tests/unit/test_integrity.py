"""Whatever happens to the files of an artifact, and what shows it: its own lists, or a signature only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from exporter.cli.verify import command
from exporter.errors import ExporterError, UsageError
from exporter.pipeline.delivered import Delivery, look
from exporter.pipeline.integrity import check_artifact, find_artifacts
from exporter.pipeline.progress import Progress
from exporter.pipeline.sign import sign
from tests.conftest import DEMO
from tests.sealed import make_key, resealed, sealed

GGUF = "tiny-gpt-oss-mxfp4-q8.gguf"


@dataclass(frozen=True)
class Shelf:
    """Two artifacts as they were sealed, and a key with its public half."""

    gguf: Path
    mxfp4: Path
    key: Path
    public: Path


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    root = tmp_path_factory.mktemp("shelf")
    return Shelf(sealed(root / "a"), sealed(root / "b", "mxfp4", "mxfp4-bf16"), *make_key(root, "maker"))


@pytest.fixture
def folder(shelf: Shelf, tmp_path: Path) -> Path:
    return shutil.copytree(shelf.gguf, tmp_path / "artifact")


def problems(folder: Path, public: Path | None = None) -> list[str]:
    (artifact,) = look(folder, Progress(), public_key=public).artifacts
    return [problem.message for problem in artifact.problems]


def flip(path: Path, at: int = -9) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))


def forge(folder: Path) -> None:
    flip(folder / GGUF)
    resealed(folder)


Damage = Callable[[Path, Shelf], object]
# What is done -> what the artifact's own lists say to it; "" where only a signature tells.
DAMAGES: dict[str, tuple[Damage, str]] = {
    "a bit of the data": (lambda f, _: flip(f / GGUF, 4_000_000), f"{GGUF} is not the file that SHA256SUMS names"),
    "a bit of manifest.json": (lambda f, _: flip(f / "manifest.json"), "manifest.json is not the file that SHA256SUMS"),
    "a bit of provenance.json": (lambda f, _: flip(f / "provenance.json"), "provenance.json is not the file that SHA"),
    "a digit of SHA256SUMS": (lambda f, _: flip(f / "SHA256SUMS", -60), "is not the one in SHA256SUMS"),
    "the name in SHA256SUMS": (lambda f, _: flip(f / "SHA256SUMS", -3), "is not the one in SHA256SUMS"),
    "the verdict of the report": (
        lambda f, _: edit(f / "report.json", '"status": "passed"', '"status": "-"'),
        "says so",
    ),
    "a report that is none": (lambda f, _: (f / "report.json").write_text("[" * 9999), "report.json is damaged"),
    "a figure of the report": (lambda f, _: edit(f / "report.json", '"kl_mean": 0.0', '"kl_mean": 0.1'), ""),
    "a bit of report.md": (lambda f, _: flip(f / "report.md"), ""),
    "a bit of report.html": (lambda f, _: flip(f / "report.html"), ""),
    "no data": (lambda f, _: (f / GGUF).unlink(), f"{GGUF} is missing"),
    "data cut off": (lambda f, _: (f / GGUF).write_bytes((f / GGUF).read_bytes()[:-1]), "not the 5,932,416 it had"),
    "no manifest.json": (lambda f, _: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "no SHA256SUMS": (lambda f, _: (f / "SHA256SUMS").unlink(), "was exported and never proved"),
    "no provenance.json": (lambda f, _: (f / "provenance.json").unlink(), "provenance.json is missing"),
    "no report.json": (lambda f, _: (f / "report.json").unlink(), "report.json is missing"),
    "no report.html": (lambda f, _: (f / "report.html").unlink(), ""),
    "another file": (lambda f, _: (f / "model.safetensors").touch(), "model.safetensors is not of the artifact"),
    "code in a folder": (lambda f, _: add(f / "code" / "modeling.py"), "code/modeling.py is not of the artifact"),
    "weights among pictures": (lambda f, _: add(f / "plots" / "model.bin"), "plots/model.bin is not of the artifact"),
    "a link to a folder": (lambda f, _: (f / "more").symlink_to(f.parent), "more is not of the artifact"),
    "manifest of another": (
        lambda f, s: shutil.copy(s.mxfp4 / "manifest.json", f),
        "manifest.json is not the file that SHA256SUMS names",
    ),
    "all lists of another": (
        lambda f, s: [shutil.copy(s.mxfp4 / n, f) for n in ("manifest.json", "SHA256SUMS", "provenance.json")],
        "is missing",
    ),
    "report of another": (lambda f, s: shutil.copy(s.mxfp4 / "report.json", f), "says something else"),
    "data and all lists": (lambda f, _: forge(f), ""),
}


def add(path: Path) -> None:
    path.parent.mkdir()
    path.touch()


def test_an_artifact_as_it_was_sealed(folder: Path) -> None:
    checked = check_artifact(folder, Progress())
    assert checked.problems == ()
    assert checked.proof is not None
    assert set(checked.hashes) == {p.name for p in folder.iterdir()}


@pytest.mark.parametrize("case", DAMAGES)
def test_what_the_lists_tell(case: str, folder: Path, shelf: Shelf) -> None:
    damage, says = DAMAGES[case]
    damage(folder, shelf)
    told = problems(folder)
    assert (says in told[0]) if says else told == []


@pytest.mark.parametrize("case", DAMAGES)
def test_a_signature_tells_all_of_them(case: str, folder: Path, shelf: Shelf) -> None:
    sign(folder, shelf.key, Progress())
    assert problems(folder, shelf.public) == []
    damage, _ = DAMAGES[case]
    damage(folder, shelf)
    assert problems(folder, shelf.public)
    assert problems(folder)  # an accident is seen without the key too


@pytest.mark.parametrize("where", ["a digest", "the name of a tensor", "the recipe"])
def test_half_a_character_is_no_text(where: str, folder: Path) -> None:
    body, half = json.loads((folder / "manifest.json").read_text()), "\ud800"
    name = next(iter(body["tensors"]))
    if where == "a digest":
        body["tensors"][name]["digest"] = half
    elif where == "the recipe":
        body["recipe"]["name"] = half
    else:
        body["tensors"][half] = body["tensors"].pop(name)
    (folder / "manifest.json").write_text(json.dumps(body))
    with suppress(ExporterError):
        resealed(folder)
    (told,) = problems(folder)
    assert "manifest.json is damaged: not as exporter writes it" in told


def test_what_a_repository_has_beside_an_artifact(folder: Path, shelf: Shelf) -> None:
    sign(folder, shelf.key, Progress())
    for name in ("README.md", "LICENSE", ".gitattributes", "plots/kl.svg", ".cache/huggingface/x.lock", ".git/HEAD"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("for people")
    assert problems(folder, shelf.public) == []


def test_links_into_a_cache_are_read_through(folder: Path, tmp_path: Path, shelf: Shelf) -> None:
    sign(folder, shelf.key, Progress())
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert problems(snapshot, shelf.public) == []
    flip(folder / GGUF)
    assert len(problems(snapshot, shelf.public)) == 1


# Several


@pytest.fixture
def repository(shelf: Shelf, tmp_path: Path) -> Path:
    for folder in (shelf.gguf, shelf.mxfp4):
        shutil.copytree(folder, tmp_path / "repository" / folder.name)
    (tmp_path / "repository" / "README.md").write_text("# A card")
    return tmp_path / "repository"


def names(found: Delivery) -> list[str]:
    return [artifact.name for artifact in found.artifacts]


def test_every_artifact_of_a_folder_is_looked_at(repository: Path) -> None:
    flip(repository / "gguf-mxfp4-q8" / GGUF)
    found = look(repository, Progress())
    assert names(found) == ["gguf-mxfp4-q8", "mxfp4-mxfp4-bf16"]
    assert [bool(artifact.problems) for artifact in found.artifacts] == [True, False]
    assert names(look(repository, Progress(), folder="mxfp4-mxfp4-bf16")) == ["mxfp4-mxfp4-bf16"]
    with pytest.raises(UsageError, match="no artifact in gguf") as caught:
        look(repository, Progress(), folder="gguf")
    assert caught.value.hint == "it has gguf-mxfp4-q8, mxfp4-mxfp4-bf16"


def test_what_lies_beside_artifacts_is_named(repository: Path) -> None:
    (repository / "stray.gguf").touch()
    assert look(repository, Progress()).beside == ("stray.gguf",)


def test_an_output_folder_is_searched(shelf: Shelf) -> None:
    assert find_artifacts(shelf.gguf.parents[2]) == [shelf.gguf]


def test_a_folder_without_artifacts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no artifact of exporter's"):
        look(tmp_path, Progress())
    with pytest.raises(UsageError, match="is no folder"):
        look(tmp_path / "absent", Progress())


def test_a_list_that_is_someone_elses(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"files": ["a", "b"]}))
    (artifact,) = look(tmp_path, Progress()).artifacts
    assert isinstance(artifact.problems[0], UsageError)
    assert "is not one that exporter wrote" in artifact.problems[0].message


def test_lists_out_of_control(folder: Path) -> None:
    for name in ("manifest.json", "SHA256SUMS"):
        kept = (folder / name).read_bytes()
        for text in (b"", b"\xff\xfe", b"[" * 100_000, b"null", b'{"files": 1}'):
            (folder / name).write_bytes(text)
            (problem,) = look(folder, Progress()).artifacts[0].problems
            assert isinstance(problem, ExporterError)
            assert "\n" not in problem.message
        (folder / name).write_bytes(kept)
    assert problems(folder) == []


# Options


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--class", "exact"], "--class is for a proof"),
        (["--profile", "16gb"], "--profile is for a proof"),
        (["--out", "there"], "--out is for a proof"),
        (["--text", "there"], "--text is for a proof"),
        (["--against", str(DEMO), "--class", "exact"], "which --class and --out are not for"),
        (["--against", str(DEMO), "--folder", "x"], "--public-key and --folder are for files alone"),
        (["--against", str(DEMO), "--public-key", "x"], "--public-key and --folder are for files alone"),
        (["--folder", "x"], "no artifact in x"),
        (["--public-key", "absent.pub"], "no key file absent.pub"),
    ],
)
def test_options_that_make_no_sense_together(options: list[str], says: str, shelf: Shelf) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        command.main([str(shelf.gguf), *options], standalone_mode=False)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("absent.gguf", "absent.gguf does not exist"),
        ("notes.txt", "was not made by exporter"),
        (f"artifact/{GGUF}", "is one file of an artifact"),
    ],
)
def test_paths_that_lead_to_no_artifact(name: str, says: str, folder: Path) -> None:
    (folder.parent / "notes.txt").touch()
    with pytest.raises(UsageError, match=says):
        command.main([str(folder.parent / name)], standalone_mode=False)
