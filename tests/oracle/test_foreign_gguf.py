"""GGUF files that we did not write, read back against gguf-py and against ggml itself, type by type."""

import ctypes
import functools
from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from exporter.checkpoint import open_checkpoint  # noqa: E402
from exporter.pipeline.foreign import compare_config, open_foreign  # noqa: E402
from exporter.pipeline.progress import Progress  # noqa: E402
from exporter.pipeline.weights import compare_weights  # noqa: E402
from tests.conftest import DEMO  # noqa: E402
from tests.foreign_files import demo_values, gguf_demo, released_like  # noqa: E402


def all_values(foreign, name):
    return foreign.read(name, 0, demo_values()[name].shape[0])


def agrees(path, expected) -> list[str]:
    """Tensors that are not read as they were written."""
    foreign = open_foreign(path)
    try:
        return [n for n, numbers in expected.items() if not np.array_equal(all_values(foreign, n), numbers)]
    finally:
        foreign.close()


def experts_in(kind):
    return lambda name: kind if ".experts." in name and name.endswith("_proj.weight") else released_like(name)


@pytest.mark.parametrize("kind", ["MXFP4", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "BF16", "F16", "F32"])
def test_every_type_of_experts(kind, tmp_path):
    path = tmp_path / "some.gguf"
    assert agrees(path, gguf_demo(path, experts_in(kind))) == []


@pytest.mark.parametrize("fused", [False, True])
def test_gate_and_up_apart_or_fused(fused, tmp_path, demo_checkpoint):
    path = tmp_path / "some.gguf"
    expected = gguf_demo(path, released_like, fused=fused)
    assert agrees(path, expected) == []
    foreign = open_foreign(path)
    assert compare_config(foreign, demo_checkpoint.config) == []
    found = compare_weights(foreign, demo_checkpoint, 1, Progress())
    assert (found["exact"], found["problems"], found["kept_exact"]) == (79, [], True)
    assert foreign.tool == "somebody"
    assert foreign.stored["model.layers.0.mlp.experts.up_proj.weight"].type == "MXFP4"
    assert foreign.stored["model.layers.0.mlp.experts.up_proj.weight"].bits == 4.25


def test_parts_of_a_split_model(tmp_path, demo_checkpoint):
    """By gguf-py's own splitting: the first part has all the keys."""
    expected = demo_values()
    writer_path = tmp_path / "some.gguf"
    original = gguf.GGUFWriter
    gguf.GGUFWriter = functools.partial(original, split_max_tensors=30)
    try:
        gguf_demo(writer_path, released_like)
    finally:
        gguf.GGUFWriter = original
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [p.name for p in parts] == [f"some-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    for given in (tmp_path, parts[0], parts[2]):
        assert agrees(given, expected) == []
        assert open_foreign(given).path == parts[0]
        assert open_foreign(given).files == tuple(parts)
    parts[1].unlink()
    with pytest.raises(Exception, match="some-00002-of-00003"):
        open_foreign(tmp_path)


# Against ggml: what only gguf-py would otherwise vouch for


class _Traits(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("size", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


@functools.cache
def ggml():
    xllamacpp = pytest.importorskip("xllamacpp")
    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def by_ggml(numbers, kind):
    """Quantized by ggml itself: uint8 [..., bytes of a row]."""
    qtype = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[qtype]
    rows = np.ascontiguousarray(numbers.reshape(-1, numbers.shape[-1]), np.float32)
    n, k = rows.shape
    if kind in ("F32", "BF16", "F16", "MXFP4"):
        return gguf.quantize(numbers, qtype)
    out, weights = np.zeros((n, k // block * size), np.uint8), np.ones(k, np.float32)
    where = [a.ctypes.data_as(ctypes.c_void_p) for a in (rows, out, weights)]
    counts = [ctypes.c_int64(v) for v in (0, n, k)]
    ggml().ggml_quantize_chunk(ctypes.c_int(qtype.value), where[0], where[1], *counts, where[2])
    return out.reshape(*numbers.shape[:-1], -1)


K_TYPES = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XXS", "TQ2_0"]


@pytest.mark.parametrize("kind", K_TYPES)
def test_ggml_decodes_the_same_numbers(kind, tmp_path):
    """o_proj has rows of 512, which blocks of 256 divide; the rest stays as it is."""
    path, name = tmp_path / "some.gguf", "model.layers.1.self_attn.o_proj.weight"
    gguf_demo(path, lambda n: kind if n == name else released_like(n), quantize=by_ggml)
    foreign = open_foreign(path)
    found = all_values(foreign, name)
    raw = by_ggml(demo_values()[name], kind)
    traits = ggml().ggml_get_type_traits(ctypes.c_int(gguf.GGMLQuantizationType[kind].value)).contents
    assert traits.name.decode().upper() == kind
    theirs = np.empty(found.shape, np.float32)
    where = [a.ctypes.data_as(ctypes.c_void_p) for a in (np.ascontiguousarray(raw), theirs)]
    traits.to_float(*where, ctypes.c_int64(theirs.size))
    assert np.abs(found - theirs).max() <= 1e-6 * np.abs(theirs).max()
    with open_checkpoint(DEMO) as checkpoint:
        report = compare_weights(foreign, checkpoint, 1, Progress())
    assert report["problems"] == [], "a sound quantization is called broken"
    assert report["worst"][0]["name"] == name


def test_a_fault_in_our_reading_would_be_seen(tmp_path, monkeypatch):
    from exporter.formats.gguf import foreign_values

    path = tmp_path / "some.gguf"
    expected = gguf_demo(path, released_like)
    sound = foreign_values.values
    monkeypatch.setattr("exporter.formats.gguf.foreign.values", lambda raw, *a: sound(np.roll(raw, 1), *a))
    assert len(agrees(path, expected)) > 60
