"""A step is the same set of rows for any number of ranks and any batch size, and can be looked up out of turn."""

from __future__ import annotations

import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch

from chattrain.config.data import SourceConfig
from chattrain.data.batch import Batch
from chattrain.data.collators import Packed, Padded
from chattrain.data.loader import Loader, evaluation_batches
from chattrain.data.mixture import Mixture
from chattrain.data.passes import PassLimits
from tests.documents import tokenized

PAD = 9_999
CPU = torch.device("cpu")
ROWS_PER_STEP = 32


def mixture() -> Mixture:
    """Two sources, 70 documents of 2 to 90 tokens; no two tokens are alike."""
    rng = np.random.default_rng(5)
    caches, first = [], 0
    for name, n in (("a", 50), ("b", 20)):
        lengths = rng.integers(2, 90, n)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        mask = rng.integers(0, 2, offsets[-1]).astype(np.uint8)
        mask[offsets[:-1]], mask[offsets[:-1] + 1] = 0, 1
        tokens = np.arange(first, first + offsets[-1], dtype=np.uint16)
        caches.append(tokenized(name, tokens, mask, offsets))
        first += int(offsets[-1])
    return Mixture(caches, [SourceConfig("a"), SourceConfig("b")], seed=3)


COLLATORS = [
    pytest.param(lambda last=None: Packed(mixture(), 16, PAD, last), id="packed"),
    pytest.param(lambda last=None: Padded(mixture(), 64, PAD, last), id="masked"),
]


def rows_in(batches: list[Batch]) -> Counter:
    """Rows without their padding, however wide the batch is, and how often each is there."""
    found = Counter()
    for batch in batches:
        for x, y in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            row = tuple((a, b) for a, b in zip(x, y, strict=True) if a != PAD)
            found.update([row] if row else [])
    return found


def limits_of(collator, rows: int) -> PassLimits:
    """Of passes of this many full rows, or as many tokens."""
    return PassLimits(rows, rows * collator.seq_len, "cpu")


def loader_of(collator, rows: int = 8, rows_per_step: int = ROWS_PER_STEP, rank: int = 0, world_size: int = 1) -> Loader:
    return Loader(collator, rows_per_step, limits_of(collator, rows), CPU, rank, world_size)


def step_of(collator, step: int, rows: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
    loader = loader_of(collator, rows, rank=rank, world_size=world_size)
    try:
        return loader.step(step)
    finally:
        loader.close()


@pytest.mark.parametrize("make", COLLATORS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_a_step_is_the_same_rows_for_any_ranks_and_limits(make, world_size, rows):
    for step in (0, 3):  # the last runs over the end of an epoch
        whole = rows_in(step_of(make(), step, ROWS_PER_STEP))
        shares = [step_of(make(), step, rows, rank, world_size) for rank in range(world_size)]
        assert sum((rows_in(share) for share in shares), Counter()) == whole
        assert whole.total() == ROWS_PER_STEP
        assert len({tuple(len(batch.inputs) for batch in share) for share in shares}) == 1  # all ranks have as much to do
        assert all(batch.inputs.numel() <= limits_of(make(), rows).tokens for share in shares for batch in share)
        assert sum(b.num_supervised for share in shares for b in share) == sum(target != -1 for row in whole for _, target in row)


@pytest.mark.parametrize("make", COLLATORS)
def test_steps_one_after_the_other_hold_the_rows_of_an_epoch_once(make):
    collator = make()
    loader = loader_of(collator)
    found = sum((rows_in(loader.step(step)) for step in range(collator.steps_in(1, ROWS_PER_STEP))), Counter())
    loader.close()
    for row, times in rows_in([make().batch(np.arange(collator.rows_in(1)))]).items():
        assert found[row] >= times


@pytest.mark.parametrize("make", COLLATORS)
def test_a_step_out_of_turn_is_the_step_in_turn(make):
    loader = loader_of(make())
    in_turn = [loader.step(step) for step in range(5)]
    back = [loader.step(step) for step in (4, 1, 2)]  # resumed, begun anew, and read ahead
    loader.close()
    for step, batches in zip((4, 1, 2), back, strict=True):
        for one, two in zip(in_turn[step], batches, strict=True):
            assert torch.equal(one.inputs, two.inputs) and torch.equal(one.targets, two.targets)
            assert one[2:4] == two[2:4]


def test_rows_of_like_length_share_a_batch_and_pad_little():
    arranged = step_of(Padded(mixture(), 64, PAD), 0, 8)
    assert [batch.inputs.shape[1] for batch in arranged] == sorted(batch.inputs.shape[1] for batch in arranged)
    assert sum(batch.inputs.numel() for batch in arranged) < ROWS_PER_STEP * 64


def test_what_goes_wrong_ahead_of_time_is_told_when_its_step_is_taken():
    class Breaks(Packed):
        def batch(self, rows):
            if rows.max() >= ROWS_PER_STEP:
                raise RuntimeError("the disk is gone")
            return super().batch(rows)

    loader = loader_of(Breaks(mixture(), 16, PAD))
    loader.step(0)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        loader.step(1)
    loader.close()


def test_batches_are_made_and_moved_in_the_background(monkeypatch):
    moved_by = []
    monkeypatch.setattr(Batch, "to", lambda batch, device: moved_by.append(threading.current_thread()) or batch)
    loader = loader_of(Packed(mixture(), 16, PAD))
    for step in range(3):
        loader.step(step)
    loader.close()
    assert len(moved_by) >= 3 * ROWS_PER_STEP // 8
    assert threading.current_thread() not in moved_by


def test_the_seconds_that_steps_wait_for_their_batches_are_counted():
    class Slow(Packed):
        def batch(self, rows):
            time.sleep(0.02)
            return super().batch(rows)

    loader = loader_of(Slow(mixture(), 16, PAD))
    assert loader.waited_s == 0
    loader.step(0)
    assert loader.waited_s >= 4 * 0.02  # nothing was made ahead
    loader.close()


@pytest.mark.parametrize("make", COLLATORS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 3, 8, 50])
def test_an_evaluation_sees_every_row_once_and_gives_all_ranks_as_many_batches(make, world_size, rows):
    collator = make(0)
    limits = limits_of(collator, rows)
    n = collator.rows_in(1)
    shares = [list(evaluation_batches(make(0), n, limits, rank, world_size)) for rank in range(world_size)]
    assert sum((rows_in(share) for share in shares), Counter()) == rows_in([collator.batch(np.arange(n))])
    assert len({len(share) for share in shares}) == 1
    assert all(batch.inputs.numel() <= limits.tokens for share in shares for batch in share)


def test_an_evaluation_of_fewer_rows_takes_the_first_ones():
    collator = Padded(mixture(), 64, PAD, last_epoch=0)
    some = rows_in(list(evaluation_batches(collator, 10, limits_of(collator, 4))))
    assert some == rows_in([collator.batch(np.arange(10))]) and some.total() == 10


@pytest.mark.parametrize("make", COLLATORS)
def test_a_step_is_described_by_the_source_and_row_of_all_that_is_in_it(make):
    collator, documents = make(), mixture()
    name_of = {int(token): documents.describe(i) for i in range(len(documents)) for token in documents.document(i)[0]}
    loader = loader_of(collator, 4, rows_per_step=8)
    tokens = [int(t) for batch in loader.step(2) for side in (batch.inputs, batch.targets) for t in side.unique()]
    described = loader.describe(2)
    loader.close()
    assert set(described.replace(" + ", ", ").split(", ")) == {name_of[t] for t in tokens if t in name_of}


def test_a_long_description_names_some_and_counts_the_rest():
    described = loader_of(Padded(mixture(), 64, PAD)).describe(0)
    assert described.endswith(" and 24 more")
    assert described.count(" row ") == 8
    assert {name.split()[0] for name in described.removesuffix(" and 24 more").split(", ")} <= {"a", "b"}
