"""Run the leaves of many tensors through a function, a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")


def each(tasks: Iterable[T], work: Callable[[T], None], workers: int) -> None:
    """Call `work` on every task, at most `workers` at once; the first error stops the rest.

    Threads, because numpy, hashing and file I/O all release the interpreter lock. At most twice as many
    tasks as workers are in flight, so that memory stays flat. With one worker it is a plain loop.
    """
    if workers <= 1:
        for task in tasks:
            work(task)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="leaf")
    running: set[Future[None]] = set()
    try:
        for task in tasks:
            if len(running) >= 2 * workers:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
            running.add(pool.submit(work, task))
        for future in running:
            future.result()
    finally:
        # Queued leaves are dropped; those under way end on their own, so files stay consistent.
        pool.shutdown(wait=True, cancel_futures=True)
