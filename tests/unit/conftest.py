"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.loopback_hub import LoopbackHub


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No token of this machine, and no pauses between attempts."""
    from huggingface_hub import constants

    from exporter.hub import client as hub_client

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setattr(hub_client, "ASK_WAITS", (0.0, 0.0))
    monkeypatch.setattr(hub_client, "DOWNLOAD_WAITS", (0.0, 0.0))


@pytest.fixture
def server(impatient: None) -> Iterator[LoopbackHub]:
    """A Hub on loopback with the demo checkpoint, and decoys, as demo/tiny."""
    from tests.hub_demo import DECOYS, FILES

    with LoopbackHub() as running:
        running.repo("demo/tiny", {**FILES, **DECOYS})
        yield running
