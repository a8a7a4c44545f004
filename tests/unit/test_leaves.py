"""The loop over leaves: order, errors, and no work left undone in silence."""

import threading

import pytest

from exporter.pipeline.leaves import each


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_everything_is_done_once(workers):
    seen, lock = [], threading.Lock()

    def work(i):
        with lock:
            seen.append(i)

    each(range(500), work, workers)
    assert sorted(seen) == list(range(500))


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_error_stops_the_rest(workers):
    done = []

    def work(i):
        if i == 10:
            raise ValueError("ten")
        done.append(i)

    with pytest.raises(ValueError, match="ten"):
        each(range(10_000), work, workers)
    assert len(done) < 9_000


@pytest.mark.parametrize("workers", [1, 3])
def test_tasks_that_fail_to_come_are_an_error(workers):
    def tasks():
        yield 1
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        each(tasks(), lambda i: None, workers)


def test_no_more_at_once_than_workers():
    now, most, lock = 0, 0, threading.Lock()

    def work(_):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        threading.Event().wait(0.002)
        with lock:
            now -= 1

    each(range(40), work, 3)
    assert most <= 3
