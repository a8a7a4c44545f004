"""What is refused before the Hub is asked, and how artifacts are laid out."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.errors import ExporterError, Refused, UsageError
from exporter.pipeline import publish_artifact
from exporter.pipeline.progress import Progress
from exporter.pipeline.publish import PublishAsk, PublishPlan, plan_publish
from exporter.publish.upload import Changes, operations_of
from tests.publishing import REPO, small_artifact

GGUF = "tiny-mxfp4-q8.gguf"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_artifact(tmp_path_factory.mktemp("made"))


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "tiny" / "16gb" / made.name)


def plan(*artifacts: Path, repo: str = REPO, **more: object) -> PublishPlan:
    return plan_publish(PublishAsk(artifacts, repo, **more), Progress())  # type: ignore[arg-type]


def test_the_plan_has_every_file_once(folder: Path) -> None:
    found = plan(folder)
    here = {p.name: p.stat().st_size for p in folder.iterdir()}
    listed = {each.name: each.size for each in found.uploads}
    assert listed.items() >= here.items()
    assert {name.split("/")[0] for name in listed.keys() - here.keys()} == {"README.md", "plots"}
    assert found.nbytes == sum(listed.values())
    assert len(found.uploads) == len(listed)
    assert found.message.startswith("gguf-mxfp4-q8 of tiny, by exporter ")


def test_large_files_are_hashed_once(folder: Path) -> None:
    """The Hub's client takes the hash that is known; else it would read 13 GB again."""
    found = plan(folder)
    operations = operations_of(Changes(found.uploads), lambda _: None)
    assert all(each.upload_info.is_hashed for each in operations)
    assert [each.upload_info.sha256.hex() for each in operations] == [each.sha256 for each in found.uploads]


def test_what_a_download_leaves_beside_an_artifact_is_not_of_it(folder: Path) -> None:
    before = {each.name for each in plan(folder).uploads}
    for name in (".gitattributes", "README.md", "plots/old.svg", ".cache/huggingface/x.lock", ".git/HEAD"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    (folder / ".cache" / "link").symlink_to("/etc/hostname")
    assert {each.name for each in plan(folder).uploads} == before


def link_out(folder: Path) -> None:
    (folder / "model.link").symlink_to("/etc/hostname")


def link_weights(folder: Path) -> None:
    os.replace(folder / GGUF, folder.parent / "moved.gguf")
    (folder / GGUF).symlink_to(folder.parent / "moved.gguf")


def link_folder(folder: Path) -> None:
    (folder / "sub").symlink_to("/etc", target_is_directory=True)


def flip(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[-9] ^= 1
        (folder / name).write_bytes(data)

    return change


def edit_report(key: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        report = json.loads((folder / "report.json").read_text())
        place = report["subject"] if key == "digest" else report["gates"][0] if key == "passed" else report
        place[key] = value
        (folder / "report.json").write_text(json.dumps(report))

    return change


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link out": (link_out, "model.link is a link"),
    "a link for the weights": (link_weights, f"{GGUF} is a link"),
    "a link to a folder": (link_folder, "sub is a link"),
    "a pipe": (lambda f: os.mkfifo(f / "pipe"), "pipe is no file"),
    "a file too many": (lambda f: (f / "notes.txt").write_text("x"), "notes.txt is not of the artifact"),
    "a file too many in a folder": (
        lambda f: (f / "a").mkdir() or (f / "a" / "b.txt").write_text("x"),
        "a/b.txt is not",
    ),
    "weights changed": (flip(GGUF), f"{GGUF} is not the file that SHA256SUMS names"),
    "weights cut": (lambda f: os.truncate(f / GGUF, 9), f"{GGUF} has 9 bytes"),
    "weights gone": (lambda f: (f / GGUF).unlink(), f"{GGUF} is missing"),
    "manifest changed": (flip("manifest.json"), "manifest.json is not the file that SHA256SUMS names"),
    "provenance changed": (flip("provenance.json"), "provenance.json is not the file that SHA256SUMS names"),
    "report gone": (lambda f: (f / "report.json").unlink(), "report.json is missing"),
    "another verdict": (edit_report("status", "gate failed"), "says something else than manifest.json"),
    "another gate": (edit_report("passed", False), "says something else than manifest.json"),
    "of other numbers": (edit_report("digest", "0" * 64), "says something else than manifest.json"),
    "no signature": (lambda f: (f / "model.sig").write_text("{}"), "model.sig"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_an_artifact_that_is_not_as_it_was_sealed(folder: Path, case: str) -> None:
    damage, says = DAMAGES[case]
    damage(folder)
    with pytest.raises(ExporterError) as caught:
        plan(folder, allow_unproven=True)
    assert says in caught.value.message
    assert caught.value.hint


def test_proofs(tmp_path: Path, folder: Path) -> None:
    never, failed = small_artifact(tmp_path / "n", proof=""), small_artifact(tmp_path / "f", proof="gate failed")
    with pytest.raises(Refused, match="was never proved") as caught:
        plan(never)
    assert "exporter validate" in (caught.value.hint or "")
    with pytest.raises(Refused, match="failed its proof: digests_equal") as caught:
        plan(failed)
    assert "--allow-unproven" in (caught.value.hint or "")
    assert plan(never, allow_unproven=True).artifacts[""].report is None
    assert plan(failed, allow_unproven=True).artifacts[""].report is not None
    assert plan(folder).artifacts[""].report is not None


def test_folders_that_are_none(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nothing", tmp_path / "empty"):
        with pytest.raises(ExporterError) as caught:
            plan(path)
        assert caught.value.hint
    with pytest.raises(UsageError, match="is named twice"):
        plan(folder, folder.parent / "." / folder.name)


def test_a_file_above_the_hubs_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish_artifact, "LARGEST", 100_000)
    with pytest.raises(Refused, match=rf"{GGUF} has 0\.0 GB, above") as caught:
        plan(folder)
    assert "split_size" in (caught.value.hint or "")


def places(*artifacts: Path, **more: object) -> list[str]:
    return list(plan(*artifacts, **more).artifacts)


def test_places(tmp_path: Path, folder: Path) -> None:
    other = small_artifact(tmp_path / "o", recipe="int4-q8")
    same = small_artifact(tmp_path / "s")
    shutil.move(same.parent, same.parents[1] / "24gb")
    same = same.parents[1] / "24gb" / same.name
    assert places(folder) == [""]
    assert places(folder, other) == ["gguf-mxfp4-q8", "gguf-int4-q8"]
    assert places(folder, folder="16gb-best") == ["16gb-best"]
    assert places(folder, root=False) == ["gguf-mxfp4-q8"]
    with pytest.raises(Refused, match="would both be 16gb-gguf-mxfp4-q8"):
        places(folder, same)  # both were proved for 16gb
    report = json.loads((same / "report.json").read_text())
    report["profile"]["name"] = "24gb"
    (same / "report.json").write_text(json.dumps(report))
    from exporter.pipeline.seal import seal_proof

    seal_proof(same, report)
    assert places(folder, same, other) == ["16gb-gguf-mxfp4-q8", "24gb-gguf-mxfp4-q8", "gguf-int4-q8"]
    with pytest.raises(UsageError, match="only one artifact"):
        places(folder, other, folder="x")


def test_what_must_be_at_the_root_is_alone(tmp_path: Path, folder: Path) -> None:
    for fmt in ("mxfp4", "gptq", "compressed-tensors"):
        alone = small_artifact(
            tmp_path / fmt, fmt, "r", files={"model.safetensors": b"\x08" * 50, "config.json": b"{}"}
        )
        assert places(alone) == [""]
        for more in ([folder], []):
            with pytest.raises(Refused, match="reads the root of a repository"):
                places(alone, *more, root=None if more else False)


def test_a_readme_of_its_own_needs_a_folder(tmp_path: Path) -> None:
    engine = small_artifact(tmp_path, "tensorrt", "int4-q8", files={"README.md": b"# Build it", "model.onnx": b"\x08"})
    assert places(engine) == ["tensorrt-int4-q8"]
    assert "tensorrt-int4-q8/README.md" in {each.name for each in plan(engine).uploads}
    with pytest.raises(Refused, match=r"has a README\.md of its own"):
        places(engine, root=True)


def test_models_do_not_mix(tmp_path: Path, folder: Path) -> None:
    for other in (
        small_artifact(tmp_path / "a", recipe="int4-q8", repo="demo/other"),
        small_artifact(tmp_path / "b", recipe="int4-q8", model="other"),
    ):
        with pytest.raises(Refused, match=r"of another revision"):
            plan(folder, other)


BAD_REPOS = (
    "",
    "x",
    "a/b/c",
    "a/",
    "/b",
    "a b/c",
    "a/..",
    "-a/b",
    "a/b--c",
    "a/b.git",
    "https://hub/a",
    "a/b@c",
    "ä/b",
)
BAD_NAMES: list[dict[str, object]] = [
    {"tag": "a b"},
    {"tag": "0" * 40},
    {"tag": "v1.lock"},
    {"revision": "a//b"},
    {"revision": "refs/pr/1"},
    {"revision": ""},
    {"revision": "HEAD"},
    {"revision": "next", "tag": "next"},
    {"tag": "main"},
    {"folder": "README.md"},
    {"folder": "readme.MD"},
    {"folder": "plots"},
    {"message": "a\nb"},
    {"create_pr": True, "revision": "next"},
    {"license": "GPL 3"},
    {"base_model": "x"},
]


@pytest.mark.parametrize("repo", BAD_REPOS)
def test_names_of_repositories(repo: str, folder: Path) -> None:
    with pytest.raises(UsageError, match="is no name of a repository"):
        plan(folder, repo=repo)


@pytest.mark.parametrize("more", BAD_NAMES, ids=str)
def test_names_that_git_or_the_card_would_not_take(more: dict[str, object], folder: Path) -> None:
    with pytest.raises(UsageError) as caught:
        plan(folder, **more)
    assert caught.value.hint


def test_the_same_artifacts_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    first, second = plan(folder).uploads, plan(copy).uploads
    assert [(u.name, u.sha256) for u in first] == [(u.name, u.sha256) for u in second]
