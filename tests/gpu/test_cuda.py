"""What only a GPU computes. Skipped where torch has none; the same checks as benchmarks/reference_device.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exporter.checkpoint.source import open_checkpoint
from exporter.model.reference import Routes, reference_logits
from exporter.model.weights import Weights, room
from exporter.numerics import decode
from exporter.validate import text
from exporter.validate.metrics import between, flips, summary
from tests.conftest import DEMO

torch: Any = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")


@pytest.fixture(scope="module")
def checkpoint() -> Any:
    return open_checkpoint(Path(DEMO))


def test_the_reference_is_the_same_as_on_the_cpu(checkpoint: Any) -> None:
    config = checkpoint.config
    tokens = text.windows(checkpoint.tokenizer_file, text.standard_library(), 2, 256).tokens

    def read(name: str, start: int, stop: int) -> Any:
        return decode.values(checkpoint.read(name, start, stop))

    found = {}
    for device in ("cpu", "cuda"):
        routes = Routes(config, tokens.size)
        (made,) = reference_logits(config, read, tokens, [config.rope], device=device, routed=routes)
        found[device] = made, routes.experts
    positions = between(found["cpu"][0], found["cuda"][0])
    assert summary(positions)["kl_mean"] < 1e-9  # 9e-13 on an H100
    assert flips(found["cpu"][1], found["cuda"][1], positions)["flips"] == 0


def test_weights_that_stay_on_the_device_are_the_ones_that_were_read(checkpoint: Any) -> None:
    def read(name: str, start: int, stop: int) -> Any:
        return decode.values(checkpoint.read(name, start, stop))

    weights = Weights(read, "cuda", room("cuda"), ahead=4)
    key = ("model.layers.0.mlp.experts.down_proj.weight", 0, 1)
    weights.expect([key])
    first, again = weights(*key), weights(*key)
    assert torch.equal(first, again)
    assert torch.equal(first.cpu(), torch.from_numpy(read(*key)))
