"""Muon where every rank holds some rows of every matrix: each matrix is brought together on one rank, and its direction sent
back. No rank holds more than a few whole matrices at a time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from chattrain.optim.newton_schulz import MuonSettings, Orthogonalizer, cost
from chattrain.parallel.ranks import Ranks


def owners(shapes: list[torch.Size], ranks: int) -> list[int]:
    """For each matrix the rank that orthogonalizes it: the costliest first, to the one with the least to do.

    >>> owners([torch.Size([4, 4]), torch.Size([16, 4]), torch.Size([4, 4])], 2)
    [1, 0, 1]
    """
    costs, out = [0] * ranks, [0] * len(shapes)
    for i in sorted(range(len(shapes)), key=lambda i: -cost(shapes[i])):
        out[i] = costs.index(min(costs))
        costs[out[i]] += cost(shapes[i])
    return out


def row_bounds(rows: int, ranks: int) -> list[tuple[int, int]]:
    """First and last row + 1 of each rank, as fully_shard cuts them (torch.chunk).

    >>> row_bounds(5, 4)
    [(0, 2), (2, 4), (4, 5), (5, 5)]
    """
    each = -(-rows // ranks)
    return [(min(r * each, rows), min((r + 1) * each, rows)) for r in range(ranks)]


class MuonExchange(Orthogonalizer):
    """`shapes`: of the whole matrices, in the order of the parameters (this rank's rows of them) that `for_each_batch` gets."""

    def __init__(self, dtype: torch.dtype, ranks: Ranks, shapes: dict[Tensor, torch.Size], settings: MuonSettings | None = None):
        super().__init__(dtype, settings)
        self.ranks, self.shapes = ranks, shapes
        self.owner = dict(zip(shapes, owners(list(shapes.values()), ranks.world_size), strict=True))

    def shape(self, param: Tensor) -> torch.Size:
        return self.shapes[param]

    def for_each_batch(self, params: list[Tensor], update: Callable[[list[int]], None]) -> None:
        """In each turn every rank orthogonalizes up to a batch of matrices of its own."""
        batch = self.settings(params[0]).batch if params else 1
        seen = [0] * self.ranks.world_size
        turns: dict[int, list[int]] = {}
        for i, p in sorted(enumerate(params), key=lambda pair: -cost(self.shapes[pair[1]])):
            turns.setdefault(seen[self.owner[p]] // batch, []).append(i)
            seen[self.owner[p]] += 1
        for places in turns.values():
            update(places)

    def __call__(self, params: list[Tensor], updates: list[Tensor], steps: int) -> list[Tensor]:
        """Rows of the updates in, the same rows of their directions out."""
        world, me = self.ranks.world_size, self.ranks.rank
        of_rank = [[i for i, p in enumerate(params) if self.owner[p] == rank] for rank in range(world)]
        mine = [self.shapes[params[i]] for i in of_rank[me]]
        bounds = [row_bounds(rows, world) for rows, _ in mine]
        empty = updates[0].new_empty(0)
        to_owners = [torch.cat([empty, *(updates[i].flatten() for i in of_rank[rank])]) for rank in range(world)]
        sizes = [[(b[r][1] - b[r][0]) * columns for b, (_, columns) in zip(bounds, mine, strict=True)] for r in range(world)]
        arrived = self.ranks.exchange(to_owners, [sum(s) for s in sizes])
        received = [piece.split(s) for piece, s in zip(arrived, sizes, strict=True)]
        whole = [torch.cat([received[r][k] for r in range(world)]).view(shape) for k, shape in enumerate(mine)]
        moves = super().__call__(whole, whole, steps) if whole else []
        back = [
            torch.cat([empty, *(m[b[r][0] : b[r][1]].flatten() for m, b in zip(moves, bounds, strict=True))])
            for r in range(world)
        ]
        returned = self.ranks.exchange(back, [piece.numel() for piece in to_owners])
        out: dict[int, Tensor] = {}
        for rank, piece in enumerate(returned):
            ends = [0, *accumulate(updates[i].numel() for i in of_rank[rank])]
            for i, (start, stop) in zip(of_rank[rank], pairwise(ends), strict=True):
                out[i] = piece[start:stop].view_as(updates[i])
        return [out[i] for i in range(len(updates))]
