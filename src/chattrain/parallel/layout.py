"""Which rank steps which part of which parameter: pure functions, the same on every rank.

Parameters lie behind one another in buckets. A bucket has one shard for each rank, of equal size, so that a reduce-scatter of its
gradients and an all-gather of its weights move no byte more than they must. Some parameters must stay whole (a matrix of
Muon's); the others may be cut anywhere, and fill the shards up.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import NamedTuple

BUCKETS = 8  # about so many, so that one is on its way while backward makes the next
MOST_ELEMENTS = 1 << 26  # of a bucket: 256 MiB of fp32
UNEVEN = 1.1  # the largest over the mean that is taken for even


class Item(NamedTuple):
    """A parameter; `cost` is what stepping it whole costs, None: it may be cut."""

    name: str
    numel: int
    cost: int | None = None


class ParamSlice(NamedTuple):
    """A range of a parameter's flattened elements."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Bucket:
    """shards[r]: what rank r steps, in the order in which it lies; `size` elements of room a shard; costs[r]: of its whole
    parameters, with those of the buckets before."""

    shards: tuple[tuple[ParamSlice, ...], ...]
    size: int
    costs: tuple[int, ...]

    @property
    def numel(self) -> int:
        return sum(piece.stop - piece.start for shard in self.shards for piece in shard)

    @property
    def tight(self) -> bool:
        """Is as good as nothing of it empty? Shares are then of equal size too."""
        return self.size == -(-self.numel // len(self.shards))

    @property
    def even(self) -> bool:
        """Tight, and all ranks have about as much to do."""
        return self.tight and max(self.costs) * len(self.costs) <= UNEVEN * sum(self.costs)


def fill(items: list[Item], ranks: int, before: tuple[int, ...] | None = None) -> Bucket:
    """One bucket. Whole items go, the costliest first, to the rank with the least to do that has room; the rest fills up.
    `before`: what each rank has to do already.

    >>> for shard in fill([Item("a", 4, 9), Item("b", 2, 5), Item("c", 4)], 2).shards:
    ...     print([(name, start, stop) for name, start, stop in shard])
    [('a', 0, 4), ('c', 0, 1)]
    [('b', 0, 2), ('c', 1, 4)]
    """
    size = -(-sum(item.numel for item in items) // ranks)
    shards: list[list[ParamSlice]] = [[] for _ in range(ranks)]
    loads, costs = [0] * ranks, list(before or [0] * ranks)
    idlest = [(costs[r], 0, r) for r in range(ranks)]
    heapify(idlest)
    for item in sorted((item for item in items if item.cost is not None), key=lambda item: -item.cost):
        full = []
        while idlest and loads[idlest[0][2]] + item.numel > size:
            full.append(heappop(idlest))
        rank = idlest[0][2] if idlest else full[0][2]
        shards[rank].append(ParamSlice(item.name, 0, item.numel))
        loads[rank] += item.numel
        costs[rank] += item.cost
        for _, _, r in full if not idlest else [*full, heappop(idlest)]:
            heappush(idlest, (costs[r], loads[r], r))
    rest = [item for item in items if item.cost is None]
    rooms = [max(0, _level(loads, sum(item.numel for item in rest)) - load) for load in loads]
    rank = 0
    for item in rest:
        start = 0
        while start < item.numel:
            stop = min(item.numel, start + rooms[rank])
            if stop > start:
                shards[rank].append(ParamSlice(item.name, start, stop))
            rooms[rank] -= stop - start
            rank += not rooms[rank]
            start = stop
    return Bucket(tuple(map(tuple, shards)), max(sum(p.stop - p.start for p in shard) for shard in shards), tuple(costs))


def _level(loads: list[int], amount: int) -> int:
    """The least height up to which `amount` fills the loads, like water.

    >>> _level([5, 1, 2], 4)
    4
    """
    lowest = sorted(loads)
    for count in range(len(lowest), 0, -1):
        level = -(-(amount + sum(lowest[:count])) // count)
        if count == 1 or level > lowest[count - 1]:
            return level
    raise AssertionError("there are no loads")


def _largest(items: list[Item]) -> int:
    """Elements of the largest that must stay whole."""
    return max((item.numel for item in items if item.cost is not None), default=0)


def buckets(items: list[Item], ranks: int) -> list[Bucket]:
    """Buckets of the items in the order given, each even, or at least tight, if that can be had."""
    wanted = min(-(-sum(item.numel for item in items) // BUCKETS), MOST_ELEMENTS)
    done: list[tuple[list[Item], Bucket]] = []

    def after(kept: int, part: list[Item]) -> Bucket:
        return fill(part, ranks, done[kept - 1][1].costs if kept else None)

    pending: list[Item] = []
    for item in items:
        pending.append(item)
        if sum(i.numel for i in pending) >= max(wanted, _largest(pending) * ranks):
            bucket = after(len(done), pending)
            if bucket.even:
                done.append((pending, bucket))
                pending = []
    if not pending:
        return [bucket for _, bucket in done]
    ends = []  # what is left joins as few buckets before it as it needs to
    for kept in range(len(done), -1, -1):
        ends.append((kept, after(kept, [i for part, _ in done[kept:] for i in part] + pending)))
        if ends[-1][1].even:
            break
    kept, last = next((end for end in ends if end[1].even), next((end for end in ends if end[1].tight), ends[-1]))
    return [*(bucket for _, bucket in done[:kept]), last]


def ranks_that_share(items: list[Item], world_size: int) -> int:
    """Over how many ranks the items can be spread evenly: the largest divisor of world_size for which no shard is more than a
    tenth above the mean. A shard holds at least its largest matrix, so that thousands of ranks are groups that do the same.

    >>> ranks_that_share([Item("a", 4, 9), Item("b", 4, 9), Item("c", 2)], 8)
    2
    """
    total = sum(item.numel for item in items)
    for ranks in range(world_size, 0, -1):
        if (
            world_size % ranks == 0
            and _largest(items) * ranks <= UNEVEN * total
            and fill(items, ranks).size * ranks <= UNEVEN * total
        ):
            return ranks
    raise AssertionError("one rank always has all")
