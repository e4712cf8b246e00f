"""Independent pieces of work on a CPU, each on a core of its own: products of small matrices use one core better than several."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Piece = TypeVar("Piece")


def on_cores(work: Callable[[Piece], None], pieces: list[Piece]) -> None:
    """work(piece) of all pieces, begun in their order, on as many cores as torch computes with. What is local to a thread (grad
    mode, autocast) is not that of the caller. Raises what the work raises."""
    cores = torch.get_num_threads()
    if cores == 1 or len(pieces) == 1:
        for piece in pieces:
            work(piece)
    else:
        try:
            for _ in _threads(cores).map(work, pieces):
                pass
        finally:
            torch.set_num_threads(cores)  # their initializer has set it for threads that others start later, too


@cache
def _threads(number: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(number, "on_cores", initializer=torch.set_num_threads, initargs=(1,))
