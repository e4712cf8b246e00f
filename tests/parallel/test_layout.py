"""Who steps what: every element once, nothing empty, everyone with as much to do."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chattrain.model.gpt import GPT
from chattrain.optim.newton_schulz import cost
from chattrain.parallel.layout import Item, fill_bucket, plan_buckets, shard_group_size
from chattrain.parallel.muon_exchange import owners, row_bounds

SIZES = {"d12": (12, 768), "d20": (20, 1280), "d32": (32, 2048)}


def items_of(size: str) -> list[Item]:
    """In the order of backward, matrices of the blocks whole."""
    n_layer, n_embd = SIZES[size]
    with torch.device("meta"):
        model = GPT(65_536, n_layer, n_embd, n_embd // 128)
    return [Item(name, p.numel(), cost(p.shape) if ".h." in name else None) for name, p in reversed([*model.named_parameters()])]


any_items = st.lists(st.tuples(st.integers(1, 60), st.booleans()), min_size=1, max_size=20).map(
    lambda drawn: [Item(f"p{i}", numel, numel**2 if whole else None) for i, (numel, whole) in enumerate(drawn)]
)


def elements(shares) -> list[tuple[str, int]]:
    return sorted((piece.name, i) for shard in shares for piece in shard for i in range(piece.start, piece.stop))


@given(any_items, st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_every_element_is_stepped_once_and_matrices_stay_whole(items, ranks):
    made = plan_buckets(items, ranks)
    assert elements(shard for bucket in made for shard in bucket.shards) == sorted(
        (item.name, i) for item in items for i in range(item.numel)
    )
    whole = {item.name: item.numel for item in items if item.cost is not None}
    for bucket in made:
        assert len(bucket.shards) == ranks
        assert bucket.size == max(sum(piece.stop - piece.start for piece in shard) for shard in bucket.shards)
        for piece in (piece for shard in bucket.shards for piece in shard):
            assert piece.name not in whole or (piece.start, piece.stop) == (0, whole[piece.name])


@given(any_items, st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_buckets_follow_the_order_of_backward(items, ranks):
    order = {item.name: i for i, item in enumerate(items)}
    seen = [{order[piece.name] for shard in bucket.shards for piece in shard} for bucket in plan_buckets(items, ranks)]
    assert all(max(before) < min(after) for before, after in pairwise(seen))


def test_what_may_be_cut_fills_up_what_whole_matrices_leave_free():
    bucket = fill_bucket([Item("wide", 40, 40), Item("square", 10, 10), Item("embedding", 30)], 4)
    loads = [sum(piece.stop - piece.start for piece in shard) for shard in bucket.shards]
    assert loads == [40, 14, 14, 12]  # 40 + 10 + 30 on four ranks, where one holds 40


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
@pytest.mark.parametrize("size", SIZES)
def test_shares_are_equal_in_elements_and_work_and_buckets_are_many(size, ranks):
    items = items_of(size)
    made = plan_buckets(items, ranks)
    assert shard_group_size(items, ranks) == ranks
    assert sum(bucket.size for bucket in made) * ranks < 1.001 * sum(item.numel for item in items)
    work = made[-1].costs
    assert max(work) <= 1.1 * sum(work) / ranks and len(made) >= 3


@pytest.mark.parametrize("size, world_size, groups_of", [("d32", 64, 64), ("d32", 512, 64), ("d20", 512, 64), ("d12", 1024, 64)])
def test_more_ranks_than_matrices_are_groups_that_share_evenly(size, world_size, groups_of):
    assert shard_group_size(items_of(size), world_size) == groups_of


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)).map(torch.Size), max_size=20), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_no_rank_owns_more_than_the_mean_and_one_matrix(shapes, ranks):
    costs = [0] * ranks
    for shape, owner in zip(shapes, owners(shapes, ranks), strict=True):
        costs[owner] += cost(shape)
    assert max(costs) <= sum(costs) / ranks + max(map(cost, shapes), default=0)


@given(st.integers(0, 50), st.integers(1, 9))
@settings(deadline=None)
def test_rows_are_cut_as_torch_chunks_them(rows, ranks):
    chunks = [len(chunk) for chunk in torch.arange(rows).chunk(ranks)] if rows else []
    assert [stop - start for start, stop in row_bounds(rows, ranks)][: len(chunks)] == chunks
    assert row_bounds(rows, ranks)[-1][1] == rows
