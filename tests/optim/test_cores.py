"""Work on several cores at a time."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from chattrain.optim.cores import on_cores


def test_when_a_piece_of_work_fails_none_is_under_way_any_more():
    begun, done = [], []

    def work(piece: int) -> None:
        begun.append(piece)
        time.sleep(0.05)
        if piece == 1:
            raise ValueError("piece 1")
        time.sleep(0.1)
        done.append(piece)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="piece 1"):
            on_cores(work, list(range(9)))
    finally:
        torch.set_num_threads(before)
    assert sorted([*done, 1]) == sorted(begun) and len(begun) < 9


def test_work_on_cores_raises_and_leaves_the_threads_of_others_alone():
    def fail(piece: int) -> None:
        raise ValueError(f"piece {piece}")

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        done = []
        on_cores(lambda piece: done.append((piece, torch.get_num_threads())), list(range(6)))
        assert sorted(done) == [(piece, 1) for piece in range(6)]
        with pytest.raises(ValueError, match="piece 0"):
            on_cores(fail, [0])
        with pytest.raises(ValueError, match="piece"):
            on_cores(fail, [0, 1])
        with ThreadPoolExecutor(1) as another:
            assert another.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)
