"""The Hub, as seen by the real client against a Hub on loopback that serves the demo checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from huggingface_hub import constants

from exporter.checkpoint import hub
from exporter.checkpoint.hub import HubModel, LocalModel, fetch, parse_model
from exporter.errors import BadCheckpoint, ExporterError, Refused, UsageError
from exporter.hub.files import FileDigest, Record, RemoteFile, discard
from exporter.model.released import KNOWN_SHA256
from tests.hub_demo import DECOYS, DEMO, FILES, MODEL, SHARDS, assert_complete, get
from tests.loopback_hub import Flip, LoopbackHub, Then, WrongSize

# --- which model -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("openai/gpt-oss-20b", HubModel("openai/gpt-oss-20b")),
        ("openai/gpt-oss-20b@6cee5e8", HubModel("openai/gpt-oss-20b", "6cee5e8")),
        ("a/b.c-d_e@refs/pr/3", HubModel("a/b.c-d_e", "refs/pr/3")),
        (str(DEMO), LocalModel(DEMO)),
    ],
)
def test_parse_model(text: str, model: object) -> None:
    assert parse_model(text) == model


def test_an_existing_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert isinstance(parse_model("org/name"), HubModel)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert parse_model("org/name") == LocalModel(Path("org/name"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("./nowhere", "no folder ./nowhere"),
        ("/nowhere/at/all", "no folder"),
        ("../up/here", "no folder"),
        ("gpt-oss-20b", 'Did you mean "openai/gpt-oss-20b"?'),
        ("a/b/c", "neither a folder nor a Hub id"),
        ("a/b@", "neither a folder nor a Hub id"),
        ("a/b@x..y", "neither a folder nor a Hub id"),
        ("a/b--c", "neither a folder nor a Hub id"),
        ("", "neither a folder nor a Hub id"),
        ("a/b\n", "neither a folder nor a Hub id"),
        (str(DEMO / "config.json"), "is a file"),
        ("https://huggingface.co/openai/gpt-oss-20b/tree/main", "is an address"),
    ],
)
def test_parse_model_refuses(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_model(text)
    assert says in caught.value.message
    assert caught.value.hint


# --- the good way ----------------------------------------------------------------------------------


def test_fetch_brings_exactly_the_needed_files(server: LoopbackHub, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    snapshot = fetch(MODEL, cache_dir=tmp_path, endpoint=server.url, on_progress=lambda *step: seen.append(step))
    assert_complete(snapshot)
    assert snapshot.revision == server.repos["demo/tiny"].refs["main"]
    assert snapshot.bytes_downloaded == sum(map(len, FILES.values()))
    asked = {r.path.split("/")[-1] for r in server.requests if "/resolve/" in r.path}
    assert asked == set(FILES)
    done = [d for _, d, _ in seen]
    assert done == sorted(done)
    assert seen[-1][1] == seen[-1][2] == snapshot.bytes_downloaded
    assert len(seen) > 2 * len(FILES)  # within files too

    server.requests.clear()
    again = get(server, tmp_path)
    assert (again.files, again.bytes_downloaded) == (snapshot.files, 0)
    assert [r.path for r in server.requests] == ["/api/models/demo/tiny/revision/main"]

    server.requests.clear()
    assert get(server, tmp_path, HubModel("demo/tiny", snapshot.revision)).files == snapshot.files
    assert not server.requests  # a full commit id needs no question


def test_digests_are_sha256_of_the_files(server: LoopbackHub, tmp_path: Path) -> None:
    import hashlib

    for name, digest in get(server, tmp_path).files.items():
        assert digest == (len(FILES[name]), hashlib.sha256(FILES[name]).hexdigest())


def test_the_revision_is_pinned_when_main_moves(server: LoopbackHub, tmp_path: Path) -> None:
    repo = server.repos["demo/tiny"]
    first = repo.refs["main"]
    other = {**FILES, "config.json": b"{}", SHARDS[1]: b"other weights"}
    server.inject("GET", "/tree/", Then(lambda: repo.commit(other)))
    snapshot = get(server, tmp_path)
    assert snapshot.revision == first != repo.refs["main"]
    assert_complete(snapshot)
    moved = get(server, tmp_path, HubModel("demo/tiny", "main"))
    assert (moved.path / "config.json").read_bytes() == b"{}"
    assert moved.bytes_downloaded == len(b"{}") + len(b"other weights")  # the rest is shared


def test_listing_and_metadata_leave_the_weights(server: LoopbackHub, tmp_path: Path) -> None:
    server.page_size = 3
    listing = hub.list_files(MODEL, cache_dir=tmp_path, endpoint=server.url)
    assert {f.name: f.size for f in listing.files} == {n: len(d) for n, d in FILES.items()}
    assert listing.missing == listing.total - len(FILES[hub.INDEX])
    small = hub.fetch_metadata(MODEL, cache_dir=tmp_path, endpoint=server.url)
    assert set(small.files) == set(FILES) - set(SHARDS)
    assert not server.asked("GET", "/_cdn/")
    assert not any(r.path.endswith(".safetensors") for r in server.requests)


def test_headers_come_by_ranged_requests(server: LoopbackHub, tmp_path: Path) -> None:
    headers = hub.fetch_headers(MODEL, cache_dir=tmp_path, endpoint=server.url)
    assert sorted(headers) == SHARDS
    for name, raw in headers.items():
        assert FILES[name].startswith(raw)
        assert "__metadata__" in json.loads(raw[8:]) or len(json.loads(raw[8:])) > 10
    assert all(r.byte_range == "bytes=0-262143" for r in server.asked("GET", "/_cdn/"))
    get(server, tmp_path)
    server.requests.clear()
    assert hub.fetch_headers(MODEL, cache_dir=tmp_path, endpoint=server.url) == headers
    assert not server.asked("GET", "/_cdn/")


def test_a_header_larger_than_its_file_is_refused(server: LoopbackHub, tmp_path: Path) -> None:
    server.repos["demo/tiny"].commit({**FILES, SHARDS[0]: (1 << 40).to_bytes(8, "little") + b"{}"})
    with pytest.raises(BadCheckpoint, match=r"header of 1,099,511,627,784 bytes in a file of 10"):
        hub.fetch_headers(MODEL, cache_dir=tmp_path, endpoint=server.url)


def test_no_index_means_every_root_safetensors(server: LoopbackHub, tmp_path: Path) -> None:
    files = {n: d for n, d in {**FILES, **DECOYS}.items() if n != hub.INDEX}
    server.repos["demo/tiny"].commit(files)
    assert {n for n in get(server, tmp_path).files if n.endswith(".safetensors")} == {
        *SHARDS,
        "extra.safetensors",
    }


def test_a_token_never_reaches_another_host(
    server: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", "hf_loopback")
    server.repos["demo/tiny"].gated = True
    assert_complete(get(server, tmp_path))
    assert all(r.token for r in server.requests if "/_cdn/" not in r.path)
    cdn = server.asked("GET", "/_cdn/")
    assert len(cdn) == len(SHARDS)
    assert not any(r.token for r in cdn)


# --- damage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", SHARDS[0]])
def test_a_flipped_byte_is_caught_and_cured(server: LoopbackHub, tmp_path: Path, name: str) -> None:
    on = "config.json" if name == "config.json" else "/_cdn/"
    server.inject("GET", on, Flip(700))
    with pytest.raises(ExporterError) as caught:
        get(server, tmp_path)
    assert name in caught.value.message
    assert "damaged" in caught.value.message
    assert "run the same command again" in (caught.value.hint or "")
    cured = get(server, tmp_path)
    assert_complete(cured)


def test_a_checked_file_is_hashed_again_only_when_it_changed(server: LoopbackHub, tmp_path: Path) -> None:
    snapshot = get(server, tmp_path)
    shard = (snapshot.path / SHARDS[0]).resolve()
    stat, good = shard.stat(), shard.read_bytes()
    with shard.open("r+b") as f:
        f.seek(5000)
        f.write(bytes([good[5000] ^ 1]))
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert get(server, tmp_path).files == snapshot.files  # same stamp: the bytes were not read
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(ExporterError, match=f"{SHARDS[0]} is damaged"):
        get(server, tmp_path)
    assert not shard.exists()
    assert_complete(get(server, tmp_path))


def test_an_unreadable_record_costs_time_not_safety(server: LoopbackHub, tmp_path: Path) -> None:
    snapshot = get(server, tmp_path)
    record = snapshot.path.parents[1] / "exporter" / f"{snapshot.revision}.json"
    for bad in (b"{", b"[]", b'{"files": {"../x": {}}, "checked": {}}', b'{"files": 1}'):
        record.write_bytes(bad)
        again = get(server, tmp_path)
        assert (again.files, again.bytes_downloaded) == (snapshot.files, 0)


def test_files_unlike_the_release_are_refused(
    server: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = ("demo/tiny", server.repos["demo/tiny"].refs["main"])
    monkeypatch.setitem(KNOWN_SHA256, key, {SHARDS[1]: "0" * 64})
    with pytest.raises(Refused, match=f"{SHARDS[1]} is not the released file"):
        get(server, tmp_path)
    assert not server.asked("GET", "/_cdn/")  # known before a byte of weights
    monkeypatch.setitem(KNOWN_SHA256, key, {"config.json": "0" * 64})
    with pytest.raises(Refused, match=r"config\.json is not the released file"):
        get(server, tmp_path)
    monkeypatch.setitem(KNOWN_SHA256, key, {n: d.sha256 for n, d in _digests(server, tmp_path / "2").items()})
    assert_complete(get(server, tmp_path))


def _digests(server: LoopbackHub, cache: Path) -> dict[str, FileDigest]:
    server.repo("demo/copy", FILES)
    return get(server, cache, HubModel("demo/copy")).files


@pytest.mark.parametrize("extra", [7, -7])
def test_another_size_than_listed_is_refused(server: LoopbackHub, tmp_path: Path, extra: int) -> None:
    server.inject("GET", "/_cdn/", WrongSize(extra))
    says = f"sends {4_445_640 + extra:,} bytes where its listing says 4,445,640"
    with pytest.raises(ExporterError, match=says):
        get(server, tmp_path)
    assert_complete(get(server, tmp_path))


def test_discard_follows_links_but_not_out_of_the_cache(tmp_path: Path) -> None:
    cache, outside = tmp_path / "cache", tmp_path / "outside"
    for folder in (cache, outside):
        folder.mkdir()
    (cache / "store").write_text("shared")
    (cache / "blob").symlink_to("store")
    (cache / "name").symlink_to("blob")
    discard(cache / "name", cache)
    assert list(cache.iterdir()) == []
    (outside / "mine").write_text("keep")
    (cache / "name").symlink_to("../outside/mine")
    discard(cache / "name", cache)
    assert list(cache.iterdir()) == []
    assert (outside / "mine").read_text() == "keep"


def test_a_record_does_not_name_files_elsewhere(tmp_path: Path) -> None:
    good = RemoteFile("config.json", 2, "git", "a" * 40)
    record = Record(tmp_path, "c" * 40, {"config.json": good, "../x": RemoteFile("../x", 2, "git", "a" * 40)})
    record.save()
    assert Record.load(tmp_path, "c" * 40).files == {"config.json": good}
