"""Parts of a file, against a loop that moves one byte at a time."""

import dataclasses
import os
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.formats.base import Part
from exporter.pipeline import regions

N, K, E = 12, 5, 3  # rows, words in a row, experts
WORD = 4
PARTS = {
    "one run": (Part(8, 40, 40), 6),
    "runs apart": (Part(8, 64, 16), 6),
    "rows of a transposed matrix": (Part(0, WORD, WORD, ((K, N * WORD),)), N),
    "transposed matrices": (Part(4, N * K * WORD, WORD, ((N, WORD), (K, N * WORD))), E),
    "every second column": (Part(2 * WORD, N * K * WORD, WORD, ((N // 2, 2 * WORD), (K, N * WORD))), E),
    "every second row": (Part(7, 2 * N * K, K, ((N, 2 * K),)), E),
    "halves and words of two": (Part(0, 2, 2, ((K, N * 2),)), N),
    "long runs": (Part(3, 3 * 5000, 5000, ((2, 7000),)), 3),
}


def bytes_of(part, start, stop):
    """Offsets in the file, in the order of the array."""
    axes = [range(count) for count, _ in part.axes]
    offsets = []
    for i in range(start, stop):
        places = [part.offset + i * part.lead]
        for axis, (_, stride) in zip(axes, part.axes, strict=True):
            places = [at + j * stride for at in places for j in axis]
        offsets += [at + b for at in places for b in range(part.width)]
    return offsets


@pytest.mark.parametrize("name", PARTS)
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_each_byte_goes_where_the_part_says(name, data, tmp_path_factory):
    part, count = PARTS[name]
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count))
    size = part.offset + regions.span(part, count)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    before = rng.integers(0, 256, size, dtype=np.uint8)
    path = tmp_path_factory.mktemp("regions") / "f"
    path.write_bytes(before.tobytes())
    array = rng.integers(0, 256, regions.array_shape(part, stop - start), dtype=np.uint8)
    descriptor = os.open(path, os.O_RDWR)
    try:
        regions.write(descriptor, part, start, array, threading.Lock())
        wanted = before.copy()
        wanted[bytes_of(part, start, stop)] = array.reshape(-1)
        assert path.read_bytes() == wanted.tobytes()
        assert np.array_equal(regions.read(descriptor, part, start, stop), array)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("name", PARTS)
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_each_of_two_parts_has_its_own_bits(name, data, tmp_path_factory):
    """Leaves of both in any order, some written twice as after a kill; the bytes are those of one part at a time."""
    part, count = PARTS[name]
    mask = data.draw(st.integers(1, 254))
    parts = [dataclasses.replace(part, mask=m) for m in (mask, 0xFF ^ mask)]
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    before = rng.integers(0, 256, part.offset + regions.span(part, count), dtype=np.uint8)
    arrays = [rng.integers(0, 256, regions.array_shape(part, count), dtype=np.uint8) & p.mask for p in parts]
    leaves = [(side, i) for side in (0, 1) for i in range(count)]
    order = data.draw(st.permutations(leaves)) + data.draw(st.lists(st.sampled_from(leaves), max_size=3))
    path = tmp_path_factory.mktemp("regions") / "f"
    path.write_bytes(before.tobytes())
    descriptor, lock = os.open(path, os.O_RDWR), threading.Lock()
    try:
        for side, i in order:
            regions.write(descriptor, parts[side], i, arrays[side][i : i + 1], lock)
            assert np.array_equal(regions.read(descriptor, parts[side], i, i + 1), arrays[side][i : i + 1])
        wanted = before.copy()
        wanted[bytes_of(part, 0, count)] = (arrays[0] | arrays[1]).reshape(-1)
        assert path.read_bytes() == wanted.tobytes()
        for p, array in zip(parts, arrays, strict=True):
            assert np.array_equal(regions.read(descriptor, p, 0, count), array)
    finally:
        os.close(descriptor)


def test_bits_of_another_part_are_an_error(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(bytes(8))
    with open(path, "r+b") as f, pytest.raises(ValueError, match="0x0f"):
        regions.write(f.fileno(), Part(0, 8, 8, mask=0x0F), 0, np.full((1, 8), 0x10, np.uint8), threading.Lock())
    assert path.read_bytes() == bytes(8)


@pytest.mark.parametrize("name", PARTS)
def test_a_file_that_ends_early_gives_nothing(name, tmp_path):
    part, count = PARTS[name]
    path = tmp_path / "f"
    path.write_bytes(bytes(part.offset + regions.span(part, count) - 1))
    with open(path, "rb") as f:
        assert regions.read(f.fileno(), part, 0, count) is None
        if count > 1:
            assert regions.read_all(f.fileno(), [part, part], count - 1, count) is None


def test_two_threads_may_fill_one_another_s_gaps(tmp_path):
    """Gate rows and up rows lie in turns; each writer must leave the other's bytes alone."""
    rows, width = 500, 4
    parts = [Part(k * width, 2 * rows * width, width, ((rows, 2 * width),)) for k in (0, 1)]
    path, lock = tmp_path / "f", threading.Lock()
    path.write_bytes(bytes(20 * 2 * rows * width))
    descriptor = os.open(path, os.O_RDWR)

    def fill(part, value):
        for i in range(20):
            regions.write(descriptor, part, i, np.full((1, rows, width), value, np.uint8), lock)

    threads = [threading.Thread(target=fill, args=(part, value)) for part, value in zip(parts, (1, 2), strict=True)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    os.close(descriptor)
    pairs = np.fromfile(path, np.uint8).reshape(-1, 2, width)
    assert (pairs[:, 0] == 1).all()
    assert (pairs[:, 1] == 2).all()


def test_two_threads_may_fill_the_halves_of_the_same_bytes(tmp_path):
    width = 5000  # long runs too are read before they are written
    parts = [Part(0, width, width, mask=m) for m in (0x0F, 0xF0)]
    path, lock = tmp_path / "f", threading.Lock()
    path.write_bytes(bytes(40 * width))
    descriptor = os.open(path, os.O_RDWR)

    def fill(part, value):
        for i in range(40):
            regions.write(descriptor, part, i, np.full((1, width), value, np.uint8), lock)

    threads = [threading.Thread(target=fill, args=(p, v)) for p, v in zip(parts, (0x05, 0xA0), strict=True)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    os.close(descriptor)
    assert (np.fromfile(path, np.uint8) == 0xA5).all()
