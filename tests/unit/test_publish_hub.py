"""Publishing without faults: what lands where, what stays, and what is refused once the repository is seen."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from exporter.errors import ExporterError, Refused, UsageError
from tests.loopback_hub import LoopbackHub
from tests.publishing import REPO, TOKEN, contents, holds, loopback, put, small_artifact

ONNX = {"model.onnx": b"\x08\x0a" * 500, "model.onnx.data": b"\0" * 30_000, "tokenizer/vocab.txt": b"a\nb\n"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    with loopback(monkeypatch, tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_artifact(tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_artifact(tmp_path_factory.mktemp("onnx"), "onnx", "int4-q8", files=ONNX)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_artifact(tmp_path_factory.mktemp("small"), recipe="int4-q8")


def test_one_artifact_lies_at_the_root(hub: LoopbackHub, gguf: Path) -> None:
    done = put(gguf, tag="v1", message="First", license="apache-2.0")
    assert holds(hub, gguf)
    repo, there = hub.repos[REPO], contents(hub)
    assert not repo.private
    assert [repo.history[sha][1] for sha in repo.made()] == ["First", ""]
    assert b"\n<!-- exporter card -->\n" in there["README.md"]
    assert done.url == f"{hub.url}/{REPO}/commit/{repo.refs['main']}"
    assert done.verify == f"exporter verify {REPO}@v1"
    assert (done.files, done.already) == (len(there) - 1, 0)
    assert done.nbytes == sum(map(len, there.values())) - len(there[".gitattributes"])
    # One preparation and one commit, whatever the number of files.
    assert len(hub.asked("POST", "/preupload/")) == len(hub.asked("POST", "/commit/")) == 1


def test_a_second_run_changes_nothing_and_still_looks(hub: LoopbackHub, gguf: Path) -> None:
    first = put(gguf)
    hub.requests.clear()
    again = put(gguf, tag="v1")
    assert (again.made, again.commit, again.files) == (False, first.commit, 0)
    assert again.already == first.files
    assert hub.repos[REPO].tags == {"v1": first.commit}
    assert not hub.asked("PUT")
    assert not hub.asked("POST", "/commit/")
    assert put(gguf, tag="v1").commit == first.commit
    hub.repos[REPO].put({**hub.repos[REPO].tree(), ".gitignore": hub.repos[REPO].tree()["README.md"]})
    assert put(gguf, tag="v1").commit == first.commit  # the tag is on a commit that has all of it


def test_a_tag_on_something_else_is_refused_first(hub: LoopbackHub, gguf: Path, small: Path) -> None:
    put(gguf, tag="v1")
    sent = len(hub.asked("PUT"))
    with pytest.raises(ExporterError, match=r"has a tag v1 already, on commit .*; nothing was published"):
        put(small, tag="v1")
    assert len(hub.asked("PUT")) == sent
    assert holds(hub, gguf)


def test_several_get_a_folder_each(hub: LoopbackHub, gguf: Path, onnx: Path) -> None:
    put(gguf, onnx)
    assert holds(hub, gguf, "gguf-mxfp4-q8")
    assert holds(hub, onnx, "onnx-int4-q8")
    card = contents(hub)["README.md"].decode()
    assert "gguf-mxfp4-q8/" in card
    assert "onnx-int4-q8/" in card
    assert len(hub.repos[REPO].made()) == 2


def test_one_more_joins_those_that_are_there(hub: LoopbackHub, gguf: Path, onnx: Path, small: Path) -> None:
    put(gguf, onnx)
    before = contents(hub)
    put(small, folder="gguf-int4-q8")
    assert holds(hub, small, "gguf-int4-q8")
    after = contents(hub)
    assert {n: d for n, d in after.items() if n in before and "/" in n and not n.startswith("plots/")} == {
        n: d for n, d in before.items() if "/" in n and not n.startswith("plots/")
    }
    card = after["README.md"].decode()
    assert all(f"{name}/" in card for name in ("gguf-mxfp4-q8", "onnx-int4-q8", "gguf-int4-q8"))
    # The same card as if all had come at once.
    put(gguf, onnx, small, repo="my/tiny-GGUF")
    assert contents(hub, "my/tiny-GGUF")["README.md"].replace(b"my/", b"me/") == after["README.md"]


def test_a_new_one_takes_the_place_of_the_old(hub: LoopbackHub, gguf: Path, small: Path) -> None:
    hub.repo(REPO, {".gitattributes": b"*", "LICENSE": b"mine"})
    put(gguf)
    put(small)
    there = contents(hub)
    assert holds(hub, small)
    assert "tiny-mxfp4-q8.gguf" not in there
    assert there["LICENSE"] == b"mine"
    assert len(hub.repos[REPO].made()) == 3


def test_other_bytes_of_the_same_length_are_sent(hub: LoopbackHub, tmp_path: Path) -> None:
    for i, data in enumerate((b"GGUF\0" + b"a" * 1000, b"GGUF\0" + b"b" * 1000)):
        new = small_artifact(tmp_path / str(i), files={"a.gguf": data, "small.txt": data[5:]})
        put(new)
        assert holds(hub, new)


def test_stale_files_of_a_folder_go_with_the_commit(hub: LoopbackHub, onnx: Path, gguf: Path, tmp_path: Path) -> None:
    put(gguf, onnx)
    fewer = {name: data for name, data in ONNX.items() if "/" not in name}
    new = small_artifact(tmp_path, "onnx", "int4-q8", files={**fewer, "model.onnx": b"\x08\x0b" * 400})
    put(gguf, new)
    assert holds(hub, new, "onnx-int4-q8")
    assert "onnx-int4-q8/tokenizer/vocab.txt" not in contents(hub)
    assert holds(hub, gguf, "gguf-mxfp4-q8")


def test_pictures_that_no_card_shows_any_more_go(hub: LoopbackHub, gguf: Path, tmp_path: Path) -> None:
    put(gguf)
    repo = hub.repos[REPO]
    assert any(name.startswith("plots/") for name in repo.tree())
    repo.put({**repo.tree(), "plots/mine.svg": repo.tree()["README.md"]})
    bare = small_artifact(tmp_path, proof="")
    put(bare, allow_unproven=True)
    assert {name for name in contents(hub) if name.startswith("plots/")} == {"plots/mine.svg"}
    assert not {"report.json", "report.html", "provenance.json"} & set(contents(hub))


def test_unproven_ones_say_so_on_the_card(hub: LoopbackHub, tmp_path: Path, gguf: Path) -> None:
    put(small_artifact(tmp_path, proof=""), allow_unproven=True)
    never = contents(hub)["README.md"]
    put(small_artifact(tmp_path / "f", proof="gate failed"), allow_unproven=True, repo="me/failed")
    failed = contents(hub, "me/failed")["README.md"]
    put(gguf, repo="me/passed")
    passed = contents(hub, "me/passed")["README.md"]
    assert len({never.replace(REPO.encode(), b""), failed.replace(b"me/failed", b""), passed}) == 3
    assert b"not proved" in never.lower() or b"never" in never.lower()
    assert b"failed" in failed.lower()


def test_the_rights_of_tokens(hub: LoopbackHub, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.closed = {"org"}
    with pytest.raises(Refused, match=r"does not let you write to org/new: .*namespace 'org'") as caught:
        put(gguf, repo="org/new")
    assert "hf auth login" in (caught.value.hint or "")
    hub.repo("org/there", {"LICENSE": b"a"})
    with pytest.raises(Refused, match="does not let you write to org/there"):
        put(gguf, repo="org/there")
    assert len(hub.repos["org/there"].made()) == 1
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(Refused, match="does not accept your token") as refused:
        put(gguf)
    assert "hf_wrong" not in refused.value.message
    monkeypatch.delenv("HF_TOKEN")
    hub.requests.clear()
    with pytest.raises(Refused, match="needs a login, and there is none") as none:
        put(gguf)
    assert none.value.hint == "hf auth login"
    assert not [r for r in hub.requests if "/api/models" in r.path or r.method != "GET"]


def test_an_organisation_that_lets_you(hub: LoopbackHub, gguf: Path) -> None:
    put(gguf, repo="org/tiny-GGUF", private=True)
    assert hub.repos["org/tiny-GGUF"].private
    put(gguf, repo="org/tiny-GGUF")  # and stays so
    assert hub.repos["org/tiny-GGUF"].private
    hub.repo("me/public", {})
    with pytest.raises(Refused, match="me/public is there already, and public"):
        put(gguf, repo="me/public", private=True)
    assert hub.repos["me/public"].made() == [hub.repos["me/public"].refs["main"]]


def test_a_job_of_githubs_needs_no_token(hub: LoopbackHub, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_OIDC_RESOURCE", "x")  # so that what is set meanwhile is taken back afterwards
    monkeypatch.delenv("HF_OIDC_RESOURCE")
    monkeypatch.setattr("huggingface_hub.utils._auth._OIDC_TOKEN_CACHE", None)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_URL", f"{hub.url}/_id_token")
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "of the job")
    hub.repo(REPO, {"LICENSE": b"a"})
    with pytest.raises(Refused, match=r"gives this job no token for me/tiny-GGUF: .*no trusted publisher") as caught:
        put(gguf)
    assert "id-token: write" in (caught.value.hint or "")
    hub.trusting = {REPO}
    put(gguf)
    assert holds(hub, gguf)
    assert "hf_jwt_of_a_job" in hub.tokens
    assert not hub.asked("GET", "whoami")


def test_a_branch_is_made(hub: LoopbackHub, gguf: Path) -> None:
    hub.repo(REPO, {"LICENSE": b"a"})
    done = put(gguf, revision="next/one")
    assert holds(hub, gguf, revision="next/one")
    assert contents(hub) == {"LICENSE": b"a"}
    assert done.verify == f"exporter verify {REPO}@next/one"
    put(gguf, revision="next/one")
    assert len(hub.repos[REPO].made("next/one")) == 2


def test_a_pull_request_needs_a_repository(hub: LoopbackHub, gguf: Path) -> None:
    with pytest.raises(UsageError, match="no model me/tiny-GGUF"):
        put(gguf, create_pr=True)
    assert not hub.repos


def test_a_pull_request_of_what_is_there_already_is_none(hub: LoopbackHub, gguf: Path) -> None:
    put(gguf)
    done = put(gguf, create_pr=True)
    assert (done.made, done.pull) == (False, None)
    assert not hub.repos[REPO].pulls


def test_another_pull_request_for_something_else(hub: LoopbackHub, gguf: Path, small: Path) -> None:
    hub.repo(REPO, {"LICENSE": b"a"})
    assert [put(a, create_pr=True).pull for a in (gguf, small, gguf)] == [1, 2, 1]
    hub.repos[REPO].pulls[0].status = "closed"
    assert put(gguf, create_pr=True).pull == 3


ROOM = {
    "a card of others": (
        {"README.md": b"---\nlicense: mit\n---\n# Mine\n"},
        "has a README.md that exporter did not write",
    ),
    "a file of others": ({"tiny-mxfp4-q8.gguf": b"GGUF"}, "has a file tiny-mxfp4-q8.gguf that exporter did not put"),
    "others' manifest": ({"manifest.json": b'{"name": "x"}'}, "has a file manifest.json that exporter did not put"),
    "a broken manifest": ({"manifest.json": b"{"}, "has a file manifest.json that exporter did not put"),
    "a picture of others": ({"plots/kl.svg": b"<svg/>"}, "has a file plots/kl.svg that exporter did not put"),
    "a file beside": ({"notes/old.gguf": b"mine"}, "`exporter verify` would not accept it"),
    "a folder of that name": ({"report.json/x": b"1"}, "has a file where report.json needs a folder"),
}


@pytest.mark.parametrize("case", ROOM)
def test_what_is_of_others_stays(hub: LoopbackHub, gguf: Path, case: str) -> None:
    files, says = ROOM[case]
    hub.repo(REPO, files)
    with pytest.raises(Refused) as caught:
        put(gguf)
    assert says in caught.value.message
    assert contents(hub) == files
    assert not hub.asked("PUT")


def test_a_card_may_be_overwritten(hub: LoopbackHub, gguf: Path) -> None:
    hub.repo(REPO, {"README.md": b"# Mine\n"})
    with pytest.raises(Refused) as caught:
        put(gguf)
    assert "--overwrite-card" in (caught.value.hint or "")
    put(gguf, overwrite_card=True)
    assert holds(hub, gguf)
    # A head alone is what the Hub writes where a licence was chosen.
    hub.repo("me/bare", {"README.md": b"---\nlicense: apache-2.0\n---\n"})
    put(gguf, repo="me/bare")
    assert holds(hub, gguf, repo="me/bare")


def test_root_and_folders_do_not_mix(hub: LoopbackHub, gguf: Path, onnx: Path, small: Path, tmp_path: Path) -> None:
    gptq = small_artifact(tmp_path, "gptq", "int4")  # its readers look at the root only
    put(gguf)
    before = contents(hub)
    with pytest.raises(Refused, match="holds an artifact at its root"):
        put(small, onnx)
    assert contents(hub) == before
    put(small, onnx, repo="me/several")
    with pytest.raises(Refused, match=r"holds artifacts in folders \(gguf-int4-q8\)") as caught:
        put(gguf, repo="me/several")
    assert "--folder" in (caught.value.hint or "")
    with pytest.raises(Refused, match="holds artifacts in folders") as caught:
        put(gptq, repo="me/several")
    assert caught.value.hint == "publish to a repository of its own"
    hub.repo("me/taken", {"gguf-int4-q8/thing.txt": b"mine"})
    with pytest.raises(Refused, match="has a folder gguf-int4-q8 that exporter did not write"):
        put(small, onnx, repo="me/taken")


def test_files_of_others_go_with_an_artifact_in_a_folder(hub: LoopbackHub, gguf: Path) -> None:
    hub.repo(REPO, {"notes/old.gguf": b"mine"})
    put(gguf, folder="gguf-mxfp4-q8")
    assert holds(hub, gguf, "gguf-mxfp4-q8")
    assert contents(hub)["notes/old.gguf"] == b"mine"


def test_a_tag_is_no_branch(hub: LoopbackHub, gguf: Path, small: Path) -> None:
    put(gguf, tag="v1")
    with pytest.raises(UsageError, match="v1 is a tag of me/tiny-GGUF, and no branch"):
        put(small, revision="v1")
    assert holds(hub, gguf)


def test_one_model_one_repository(hub: LoopbackHub, gguf: Path, tmp_path: Path) -> None:
    put(gguf)
    with pytest.raises(Refused, match="holds an artifact of demo/tiny, and this one is of demo/other"):
        put(small_artifact(tmp_path, repo="demo/other"))
    assert holds(hub, gguf)


def test_many_files_in_one_commit(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.page_size = 50
    files = {f"part/{i:03d}.txt": str(i).encode() for i in range(300)}
    folder = small_artifact(tmp_path, "onnx", "int4-q8", files={**files, "empty.txt": b""})
    put(folder)
    assert holds(hub, folder)
    assert len(hub.repos[REPO].made()) == 2
    assert len(hub.asked("POST", "/commit/")) == 1


def _sign_with_everything(folder: Path, key: Path) -> None:
    """As model_signing's own command does."""
    import model_signing

    model_signing.signing.Config().use_elliptic_key_signer(private_key=key).sign(folder, folder / "model.sig")


def test_a_signed_artifact_goes_with_its_signature(hub: LoopbackHub, gguf: Path, tmp_path: Path) -> None:
    pytest.importorskip("model_signing", reason="model_signing is not installed")
    from exporter.pipeline.progress import Progress
    from exporter.pipeline.sign import sign
    from tests.sealed import make_key

    folder = shutil.copytree(gguf, tmp_path / "signed")
    private, _ = make_key(tmp_path, "maker")
    sign(folder, private, Progress())
    put(folder)
    assert holds(hub, folder)
    (folder / "README.md").write_text("# Mine\n")  # what another tool signs as well
    (folder / "model.sig").unlink()
    _sign_with_everything(folder, private)
    with pytest.raises(Refused, match=r"model\.sig is of README\.md too, which is not published"):
        put(folder)
    (folder / "README.md").unlink()
    sign(folder, private, Progress())
    (folder / "report.html").write_text("<h1>Another</h1>\n")
    with pytest.raises(Refused, match=r"model\.sig is of other files: .*report\.html is not the file that was signed"):
        put(folder)


def test_offline(hub: LoopbackHub, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set") as caught:
        put(gguf)
    assert caught.value.hint == "unset HF_HUB_OFFLINE"


def test_the_token_is_in_no_word_of_the_answer(hub: LoopbackHub, gguf: Path) -> None:
    assert TOKEN not in repr(put(gguf))
