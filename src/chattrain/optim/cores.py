"""Independent tasks on a CPU, several at a time: products of small matrices are faster on one core each than on many cores
one by one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch

Item = TypeVar("Item")
MAX_THREADS = 8  # each needs memory for its intermediate tensors


def on_cores(work: Callable[[Item], None], items: list[Item]) -> None:
    """Call work(item) for all items, started in their order, in a thread pool that shares torch's cores.

    A single item runs in the caller's thread. Thread-local state (grad mode, autocast) of the caller does not apply in the
    pool. If a call raises, items that have not started are skipped; the first error, in the order of items, is raised after
    the running calls have ended.
    """
    cores = torch.get_num_threads()
    if cores == 1 or len(items) == 1:
        for item in items:
            work(item)
        return
    futures = [_pool(cores).submit(work, item) for item in items]
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        for future in futures:
            future.cancel()
        wait(futures)
    for future in futures:
        if not future.cancelled():
            future.result()


@cache
def _pool(cores: int) -> ThreadPoolExecutor:
    """A pool whose threads have all started.

    torch.set_num_threads in a thread also sets the default of threads that start later, so it is reset after all have started.
    """
    num_threads = min(cores, MAX_THREADS)
    pool = ThreadPoolExecutor(num_threads, "on_cores", initializer=_set_num_threads, initargs=(cores // num_threads,))
    started = Barrier(num_threads + 1)
    for _ in range(num_threads):
        pool.submit(started.wait)
    started.wait()
    torch.set_num_threads(cores)
    return pool


def _set_num_threads(cores: int) -> None:
    torch.get_num_threads()  # a thread's first call applies the process's default, which would overwrite an earlier set
    torch.set_num_threads(cores)
