"""The experts that llama.cpp chooses against those of the reference, on a GGUF that gguf-py wrote, all in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.errors import ExporterError
from exporter.model.reference import Routes, reference_logits
from exporter.validate import llama_cpp, text
from exporter.validate.llama_routes import Routing
from tests.oracle.twin import CONFIG, TOKENIZER, demo_tensors, write_gguf

torch = pytest.importorskip("torch")
WINDOWS, LENGTH = 2, 320


@pytest.fixture(scope="module")
def tokens() -> Any:
    return text.windows(TOKENIZER, text.standard_library(), WINDOWS, LENGTH).tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.set_num_threads(1)  # two test processes on two cores: more threads only wait for each other
    path: Path = tmp_path_factory.mktemp("routes") / "twin.gguf"
    write_gguf(path, demo_tensors())
    with llama_cpp.Model(path) as loaded:
        yield loaded


def routed(model: Any, tokens: Any, batch: int) -> Routing:
    """What is collected while all windows are computed, `batch` tokens at once."""
    routing = Routing(model.library)
    with llama_cpp.Context(model, LENGTH, batch, 1, flash_attention="off", kv_type="f32", routing=routing) as context:
        for window in tokens:
            context.clear()
            for at in range(0, len(window), batch):
                context.decode(window[at : at + batch], all_logits=True)
    return routing


@pytest.fixture(scope="module")
def wanted(tokens: Any) -> Any:
    """uint16 [layers, W * T, top_k] of the reference, with the rope as llama.cpp computes it."""
    tensors, routes = demo_tensors(), Routes(CONFIG, tokens.size)
    rope = llama_cpp.runtime_rope(CONFIG.rope)
    reference_logits(CONFIG, lambda n, a, b: tensors[n][a:b], tokens, [rope], top_k=8, routed=routes)
    return routes.experts


@pytest.mark.parametrize("batch", [LENGTH, 96, 1])
def test_experts_are_the_references(batch: int, model: Any, tokens: Any, wanted: Any) -> None:
    some = tokens if batch > 1 else tokens[:1, :24]
    found = routed(model, some, batch).experts(some.size)
    assert found.dtype == np.uint16
    assert found.shape == (CONFIG.num_hidden_layers, some.size, CONFIG.num_experts_per_tok)
    assert (np.diff(found.astype(int), axis=2) > 0).all()  # ascending, none twice
    np.testing.assert_array_equal(found, wanted[:, : some.size])
    # Not all alike, so that one layer's or token's choice would not pass for another's.
    assert len(np.unique(wanted.reshape(-1, wanted.shape[2]), axis=0)) > 100


def test_the_routes_are_of_the_weights_in_the_file(tokens: Any, wanted: Any, tmp_path: Path, model: Any) -> None:
    """With two experts' router rows exchanged, each is chosen where the other was, in that layer alone."""
    tensors = demo_tensors()
    order = np.arange(CONFIG.num_local_experts)
    order[[3, 5]] = 5, 3
    for part in ("weight", "bias"):
        name = f"model.layers.0.mlp.router.{part}"
        tensors[name] = np.ascontiguousarray(tensors[name][order])
    write_gguf(tmp_path / "other.gguf", tensors)
    with llama_cpp.Model(tmp_path / "other.gguf") as other:
        found = routed(other, tokens[:1], LENGTH).experts(LENGTH)
    np.testing.assert_array_equal(found[0], np.sort(order[wanted[0, :LENGTH]], axis=1))
    assert (found[0] != wanted[0, :LENGTH]).any()


def test_watching_changes_no_logit(model: Any, tokens: Any) -> None:
    some = []
    for routing in (None, Routing(model.library)):
        with llama_cpp.Context(
            model, LENGTH, LENGTH, 1, flash_attention="off", kv_type="f32", routing=routing
        ) as context:
            some.append(context.decode(tokens[0], all_logits=True).copy())
    np.testing.assert_array_equal(*some)


def test_too_few_or_no_choices_are_said(model: Any, tokens: Any) -> None:
    with pytest.raises(ExporterError, match=r"did not say which experts it chose \(no such nodes\)"):
        Routing(model.library).experts(10)
    routing = routed(model, tokens[:1, :24], 24)
    assert routing.experts(24).shape[1] == 24
    for tokens_asked in (23, 25, 48):
        with pytest.raises(ExporterError, match="did not say which experts it chose"):
            routing.experts(tokens_asked)
