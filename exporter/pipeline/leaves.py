"""Run the leaves of many tensors through a function, a few at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def each(tasks: Iterable[T], work: Callable[[T], None], workers: int) -> None:
    """Call `work` on every task, at most `workers` at once, in order; the first error stops the rest.

    Threads, because numpy, hashing and file I/O all release the interpreter lock. Each takes the next
    task when it is free, so memory stays flat and files are read front to back. With one worker it is a
    plain loop.
    """
    if workers <= 1:
        for task in tasks:
            work(task)
        return
    queue, lock, stop, done = iter(tasks), threading.Lock(), threading.Event(), object()
    errors: list[BaseException] = []

    def run() -> None:
        while not stop.is_set():
            try:
                with lock:
                    task = next(queue, done)
                if task is done:
                    return
                work(task)  # type: ignore[arg-type]  # not `done`
            except BaseException as e:
                errors.append(e)
                stop.set()

    threads = [threading.Thread(target=run, name=f"leaf-{i}", daemon=True) for i in range(workers)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
        # Interrupted: leaves under way end on their own, so files stay consistent.
        stop.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
