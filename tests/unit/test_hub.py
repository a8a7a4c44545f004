"""The Hub, as seen by the real client against a Hub on loopback that serves the demo checkpoint."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from exporter.checkpoint import hub, hub_client
from exporter.checkpoint.hub import HubModel, LocalModel, fetch, parse_model
from exporter.checkpoint.hub_files import FileDigest, Record, RemoteFile, discard
from exporter.errors import BadCheckpoint, ExporterError, Refused, UsageError
from exporter.model.released import KNOWN_SHA256
from tests.loopback_hub import Drop, Flip, LoopbackHub, Short, Slow, Status, Then, WholeFile, WrongSize

DEMO = Path(__file__).parents[1] / "data" / "tiny-gpt-oss"
FILES = {p.name: p.read_bytes() for p in DEMO.iterdir()}
SHARDS = sorted(n for n in FILES if n.endswith(".safetensors"))
DECOYS = {
    "original/model.safetensors": b"a third copy",
    "metal/model.bin": b"and a fourth",
    "pytorch_model.bin": b"\x80\x04.",
    "extra.safetensors": b"named by no index",
    "USAGE_POLICY": b"policy",
}
MODEL = HubModel("demo/tiny")


@pytest.fixture(autouse=True)
def _anonymous_and_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setattr(hub_client, "ASK_WAITS", (0.0, 0.0))
    monkeypatch.setattr(hub_client, "DOWNLOAD_WAITS", (0.0, 0.0))


@pytest.fixture
def server() -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        running.repo("demo/tiny", {**FILES, **DECOYS})
        yield running


def get(server: LoopbackHub, cache: Path, model: HubModel = MODEL) -> hub.HubSnapshot:
    return fetch(model, cache_dir=cache, endpoint=server.url)


def assert_complete(snapshot: hub.HubSnapshot) -> None:
    assert set(snapshot.files) == set(FILES)
    for name, data in FILES.items():
        assert (snapshot.path / name).read_bytes() == data


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


# --- interruptions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("second", [None, WholeFile()])
def test_a_broken_download_goes_on_from_where_it_was(
    server: LoopbackHub, tmp_path: Path, second: WholeFile | None
) -> None:
    server.inject("GET", "/_cdn/", Short(0.5), *([second] if second else []))
    assert_complete(get(server, tmp_path))
    ranges = [r.byte_range for r in server.asked("GET", "/_cdn/")]
    assert ranges == [None, "bytes=2097152-", None]  # whole MiB are kept of 2.2


FETCH = """
import sys
from pathlib import Path
from exporter.checkpoint.hub import HubModel, fetch
from exporter.errors import ExporterError
try:
    print(fetch(HubModel("demo/tiny"), cache_dir=Path(sys.argv[1])).bytes_downloaded)
except ExporterError as e:
    sys.exit(f"{e.message} | {e.hint}")
"""


def in_process(server_url: str, cache: Path, **env: str) -> subprocess.Popen[str]:
    """The same fetch in its own Python, for what the client reads from the environment at import."""
    quiet = {"HF_ENDPOINT": server_url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", FETCH, str(cache)],
        env={**os.environ, **quiet, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_kill_9_during_a_download_then_resume(server: LoopbackHub, tmp_path: Path) -> None:
    server.inject("GET", "/_cdn/", Short(0.8, seconds=20))
    with in_process(server.url, tmp_path) as child:
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline and _partial_bytes(tmp_path) < 3 << 20:
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
    kept = _partial_bytes(tmp_path)
    assert kept == 3 << 20  # whole MiB of 3.6 million bytes
    server.requests.clear()
    snapshot = get(server, tmp_path)
    assert_complete(snapshot)
    assert server.asked("GET", "/_cdn/")[0].byte_range == f"bytes={kept}-"
    assert not _partial_bytes(tmp_path)


def _partial_bytes(cache: Path) -> int:
    return sum(p.stat().st_size for p in cache.glob("models--*/blobs/*.part"))


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("/revision/", Status(503)),
        ("/revision/", Drop()),
        ("/tree/", Status(502)),
        ("config.json", Status(429, (("Retry-After", "0"),))),
        ("/_cdn/", Status(503)),
        ("/_cdn/", Drop()),
    ],
)
def test_a_passing_failure_is_retried(server: LoopbackHub, tmp_path: Path, path: str, fault: Status | Drop) -> None:
    server.inject("GET", path, fault)
    assert_complete(get(server, tmp_path))


@pytest.mark.parametrize(
    ("path", "fault", "says"),
    [
        ("/revision/", Status(503), "is failing (503)"),
        ("/_cdn/", Status(500), "is failing (500)"),
        ("/revision/", Status(429), "limits your requests"),
        ("/_cdn/", Status(403), "does not let you read demo/tiny"),
        ("/_cdn/", Status(418), "answers 418"),
        ("/revision/", Drop(), "broke while reading demo/tiny"),
        ("/_cdn/", Short(0), "broke while reading demo/tiny"),
    ],
)
def test_a_lasting_failure_is_one_clear_line(
    server: LoopbackHub, tmp_path: Path, path: str, fault: Status | Drop | Short, says: str
) -> None:
    server.inject("GET", path, *[fault] * 5)
    with pytest.raises(ExporterError) as caught:
        get(server, tmp_path)
    assert says in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_a_long_retry_after_ends_the_attempt(server: LoopbackHub, tmp_path: Path) -> None:
    server.inject("GET", "/revision/", Status(429, (("Retry-After", "3600"),)))
    with pytest.raises(ExporterError, match="limits your requests"):
        get(server, tmp_path)


def test_a_silent_server_times_out(server: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    server.inject("GET", "/_cdn/", *[Slow(0.3)] * 3)
    with pytest.raises(ExporterError, match="does not answer in time") as caught:
        get(server, tmp_path)
    assert "HF_HUB_DOWNLOAD_TIMEOUT" in (caught.value.hint or "")


# --- refusals --------------------------------------------------------------------------------------


def test_unknown_names_and_closed_doors(server: LoopbackHub, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model demo/nothing on") as caught:
        get(server, tmp_path, HubModel("demo/nothing"))
    assert "hf auth login" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="demo/tiny@nope: no such branch, tag or commit"):
        get(server, tmp_path, HubModel("demo/tiny", "nope"))
    with pytest.raises(UsageError, match="no such branch, tag or commit"):
        get(server, tmp_path, HubModel("demo/tiny", "0" * 40))
    server.repos["demo/tiny"].private = True
    with pytest.raises(UsageError, match="or it is private"):
        get(server, tmp_path)
    server.repos["demo/tiny"].private = False
    server.repos["demo/tiny"].gated = True
    with pytest.raises(Refused, match="demo/tiny is gated") as refused:
        get(server, tmp_path)
    assert "accept the terms" in (refused.value.hint or "")
    assert not server.asked("GET", "/_cdn/")


def test_a_refused_token_is_not_printed(server: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    with pytest.raises(Refused, match="does not accept your token") as caught:
        get(server, tmp_path)
    assert caught.value.hint == "hf auth login"
    assert "secret" not in caught.value.message


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ExporterError, match=f"cannot reach {endpoint} for demo/tiny") as caught:
            fetch(MODEL, cache_dir=tmp_path, endpoint=endpoint)
    assert "HF_HUB_OFFLINE=1" in (caught.value.hint or "")


def test_offline_takes_a_complete_cache_and_nothing_less(server: LoopbackHub, tmp_path: Path) -> None:
    def offline() -> tuple[int, str, str]:
        with in_process(server.url, tmp_path, HF_HUB_OFFLINE="1") as child:
            out, err = child.communicate()
        return child.returncode, out.strip(), err

    code, _, err = offline()
    assert code == 1
    assert err.startswith("offline, and demo/tiny is not in the cache")
    snapshot = get(server, tmp_path)
    server.requests.clear()
    assert offline() == (0, "0", "")
    (snapshot.path / SHARDS[1]).unlink()
    code, _, err = offline()
    assert code == 1
    assert f"lacks {SHARDS[1]} in the cache" in err
    assert not server.requests


INDEX_CASES = {
    "../outside.safetensors": "names '../outside.safetensors'",
    "original/model.safetensors": "names 'original/model.safetensors'",
    "..\\x.safetensors": "which is not a safetensors file beside it",
    "/etc/passwd": "which is not a safetensors file beside it",
    "pytorch_model.bin": "which is not a safetensors file beside it",
    "model-00009-of-00002.safetensors": "which is not there",
}


@pytest.mark.parametrize("name", INDEX_CASES)
def test_an_index_that_points_elsewhere_is_refused(server: LoopbackHub, tmp_path: Path, name: str) -> None:
    index = json.dumps({"weight_map": {"a": SHARDS[0], "b": name}}).encode()
    server.repos["demo/tiny"].commit({**FILES, **DECOYS, hub.INDEX: index})
    with pytest.raises(BadCheckpoint) as caught:
        get(server, tmp_path)
    assert INDEX_CASES[name] in caught.value.message
    assert not server.asked("GET", "/_cdn/")


@pytest.mark.parametrize(
    "index", [b"", b"[]", b"{", b'{"weight_map": {}}', b'{"weight_map": [1]}', b'{"weight_map": {"a": 1}}']
)
def test_an_index_that_is_none_is_refused(server: LoopbackHub, tmp_path: Path, index: bytes) -> None:
    server.repos["demo/tiny"].commit({**FILES, hub.INDEX: index})
    with pytest.raises(BadCheckpoint, match="is not a shard index"):
        get(server, tmp_path)


@pytest.mark.parametrize(
    ("names", "kind", "says"),
    [
        (["config.json", "pytorch_model.bin"], Refused, "pickle files only (pytorch_model.bin)"),
        (["adapter_config.json", "adapter_model.safetensors"], Refused, "is an adapter, not a model"),
        (["config.json", "original/model.safetensors"], BadCheckpoint, "no *.safetensors at its root"),
        (["model.safetensors"], BadCheckpoint, "has no config.json"),
        (["config.json", "a b.safetensors"], BadCheckpoint, "has a file called 'a b.safetensors'"),
    ],
)
def test_repositories_without_usable_weights(
    server: LoopbackHub, tmp_path: Path, names: list[str], kind: type[ExporterError], says: str
) -> None:
    server.repo("demo/odd", {n: b"x" for n in names})
    with pytest.raises(kind) as caught:
        get(server, tmp_path, HubModel("demo/odd"))
    assert says in caught.value.message
    assert not server.asked("GET", "/_cdn/")


def test_too_little_disk_is_refused_with_numbers(server: LoopbackHub, tmp_path: Path) -> None:
    server.repos["demo/tiny"].commit(FILES, sizes={SHARDS[0]: 10**15})
    with pytest.raises(Refused, match=r"needs 1000000\.0 GB more on the disk of .*, which has [\d.]+ GB free"):
        get(server, tmp_path)
    assert not server.asked("GET", "/_cdn/")


def test_absurd_metadata_is_refused(server: LoopbackHub, tmp_path: Path) -> None:
    server.repos["demo/tiny"].commit(FILES, sizes={"tokenizer.json": 1 << 40})
    with pytest.raises(Refused, match=r"tokenizer\.json has 1,099,512 MB"):
        get(server, tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_clear_line(server: LoopbackHub, tmp_path: Path) -> None:
    listing = hub.list_files(MODEL, cache_dir=tmp_path, endpoint=server.url)
    shard = next(f for f in listing.files if f.name == SHARDS[0])
    partial = hub_client.partial_path(tmp_path / "models--demo--tiny", shard)
    partial.symlink_to("/dev/full")
    with pytest.raises(ExporterError, match="the disk is full") as caught:
        get(server, tmp_path)
    assert "HF_HOME" in (caught.value.hint or "")
    partial.unlink()
    assert_complete(get(server, tmp_path))


def test_a_failed_xet_transfer_names_the_way_around(tmp_path: Path) -> None:
    with (
        pytest.raises(ExporterError, match="the Xet transfer of a/b@c failed: Internal error") as caught,
        hub_client.explained("a/b@c", "a/b", "https://hub", tmp_path),
    ):
        raise RuntimeError("Internal error: shard dedup")
    assert "HF_HUB_DISABLE_XET=1" in (caught.value.hint or "")
