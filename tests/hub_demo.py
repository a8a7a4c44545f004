"""The demo checkpoint as a repository on a loopback Hub, and how the tests fetch it."""

from __future__ import annotations

from pathlib import Path

from exporter.checkpoint import hub
from exporter.checkpoint.hub import HubModel, fetch
from tests.loopback_hub import LoopbackHub

DEMO = Path(__file__).parent / "data" / "tiny-gpt-oss"
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


def get(server: LoopbackHub, cache: Path, model: HubModel = MODEL) -> hub.HubSnapshot:
    return fetch(model, cache_dir=cache, endpoint=server.url)


def assert_complete(snapshot: hub.HubSnapshot) -> None:
    assert set(snapshot.files) == set(FILES)
    for name, data in FILES.items():
        assert (snapshot.path / name).read_bytes() == data
