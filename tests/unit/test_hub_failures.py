"""Everything that can go wrong between a Hub and a cache, with the real client on loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from exporter.checkpoint import hub
from exporter.checkpoint.hub import HubModel, fetch
from exporter.errors import BadCheckpoint, ExporterError, Refused, UsageError
from exporter.hub import client as hub_client
from exporter.hub.failures import explained
from tests.hub_demo import DECOYS, FILES, MODEL, SHARDS, assert_complete, get
from tests.loopback_hub import Drop, LoopbackHub, Short, Slow, Status, WholeFile

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


@pytest.mark.usefixtures("impatient")
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
    with pytest.raises(Refused, match=r"needs 1,000 TB more on the disk of .*, which has .+ free"):
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
        explained("a/b@c", hub_client.HubClient("a/b", tmp_path, "https://hub")),
    ):
        raise RuntimeError("Internal error: shard dedup")
    assert "HF_HUB_DISABLE_XET=1" in (caught.value.hint or "")
