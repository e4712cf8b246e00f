"""Which rank steps which slice of which parameter: pure functions, with the same result on every rank.

Parameters are grouped into buckets, in the order in which backward completes their gradients. A bucket is split into one shard
for each rank, all of the same size, so that a reduce-scatter of its gradients and an all-gather of its weights send no padding.
Some parameters must stay whole (Muon's matrices); the others may be cut anywhere, and fill the shards up to the same size.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import NamedTuple

NUM_BUCKETS = 8  # roughly: enough to send one bucket while backward computes the next
MAX_ELEMENTS = 1 << 26  # of a bucket: 256 MiB of fp32
MAX_IMBALANCE = 1.1  # largest over mean, up to which shards or costs count as balanced


class Item(NamedTuple):
    """A parameter of `numel` elements. `cost`: of stepping it, for one that must stay whole; None: it may be cut."""

    name: str
    numel: int
    cost: int | None = None


class ParamSlice(NamedTuple):
    """A range of a parameter's flattened elements."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class BucketLayout:
    """How a bucket is split over ranks.

    shards[r]: the slices that rank r steps, in their order in the shard. `size`: capacity of a shard, in elements.
    costs[r]: rank r's cost of uncut parameters, earlier buckets included.
    """

    shards: tuple[tuple[ParamSlice, ...], ...]
    size: int
    costs: tuple[int, ...]

    @property
    def numel(self) -> int:
        return sum(piece.stop - piece.start for shard in self.shards for piece in shard)

    @property
    def tight(self) -> bool:
        """Are the shards full, but for rounding?"""
        return self.size == -(-self.numel // len(self.shards))

    @property
    def balanced(self) -> bool:
        """Are the shards full, and the ranks' costs about the same?"""
        return self.tight and max(self.costs) * len(self.costs) <= MAX_IMBALANCE * sum(self.costs)


def fill_bucket(items: list[Item], ranks: int, costs_before: tuple[int, ...] | None = None) -> BucketLayout:
    """Split one bucket over ranks. `costs_before`: each rank's cost of earlier buckets.

    Whole items first, by falling cost: each to the rank with the lowest cost that has capacity left. Then the other items are
    cut to level the shards.

    >>> for shard in fill_bucket([Item("a", 4, 9), Item("b", 2, 5), Item("c", 4)], 2).shards:
    ...     print([(name, start, stop) for name, start, stop in shard])
    [('a', 0, 4), ('c', 0, 1)]
    [('b', 0, 2), ('c', 1, 4)]
    """
    shards: list[list[ParamSlice]] = [[] for _ in range(ranks)]
    costs = list(costs_before or [0] * ranks)
    loads = _assign_whole(items, shards, costs)
    _cut_to_level([item for item in items if item.cost is None], shards, loads)
    size = max(sum(piece.stop - piece.start for piece in shard) for shard in shards)
    return BucketLayout(tuple(map(tuple, shards)), size, tuple(costs))


def _assign_whole(items: list[Item], shards: list[list[ParamSlice]], costs: list[int]) -> list[int]:
    """Append the items that must stay whole to shards, and add their costs. Returns the elements in each shard."""
    ranks = len(shards)
    capacity = -(-sum(item.numel for item in items) // ranks)
    loads = [0] * ranks
    by_cost = [(costs[r], 0, r) for r in range(ranks)]  # a heap of (cost, load, rank)
    heapify(by_cost)
    whole = [(item.cost, item) for item in items if item.cost is not None]
    for cost, item in sorted(whole, key=lambda pair: -pair[0]):
        full = []
        while by_cost and loads[by_cost[0][2]] + item.numel > capacity:
            full.append(heappop(by_cost))
        rank = by_cost[0][2] if by_cost else full[0][2]
        shards[rank].append(ParamSlice(item.name, 0, item.numel))
        loads[rank] += item.numel
        costs[rank] += cost
        for _, _, r in [*full, heappop(by_cost)] if by_cost else full:
            heappush(by_cost, (costs[r], loads[r], r))
    return loads


def _cut_to_level(items: list[Item], shards: list[list[ParamSlice]], loads: list[int]) -> None:
    """Cut the items, and append the slices to shards so that these end up with the same size, as far as they can."""
    level = _water_level(loads, sum(item.numel for item in items))
    free = [max(0, level - load) for load in loads]
    rank = 0
    for item in items:
        start = 0
        while start < item.numel:
            stop = min(item.numel, start + free[rank])
            if stop > start:
                shards[rank].append(ParamSlice(item.name, start, stop))
            free[rank] -= stop - start
            rank += not free[rank]
            start = stop


def _water_level(loads: list[int], amount: int) -> int:
    """The lowest level up to which `amount` can fill the loads, as water fills vessels.

    >>> _water_level([5, 1, 2], 4)
    4
    """
    lowest = sorted(loads)
    for count in range(len(lowest), 0, -1):
        level = -(-(amount + sum(lowest[:count])) // count)
        if count == 1 or level > lowest[count - 1]:
            return level
    raise AssertionError("there are no loads")


def _largest_whole(items: list[Item]) -> int:
    """Elements of the largest item that must stay whole; 0 if none must."""
    return max((item.numel for item in items if item.cost is not None), default=0)


def plan_buckets(items: list[Item], ranks: int) -> list[BucketLayout]:
    """Split items, in the order given, into buckets that are balanced, or at least tight, where that is possible."""
    target = min(-(-sum(item.numel for item in items) // NUM_BUCKETS), MAX_ELEMENTS)
    done: list[tuple[list[Item], BucketLayout]] = []

    def fill_after(num_kept: int, members: list[Item]) -> BucketLayout:
        return fill_bucket(members, ranks, done[num_kept - 1][1].costs if num_kept else None)

    pending: list[Item] = []
    for item in items:
        pending.append(item)
        if sum(i.numel for i in pending) >= max(target, _largest_whole(pending) * ranks):
            bucket = fill_after(len(done), pending)
            if bucket.balanced:
                done.append((pending, bucket))
                pending = []
    if not pending:
        return [bucket for _, bucket in done]
    candidates = []  # for the last bucket: the remaining items, merged with ever more buckets before them
    for num_kept in range(len(done), -1, -1):
        merged = [item for members, _ in done[num_kept:] for item in members] + pending
        candidates.append((num_kept, fill_after(num_kept, merged)))
        if candidates[-1][1].balanced:
            break
    balanced = (candidate for candidate in candidates if candidate[1].balanced)
    tight = (candidate for candidate in candidates if candidate[1].tight)
    num_kept, last = next(balanced, next(tight, candidates[-1]))
    return [*(bucket for _, bucket in done[:num_kept]), last]


def shard_group_size(items: list[Item], world_size: int) -> int:
    """Over how many ranks the items can be sharded evenly: the largest divisor of world_size for which no shard is more than
    a tenth above the mean.

    A shard holds at least one whole matrix, so a model has too few matrices for thousands of ranks: these form groups of this
    size, and the groups step the same.

    >>> shard_group_size([Item("a", 4, 9), Item("b", 4, 9), Item("c", 2)], 8)
    2
    """
    total = sum(item.numel for item in items)
    for ranks in range(world_size, 0, -1):
        if (
            world_size % ranks == 0
            and _largest_whole(items) * ranks <= MAX_IMBALANCE * total
            and fill_bucket(items, ranks).size * ranks <= MAX_IMBALANCE * total
        ):
            return ranks
    raise AssertionError("one rank can always hold all items")
