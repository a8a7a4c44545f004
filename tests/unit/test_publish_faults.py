"""Whatever fails on the way: published exactly once or not at all, nothing lost, one clear line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from exporter.errors import ExporterError, Refused
from exporter.publish import transaction
from tests.loopback_hub import Drop, Flip, LoopbackHub, Lost, NoRoom, Repo, Short, Status, Then
from tests.loopback_repos import Fault
from tests.publishing import REPO, TOKEN, contents, holds, loopback, put, small_artifact

LATER = (("Retry-After", "3"),)
OTHERS = {".gitattributes": b"*.gguf filter=lfs\n", "LICENSE": b"*.tmp"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    with loopback(monkeypatch, tmp_path) as running:
        yield running


@pytest.fixture
def repo(hub: LoopbackHub) -> Repo:
    """A repository with a file of somebody else's in it."""
    return hub.repo(REPO, OTHERS)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_artifact(tmp_path_factory.mktemp("artifact"))


def once(hub: LoopbackHub, artifact: Path) -> bool:
    """Published, in one commit on the first one, with everything that was there."""
    kept = all(contents(hub)[name] == data for name, data in OTHERS.items())
    return kept and holds(hub, artifact) and len(hub.repos[REPO].made()) == 2


def untouched(hub: LoopbackHub) -> bool:
    return contents(hub) == OTHERS and len(hub.repos[REPO].made()) == 1


def refused(call: Callable[[], object]) -> ExporterError:
    """The error, whose text is one line without a token."""
    with pytest.raises(ExporterError) as caught:
        call()
    error = caught.value
    for text in (error.message, error.hint or ""):
        assert "\n" not in text
        assert TOKEN not in text
    assert error.hint
    return error


PASSING: dict[str, tuple[str, str, tuple[Fault, ...]]] = {
    "revision 503": ("GET", "/revision/main", (Status(503), Status(502, html=True))),
    "revision 429": ("GET", "/revision/main", (Status(429, (("Retry-After", "0"),)),)),
    "revision dropped": ("GET", "/revision/main", (Drop(),)),
    "listing 503": ("GET", "/tree/", (Status(503), Status(429, LATER))),
    "listing dropped": ("GET", "/tree/", (Drop(),)),
    "last listing": ("GET", "/tree/", (Then(bool), Drop(), Status(503))),
    "card 503": ("POST", "validate-yaml", (Status(503),)),
    "card proxy": ("POST", "validate-yaml", (Status(502, html=True),)),
    "card dropped": ("POST", "validate-yaml", (Drop(),)),
    "card at the commit": ("POST", "validate-yaml", (Then(bool), Status(502, html=True), Drop())),
    "preupload 503": ("POST", "/preupload/", (Status(503), Status(500))),
    "preupload 429": ("POST", "/preupload/", (Status(429, LATER), Status(429))),
    "preupload dropped": ("POST", "/preupload/", (Drop(),)),
    "batch 503": ("POST", "/objects/batch", (Status(503),)),
    "batch dropped": ("POST", "/objects/batch", (Drop(), Lost())),
    "put 500": ("PUT", "/_objects/", (Status(500), Status(503), Status(429, LATER))),
    "put dropped": ("PUT", "/_objects/", (Drop(),)),
    "put lost": ("PUT", "/_objects/", (Lost(),)),
    "put checked": ("POST", "/_objects/", (Status(503), Drop())),
    "commit 503": ("POST", "/commit/", (Status(503), Status(500), Status(504))),
    "commit 429": ("POST", "/commit/", (Status(429, (("Retry-After", "0"),)),)),
    "commit proxy": ("POST", "/commit/", (Status(502, html=True),)),
    "commit dropped": ("POST", "/commit/", (Drop(), Drop())),
    "commit lost": ("POST", "/commit/", (Lost(),)),
    "commit busy": ("POST", "/commit/", (Status(409, message="another operation is in progress"), Status(412))),
    "commit dropped, then lost": ("POST", "/commit/", (Drop(), Lost())),
}


@pytest.mark.parametrize("case", PASSING)
def test_what_passes_is_waited_out(hub: LoopbackHub, repo: Repo, artifact: Path, case: str) -> None:
    method, path, faults = PASSING[case]
    hub.inject(method, path, *faults)
    done = put(artifact, tag="v1")
    assert done.made
    assert once(hub, artifact)
    assert not hub.planned(), "a fault was never met"
    assert repo.tags == {"v1": done.commit} == {"v1": repo.refs["main"]}


def test_large_files_go_in_parts_that_fail_one_by_one(hub: LoopbackHub, repo: Repo, artifact: Path) -> None:
    hub.part_size = 100_000
    hub.inject("PUT", "/_objects/", Then(bool), Status(500), Then(bool), Drop())
    put(artifact)
    assert once(hub, artifact)
    assert len(hub.asked("PUT", "/_objects/")) == 4 + 2


def test_a_lost_answer_needs_the_look(
    hub: LoopbackHub, repo: Repo, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the look, the second attempt is told that others were faster: by ourselves."""
    monkeypatch.setattr(transaction, "_look", lambda *_: None)
    hub.inject("POST", "/commit/", Lost())
    refused(lambda: put(artifact))


def test_a_lost_answer_and_a_hub_that_is_gone(hub: LoopbackHub, repo: Repo, artifact: Path) -> None:
    gone = [Drop()] * 12
    hub.inject("POST", "/commit/", Lost(lambda: hub.inject("GET", "/revision/main", *gone)))
    error = refused(lambda: put(artifact))
    assert "does not say whether the commit to me/tiny-GGUF was made" in error.message
    assert "it looks first" in (error.hint or "")
    hub.planned().clear()
    assert not put(artifact).made
    assert once(hub, artifact)


def test_an_answer_lost_while_others_commit(hub: LoopbackHub, repo: Repo, artifact: Path) -> None:
    """The tag goes onto our commit, which is not the newest by then."""

    def others() -> None:
        repo.put({**repo.tree(), ".gitignore": repo.tree()["LICENSE"]}, title="theirs")

    hub.inject("POST", "/commit/", Lost(others))
    done = put(artifact, tag="v1")
    assert [repo.history[sha][1] for sha in repo.made()[:1]] == ["theirs"]
    assert repo.made()[1] == done.commit == repo.tags["v1"]
    assert holds(hub, artifact)
    assert contents(hub)[".gitignore"] == OTHERS["LICENSE"]


def test_others_commit_first(hub: LoopbackHub, repo: Repo, artifact: Path) -> None:
    hub.inject("POST", "/commit/", Then(lambda: repo.put({**repo.tree(), ".gitignore": repo.tree()["LICENSE"]})))
    error = refused(lambda: put(artifact))
    assert "others have committed to main" in error.message
    assert "nothing was published" in error.message
    assert contents(hub) == {**OTHERS, ".gitignore": OTHERS["LICENSE"]}
    sent = len(hub.asked("PUT"))
    put(artifact)
    assert holds(hub, artifact)
    assert contents(hub)[".gitignore"] == OTHERS["LICENSE"]
    assert len(repo.made()) == 3
    assert len(hub.asked("PUT")) == sent, "what had arrived was sent again"


LASTING: dict[str, tuple[str, str, Fault, type[ExporterError], str, str]] = {
    "commit 503": ("POST", "/commit/", Status(503), ExporterError, "is failing (503)", "again"),
    "commit dropped": ("POST", "/commit/", Drop(), ExporterError, "the connection to", "again"),
    "put 503": ("PUT", "/_objects/", Status(503), ExporterError, "is failing (503)", "again"),
    "put dropped": ("PUT", "/_objects/", Drop(), ExporterError, "the connection to", "again"),
    "batch 429": ("POST", "/objects/batch", Status(429), ExporterError, "limits your requests", "wait"),
    "too long a wait": (
        "POST",
        "/preupload/",
        Status(429, (("Retry-After", "7200"),)),
        ExporterError,
        "asks to wait 120 minutes",
        "again",
    ),
    "full account": ("POST", "/objects/batch", NoRoom(), Refused, "has no room for me/tiny-GGUF", "billing"),
    "full account, by status": (
        "POST",
        "/objects/batch",
        Status(403, message="Private repository storage limit reached, please upgrade"),
        Refused,
        "has no room for me/tiny-GGUF: Private repository storage limit reached, please upgrade",
        "billing",
    ),
    "commit too large": (
        "POST",
        "/commit/",
        Status(413, message="Your push exceeds the \x1b[31mquota\nof this account. See https://x.y/z?token=abc"),
        Refused,
        "exceeds the ?[31mquota of this account. See https://x.y/z",
        "billing",
    ),
    "no rights": (
        "POST",
        "/commit/",
        Status(403, message="you don't have the rights"),
        Refused,
        "does not let you write to me/tiny-GGUF: you don't have the rights",
        "hf auth login",
    ),
    "bad request": ("POST", "/commit/", Status(400, message="no such thing"), ExporterError, "no such thing", "check"),
    "refused head": (
        "POST",
        "validate-yaml",
        Status(400, message="bad"),
        Refused,
        "refuses the head of the card",
        "--license",
    ),
}


@pytest.mark.parametrize("case", LASTING)
def test_what_lasts_is_told_and_nothing_is_published(hub: LoopbackHub, repo: Repo, artifact: Path, case: str) -> None:
    method, path, fault, kind, says, cure = LASTING[case]
    hub.inject(method, path, *[fault] * 12)
    error = refused(lambda: put(artifact, tag="v1"))
    assert type(error) is kind
    assert says in error.message
    assert "?token" not in error.message
    assert cure in (error.hint or "")
    assert untouched(hub)
    assert not repo.tags
    hub.planned().clear()
    put(artifact, tag="v1")
    assert once(hub, artifact)


@pytest.mark.parametrize("path", ["/preupload/", "/commit/"])
def test_no_wait_is_longer_than_it_may_be(hub: LoopbackHub, repo: Repo, artifact: Path, path: str) -> None:
    """The client itself makes some requests again, and publishing the others."""
    hub.inject("POST", path, Status(429, (("Retry-After", "86400"),)))
    refused(lambda: put(artifact))
    assert not hub.slept
    hub.inject("POST", path, Status(429, (("Retry-After", "290"),)))
    put(artifact)
    assert 290 <= max(hub.slept) <= 292
    assert once(hub, artifact)


@pytest.mark.parametrize(("method", "path"), [("POST", "/preupload/"), ("PUT", "/_objects/"), ("POST", "/commit/")])
def test_a_token_that_runs_out(hub: LoopbackHub, repo: Repo, artifact: Path, method: str, path: str) -> None:
    hub.inject(method, path, Then(lambda: setattr(hub, "tokens", ())))
    error = refused(lambda: put(artifact))
    assert "does not accept your token" in error.message
    assert error.hint == "hf auth login"
    assert untouched(hub)
    hub.tokens = (TOKEN,)
    put(artifact)
    assert once(hub, artifact)


def test_a_file_that_changes_while_it_is_sent(hub: LoopbackHub, repo: Repo, tmp_path: Path) -> None:
    folder = small_artifact(tmp_path / "own")
    weights = folder / "tiny-mxfp4-q8.gguf"
    hub.inject("POST", "/_objects/", Then(lambda: weights.write_bytes(weights.read_bytes()[::-1])))
    error = refused(lambda: put(folder))
    assert "changed while it was published" in error.message
    assert untouched(hub)


def test_what_the_repository_ignores(hub: LoopbackHub, artifact: Path) -> None:
    hub.repo(REPO, {".gitignore": b"report.html"})
    assert "leaves out report.html" in refused(lambda: put(artifact)).message
    assert sorted(contents(hub)) == [".gitignore"]


def test_a_listing_that_is_not_what_was_sent(hub: LoopbackHub, repo: Repo, artifact: Path) -> None:
    def spoil() -> None:
        tree = repo.tree()
        tree["report.md"] = tree["SHA256SUMS"]
        del tree["LICENSE"]

    hub.inject("GET", "/tree/", Then(bool), Then(spoil))
    error = refused(lambda: put(artifact, tag="v1"))
    assert "report.md and 1 more is not on the Hub as it is here" in error.message
    assert not repo.tags


# What the repository says of itself


def test_a_damaged_manifest_is_read_again(hub: LoopbackHub, repo: Repo, artifact: Path, tmp_path: Path) -> None:
    put(artifact)
    other = small_artifact(tmp_path / "other", recipe="int4-q8")
    hub.inject("GET", "/resolve/", Flip(20))
    put(other)
    assert holds(hub, other)
    assert "tiny-mxfp4-q8.gguf" not in contents(hub)


def test_half_a_manifest_is_read_again(hub: LoopbackHub, repo: Repo, artifact: Path, tmp_path: Path) -> None:
    put(artifact)
    hub.inject("GET", "/resolve/", Short(0.5), Drop())
    other = small_artifact(tmp_path / "other", recipe="int4-q8")
    put(other)
    assert holds(hub, other)
    assert "tiny-mxfp4-q8.gguf" not in contents(hub)


def test_a_manifest_that_stays_damaged(hub: LoopbackHub, repo: Repo, artifact: Path, tmp_path: Path) -> None:
    put(artifact)
    before = contents(hub)
    hub.inject("GET", "/resolve/", *[Flip(20)] * 3)
    error = refused(lambda: put(small_artifact(tmp_path / "other", recipe="int4-q8")))
    assert "manifest.json arrives damaged" in error.message
    assert contents(hub) == before


# A new repository


@pytest.mark.parametrize("fault", [Status(503), Drop(), Lost()], ids=["503", "dropped", "lost"])
def test_making_the_repository(hub: LoopbackHub, artifact: Path, fault: Fault) -> None:
    hub.inject("POST", "/repos/create", fault)
    put(artifact, private=True)
    assert hub.repos[REPO].private
    assert holds(hub, artifact)
    assert len(hub.repos[REPO].made()) == 2


def test_a_repository_that_appears_in_between(hub: LoopbackHub, artifact: Path) -> None:
    hub.inject("POST", "/repos/create", Then(lambda: hub.repo(REPO, OTHERS)))
    assert "there already, and public" in refused(lambda: put(artifact, private=True)).message
    assert untouched(hub)
    del hub.repos[REPO]
    hub.inject("POST", "/repos/create", Then(lambda: hub.repo(REPO, OTHERS)))
    put(artifact)
    assert once(hub, artifact)


# Tags


@pytest.mark.parametrize("fault", [Status(503), Drop(), Lost(), Status(409)], ids=["503", "dropped", "lost", "409"])
def test_the_tag_is_put_once(hub: LoopbackHub, repo: Repo, artifact: Path, fault: Fault) -> None:
    hub.inject("POST", "/tag/", fault)
    done = put(artifact, tag="v1")
    assert repo.tags == {"v1": done.commit}
    assert once(hub, artifact)


def test_a_tag_that_others_put_first(hub: LoopbackHub, repo: Repo, artifact: Path) -> None:
    first = repo.refs["main"]
    hub.inject("POST", "/tag/", Then(lambda: repo.tags.update(v1=first)))
    error = refused(lambda: put(artifact, tag="v1"))
    assert f"tag v1 was put on commit {first[:12]} by others" in error.message
    assert once(hub, artifact)


# Pull requests


def pulls(repo: Repo) -> list[tuple[int, str, int]]:
    """Number, status and commits of each."""
    return [(p.number, p.status, len(repo.made(f"refs/pr/{p.number}")) - len(repo.made())) for p in repo.pulls]


PULL_FAULTS: dict[str, tuple[str, str, tuple[Fault, ...]]] = {
    "none": ("GET", "/nothing", ()),
    "looking 503": ("GET", "/discussions", (Status(503), Drop())),
    "opening 503": ("POST", "/discussions", (Status(503),)),
    "opening dropped": ("POST", "/discussions", (Drop(),)),
    "opening lost": ("POST", "/discussions", (Lost(),)),
    "details lost": ("GET", "/discussions/", (Drop(),)),
    "commit lost": ("POST", "/commit/", (Lost(),)),
    "commit dropped": ("POST", "/commit/", (Drop(),)),
    "publishing lost": ("POST", "/status", (Lost(), Drop())),
}


@pytest.mark.parametrize("case", PULL_FAULTS)
def test_one_pull_request(hub: LoopbackHub, repo: Repo, artifact: Path, case: str) -> None:
    repo.read_only = True
    method, path, faults = PULL_FAULTS[case]
    hub.inject(method, path, *faults)
    done = put(artifact, create_pr=True)
    assert done.pull == 1
    assert done.url == f"{hub.url}/{REPO}/discussions/1"
    assert done.verify == f"exporter verify {REPO}@refs/pr/1"
    assert pulls(repo) == [(1, "open", 1)]
    assert not hub.planned()
    assert holds(hub, artifact, revision="refs/pr/1")
    assert untouched(hub)
    again = put(artifact, create_pr=True)
    assert (again.pull, again.made) == (1, False)
    assert pulls(repo) == [(1, "open", 1)]


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/discussions"), ("POST", "/preupload/"), ("POST", "/commit/"), ("POST", "/status")]
)
def test_a_pull_request_goes_on_in_the_next_run(
    hub: LoopbackHub, repo: Repo, artifact: Path, method: str, path: str
) -> None:
    hub.inject(method, path, *[Drop()] * 12)
    refused(lambda: put(artifact, create_pr=True))
    hub.planned().clear()
    put(artifact, create_pr=True)
    assert pulls(repo) == [(1, "open", 1)]
