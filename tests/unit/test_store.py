"""What the store holds and what it points at."""

import hashlib

import numpy as np
import pytest

from exporter.errors import Refused
from exporter.pipeline.quantize import obtain
from exporter.pipeline.store import Store, store_key
from exporter.quantize import NUMBERS
from exporter.types import QTensor, Scheme, TensorSpec, leaf_count
from exporter.types.recipe import Recipe, Step

MXFP4 = Scheme.parse("mxfp4")
SPEC = TensorSpec("model.layers.0.mlp.experts.up_proj.weight", (3, 4, 64), "expert", 0)
EXACT = """
title = "exact"
[[rule]]
match = "*"
method = "exact"
scheme = "int8-g32"
otherwise = "absmax"
"""


def recipe_step(source):
    return Recipe.from_toml(EXACT, "exact", "recipe exact").step(SPEC, source)


@pytest.fixture
def released():
    rng = np.random.default_rng(3)
    data = rng.integers(0, 256, (3, 4, 32), dtype=np.uint8)
    scales = rng.integers(115, 126, (3, 4, 2), dtype=np.uint8)
    return lambda name, start, stop: QTensor(name, MXFP4, data[start:stop], scales[start:stop])


def test_exact_numbers_of_a_release_are_not_copied(tmp_path, released):
    """They are made anew at every reading, equal to the committed ones, in this run and the next."""
    step = recipe_step(MXFP4)
    assert step.by_reference
    store = Store(tmp_path / "store", [step], released, {})
    made = [obtain(store, step, i, released) for i in range(leaf_count(SPEC.shape))]
    digest = store.digest(step)
    store.release()
    assert (tmp_path / "store" / "data.bin").stat().st_size == 0
    again = Store(tmp_path / "store", [step], released, {})
    for i, q in enumerate(made):
        found = again.intact(step, i)
        assert found is not None
        assert found.scheme == step.scheme
        assert np.array_equal(found.data, q.data)
        assert np.array_equal(found.scales, q.scales)
    assert again.digest(step) == digest
    again.release()


def test_another_checkpoint_under_the_store_is_seen(tmp_path, released):
    step = recipe_step(MXFP4)

    def changed(name, start, stop):
        q = released(name, start, stop)
        return QTensor(name, MXFP4, q.data ^ np.uint8(start == 1), q.scales)

    store = Store(tmp_path / "store", [step], released, {})
    for i in range(3):
        obtain(store, step, i, released)
    store.release()
    other = Store(tmp_path / "store", [step], changed, {})
    assert [other.intact(step, i) is not None for i in range(3)] == [True, False, True]
    other.release()


def test_floats_that_become_integers_are_kept(tmp_path):
    """Their search is dear; only what is MXFP4 already follows from the checkpoint in no time."""
    step = recipe_step(Scheme.parse("bf16"))
    assert not step.by_reference
    Store(tmp_path / "store", [step], None, {}).release()
    assert (tmp_path / "store" / "data.bin").stat().st_size >= step.stored_bytes


def test_stores_with_the_numbers_inside_are_not_taken_for_these():
    step = recipe_step(MXFP4)
    kept = Step(SPEC, "keep", Scheme.parse("bf16"), Scheme.parse("bf16"))
    rounded = Step(SPEC, "rtn", MXFP4, step.scheme)
    keys = {store_key("f", [s]) for s in (step, rounded, kept)}
    assert len(keys) == 3
    # The keys of stores without such tensors are as they were: those of a released version, by hand.
    line = f"{kept.name} keep bf16 bf16 {kept.scheme.scale_rule} None 1\n"
    assert store_key("f", [kept]) == hashlib.sha256(f"store-{NUMBERS} f \n{line}".encode()).hexdigest()


def test_a_scale_that_integers_cannot_hold_is_refused(tmp_path, released):
    step = recipe_step(MXFP4)

    def wide(name, start, stop):
        q = released(name, start, stop)
        return QTensor(name, MXFP4, q.data, np.full_like(q.scales, 200))

    store = Store(tmp_path / "store", [step], wide, {})
    with pytest.raises(Refused, match="cannot hold exactly"):
        obtain(store, step, 0, wide)
    store.release()
