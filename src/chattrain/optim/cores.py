"""Independent pieces of work on a CPU, several at a time: products of small matrices use one core better than many."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
MOST = 8  # pieces at a time: each keeps memory of its own


def on_cores(work: Callable[[Piece], None], pieces: list[Piece]) -> None:
    """work(piece) of all pieces, begun in their order, in threads that share the cores that torch computes with; a single piece
    in the caller's. What is local to a thread (grad mode, autocast) is not the caller's.

    Raises what the first piece to fail raises, when no piece is under way any more; what had not begun is left out.
    """
    cores = torch.get_num_threads()
    if cores == 1 or len(pieces) == 1:
        for piece in pieces:
            work(piece)
        return
    begun = [_threads(cores).submit(work, piece) for piece in pieces]
    try:
        wait(begun, return_when=FIRST_EXCEPTION)
    finally:
        for one in begun:
            one.cancel()
        wait(begun)
    for one in begun:
        if not one.cancelled():
            one.result()


@cache
def _threads(cores: int) -> ThreadPoolExecutor:
    """All started at once: torch takes the number that each sets for itself for that of later threads, too, until it is reset."""
    number = min(cores, MOST)
    threads = ThreadPoolExecutor(number, "on_cores", initializer=_take, initargs=(cores // number,))
    started = Barrier(number + 1)
    for _ in range(number):
        threads.submit(started.wait)
    started.wait()
    torch.set_num_threads(cores)
    return threads


def _take(cores: int) -> None:
    torch.get_num_threads()  # at its first question a thread gets the number of the process, whatever it has set before
    torch.set_num_threads(cores)
