"""exporter verify org/name: a repository of artifacts from a Hub on loopback, by the real client, with faults."""

import shutil
import sys

import pytest
from huggingface_hub import constants

from exporter.checkpoint import hub as checkpoint_hub
from exporter.checkpoint.hub import HubModel
from exporter.errors import ExporterError, UsageError
from exporter.pipeline.delivered import look
from exporter.pipeline.progress import Progress
from exporter.pipeline.sign import sign
from tests.conftest import DEMO, run_exporter
from tests.loopback_hub import Drop, Flip, LoopbackHub, Short, Status
from tests.sealed import make_key, sealed

REPO = HubModel("demo/made")
GGUF = "gguf-mxfp4-q8/tiny-gpt-oss-mxfp4-q8.gguf"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Two signed artifacts side by side, as they are published, and the key."""
    root = tmp_path_factory.mktemp("shelf")
    private, public = make_key(root, "maker")
    for name, made in (("gguf", ("gguf", "mxfp4-q8")), ("folder", ("mxfp4", "mxfp4-bf16"))):
        folder = sealed(root / name, *made)
        sign(folder, private, Progress())
        shutil.copytree(folder, root / "shelf" / folder.name)
    return root / "shelf", public


def files_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def hub(shelf, tmp_path, monkeypatch):
    """The repository demo/made: both artifacts, a card, and what is none of exporter's."""
    client = sys.modules[checkpoint_hub.HubClient.__module__]
    monkeypatch.setattr(client, "ASK_WAITS", (0.0, 0.0))
    monkeypatch.setattr(client, "DOWNLOAD_WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    beside = {"README.md": b"# card", ".gitattributes": b"", "plots/kl.svg": b"<svg/>", "other/model.gguf": b"GGUF"}
    with LoopbackHub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + template[template.index("/{") :])
        running.repo("demo/made", {**files_of(shelf[0]), **beside})
        yield running


def republish(hub, change, name="demo/made"):
    """A new commit of the repository, as somebody who can write to it makes it."""
    repo = hub.repos[name]
    files = {name: blob.data for name, blob in repo.commits[repo.refs["main"]].items()}
    change(files)
    repo.commit(files)


def told(found):
    return {artifact.name: [problem.message for problem in artifact.problems] for artifact in found.artifacts}


def downloaded(hub):
    return {request.path.partition("/resolve/")[2].partition("/")[2] for request in hub.asked("GET", "/resolve/")}


SOUND = {"gguf-mxfp4-q8": [], "mxfp4-mxfp4-bf16": []}


def test_every_artifact_is_downloaded_and_checked(hub, shelf):
    found = look(REPO, Progress(), public_key=shelf[1])
    assert told(found) == SOUND
    assert [artifact.signature for artifact in found.artifacts] == ["good", "good"]
    assert found.revision == hub.repos["demo/made"].refs["main"]
    assert found.beside == ("other/model.gguf",)
    here = {path.relative_to(found.path).as_posix() for path in found.path.rglob("*") if path.is_file()}
    assert here == set(files_of(shelf[0]))  # what is none of exporter's stays where it is
    asked = len(hub.requests)
    assert told(look(REPO, Progress())) == SOUND
    assert len(hub.requests) - asked <= 3  # the revision and the listing


def test_one_artifact_of_several(hub):
    found = look(REPO, Progress(), folder="gguf-mxfp4-q8")
    assert told(found) == {"gguf-mxfp4-q8": []}
    assert not [name for name in downloaded(hub) if not name.startswith("gguf-mxfp4-q8/")]
    with pytest.raises(UsageError, match="no artifact in gguf") as caught:
        look(REPO, Progress(), folder="gguf")
    assert "gguf-mxfp4-q8" in caught.value.hint


def test_without_a_network_the_cache_is_checked(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ExporterError, match="offline, and demo/made is not in the cache"):
        look(REPO, Progress())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    first = look(REPO, Progress())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert told(look(REPO, Progress())) == SOUND
    assert told(look(HubModel("demo/made", first.revision), Progress())) == SOUND
    assert len(hub.requests) == asked


# Downloads


def test_a_flipped_byte_is_found_and_cured(hub):
    hub.inject("GET", "/_cdn/", Flip(4_000_000))
    with pytest.raises(ExporterError, match=r"\.gguf is damaged: its bytes are not those that the Hub lists"):
        look(REPO, Progress())
    assert told(look(REPO, Progress())) == SOUND


def test_half_a_download_goes_on_where_it_stopped(hub):
    hub.inject("GET", "/_cdn/", Short(0.5), Drop(), Drop(), Drop())
    with pytest.raises(ExporterError, match="the connection to"):
        look(REPO, Progress())
    before = len(hub.requests)
    assert told(look(REPO, Progress())) == SOUND
    resumed = [r.byte_range for r in hub.requests[before:] if r.path.startswith("/_cdn/") and r.byte_range]
    assert resumed == ["bytes=2097152-"]  # whole MiB are kept


def test_a_busy_hub_is_asked_again(hub):
    hub.inject("GET", "/revision/", Status(503))
    hub.inject("GET", "/_cdn/", Status(429, (("Retry-After", "0"),)), Drop(), Status(503))
    assert told(look(REPO, Progress())) == SOUND


def test_a_file_of_the_cache_that_changed_is_found(hub):
    found = look(REPO, Progress())
    path = found.path / GGUF
    data = bytearray(path.read_bytes())
    data[5_000_000] ^= 4
    path.resolve().write_bytes(data)
    with pytest.raises(ExporterError, match="is damaged"):
        look(REPO, Progress())
    assert told(look(REPO, Progress())) == SOUND


# What was published


def test_a_file_that_its_lists_do_not_name_is_not_even_downloaded(hub):
    republish(hub, lambda files: files.update({"gguf-mxfp4-q8/pytorch_model.bin": b"\x80\x04."}))
    found = look(REPO, Progress())
    assert told(found)["mxfp4-mxfp4-bf16"] == []
    (problem,) = told(found)["gguf-mxfp4-q8"]
    assert "pytorch_model.bin is not of the artifact" in problem
    assert "gguf-mxfp4-q8/pytorch_model.bin" not in downloaded(hub)


def test_other_weights_are_seen_before_they_are_downloaded(hub):
    republish(hub, lambda files: files.update({GGUF: files[GGUF][:-1] + b"?"}))
    (problem,) = told(look(REPO, Progress()))["gguf-mxfp4-q8"]
    assert problem == f"demo/made: {GGUF} is not the file that its manifest.json names"
    assert GGUF not in downloaded(hub)


def test_weights_that_are_not_there(hub):
    republish(hub, lambda files: files.pop(GGUF))
    (problem,) = told(look(REPO, Progress()))["gguf-mxfp4-q8"]
    assert "is not there: manifest.json names it" in problem


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mxfp4-mxfp4-bf16/config.json", "config.json is not the file that SHA256SUMS names"),
        ("mxfp4-mxfp4-bf16/manifest.json", "manifest.json is not the file that SHA256SUMS names"),
        ("mxfp4-mxfp4-bf16/report.html", "report.html is not the file that was signed"),
    ],
)
def test_a_small_file_that_was_changed_on_the_hub(name, says, hub):
    republish(hub, lambda files: files.update({name: files[name].replace(b"e", b"a", 1)}))
    found = told(look(REPO, Progress()))
    assert found["gguf-mxfp4-q8"] == []
    assert says in found["mxfp4-mxfp4-bf16"][0]


def test_a_signature_that_was_taken_away(hub, shelf):
    republish(hub, lambda files: files.pop("gguf-mxfp4-q8/model.sig"))
    found = look(REPO, Progress(), public_key=shelf[1])
    assert "gguf-mxfp4-q8 is not signed" in told(found)["gguf-mxfp4-q8"][0]


def test_a_repository_of_someone_else(hub):
    hub.repo("demo/theirs", {"model.gguf": b"GGUF", "README.md": b""})
    with pytest.raises(UsageError, match="no artifact of exporter's") as caught:
        look(HubModel("demo/theirs"), Progress())
    assert "--against MODEL" in caught.value.hint
    hub.repo("demo/theirs", {"model.gguf": b"GGUF", "SHA256SUMS": b""})  # a common name
    with pytest.raises(UsageError, match="no artifact of exporter's"):
        look(HubModel("demo/theirs"), Progress())
    with pytest.raises(UsageError, match="no model demo/absent"):
        look(HubModel("demo/absent"), Progress())


def test_the_same_repository_is_a_checkpoint_too(hub, shelf):
    """An MXFP4 folder at the root can be both: neither way of opening it hides files of the other."""
    files = files_of(shelf[0] / "mxfp4-mxfp4-bf16")
    for name, first_as_model in (("demo/one", True), ("demo/two", False)):
        hub.repo(name, {**files, "README.md": b"# card"})
        model = HubModel(name)
        if first_as_model:
            checkpoint_hub.fetch(model)
        assert told(look(model, Progress(), public_key=shelf[1])) == {"": []}
        snapshot = checkpoint_hub.fetch(model)
        assert {"config.json", "tokenizer.json", "README.md"} < set(snapshot.files)


# By the command


@pytest.fixture
def command(hub, tmp_path):
    env = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_OFFLINE": "0",
    }
    return lambda *arguments: run_exporter("verify", *arguments, env=env, cwd=tmp_path)


def test_one_command_on_another_machine(hub, shelf, command):
    done = command("demo/made", "--public-key", shelf[1])
    assert done.code == 0, done.err
    first, second, *_, last = done.out.splitlines()
    assert first.startswith("gguf-mxfp4-q8: gguf mxfp4-q8 of tiny-gpt-oss; its file (5.93 MB) as sealed; gates: passed")
    assert second.startswith("mxfp4-mxfp4-bf16: mxfp4 mxfp4-bf16 of tiny-gpt-oss; all ")
    assert first.endswith("; signature good")
    assert last == "how it behaves was not looked at: --against MODEL"
    revision = hub.repos["demo/made"].refs["main"]
    done = command(f"demo/made@{revision}", "--json")
    assert (done.code, done.json["status"], done.json["revision"]) == (0, "sealed", revision)
    assert [row["signature"] for row in done.json["artifacts"]] == ["not checked"] * 2


def test_what_the_command_says_of_damage(hub, command):
    republish(hub, lambda files: files.update({"gguf-mxfp4-q8/more.bin": b"\x80"}))
    done = command("demo/made")
    assert done.code == 1
    assert "gguf-mxfp4-q8: NOT as it was made: " in done.out
    assert "mxfp4-mxfp4-bf16: mxfp4" in done.out
    assert len(done.err.splitlines()) == 2
    done = command("demo/made", "--json")
    assert (done.code, done.json["status"]) == (1, "damaged")
    assert [row["status"] for row in done.json["artifacts"]] == ["damaged", "sealed"]


def test_a_proof_of_what_is_on_the_hub_is_for_a_copy(command):
    done = command("demo/made", "--against", DEMO)
    assert done.code == 4
    assert "hf download demo/made --local-dir made, then: exporter verify made --against" in done.err
