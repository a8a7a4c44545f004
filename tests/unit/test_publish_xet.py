"""Through Xet, as the Hub has it: the real hf_xet into a store on this disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub.utils import enable_progress_bars

from exporter.errors import ExporterError
from exporter.pipeline.progress import Progress
from exporter.pipeline.publish import PublishAsk, plan_publish, publish
from exporter.publish.failures import explain
from tests.loopback_hub import Drop, LoopbackHub, Lost, Status
from tests.publishing import REPO, contents, loopback, put, small_artifact

hf_xet = pytest.importorskip("hf_xet", reason="hf_xet is not installed")
WEIGHTS = hashlib.sha256(b"of the test").digest() * 40_000  # 1.3 MB


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_XET_TELEMETRY_ENABLED", "0")
    with loopback(monkeypatch, tmp_path) as running:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        running.xet = str(tmp_path / "store")
        (tmp_path / "store").mkdir()
        running.repo(REPO, {"LICENSE": b"mine"})
        yield running


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("artifact")
    return small_artifact(root, files={"a.gguf": WEIGHTS, "b.gguf": WEIGHTS[:-64] + b"GGUF" * 16})


def published(hub: LoopbackHub, artifact: Path) -> bool:
    """Content is in the store, so the commit has its hash only."""
    tree = hub.repos[REPO].tree()
    here = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in artifact.glob("*.gguf")}
    return {name: tree[name].sha256 for name in here} == here and contents(hub)["LICENSE"] == b"mine"


def test_published_through_xet(hub: LoopbackHub, artifact: Path) -> None:
    enable_progress_bars()  # else the client tells nobody; some other test may have disabled them
    seen: list[int] = []

    class Watch(Progress):
        def advance(self, amount: int, label: str = "") -> None:
            seen.append(amount)

    plan = plan_publish(PublishAsk((artifact,), REPO), Progress())
    try:
        done = publish(plan, Watch())
    except ExporterError as error:
        if "local" in error.message and "Xet" in error.message:
            pytest.skip("this hf_xet has no store on a disk")  # a simulation of its tests, which may go any time
        raise
    assert done.made
    assert published(hub, artifact)
    assert len(hub.repos[REPO].made()) == 2
    assert not hub.asked("PUT")
    assert not hub.asked("POST", "/objects/batch")
    stored = sum(p.stat().st_size for p in Path(hub.xet).rglob("*") if p.is_file())
    assert 0 < stored < 2 * len(WEIGHTS)
    # What the client would have drawn was counted: the weights, and the small files that the commit holds.
    assert sum(seen) == done.nbytes - sum(u.size for u in plan.uploads if isinstance(u.source, bytes))
    assert not put(artifact).made


@pytest.mark.parametrize("faults", [(Lost(),), (Drop(), Lost()), (Status(503),)], ids=["lost", "dropped, lost", "503"])
def test_an_unclear_commit_after_xet(
    hub: LoopbackHub, artifact: Path, faults: tuple[Lost | Drop | Status, ...]
) -> None:
    hub.inject("POST", "/commit/", *faults)
    done = put(artifact, tag="v1")
    assert published(hub, artifact)
    assert len(hub.repos[REPO].made()) == 2
    assert hub.repos[REPO].tags == {"v1": done.commit} == {"v1": hub.repos[REPO].refs["main"]}


STATUSES = {
    401: "does not accept your token",
    403: "does not let you write to me/tiny-GGUF (403)",
    404: "answers 404 for me/tiny-GGUF",
}


@pytest.mark.parametrize("status", STATUSES)
def test_what_the_store_says(hub: LoopbackHub, artifact: Path, status: int) -> None:
    """hf_xet tells it in words of its own."""
    hub.inject("GET", "/xet-write-token/", Status(status))
    with pytest.raises(ExporterError) as caught:
        put(artifact)
    assert STATUSES[status] in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert len(hub.repos[REPO].made()) == 1


def test_what_else_goes_wrong_in_xet_is_told_with_a_way_around() -> None:
    told = explain(RuntimeError("Internal error:\n shard dedup hf_abcdef"), REPO, "https://hub")
    assert told is not None
    assert told.message == f"the Xet transfer to {REPO} failed: Internal error: shard dedup hf_..."
    assert "HF_HUB_DISABLE_XET=1" in (told.hint or "")
