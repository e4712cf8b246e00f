"""Muon where every rank holds some rows of every matrix (FSDP): all rows of a matrix are sent to one rank, its owner, which
sends the rows of the direction back. No rank holds more than a few whole matrices at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from chattrain.optim.newton_schulz import MuonSettings, Orthogonalizer, cost
from chattrain.parallel.ranks import Ranks


def owners(shapes: list[torch.Size], ranks: int) -> list[int]:
    """The rank that orthogonalizes each matrix: by falling cost, the rank with the least work so far.

    >>> owners([torch.Size([4, 4]), torch.Size([16, 4]), torch.Size([4, 4])], 2)
    [1, 0, 1]
    """
    costs, out = [0] * ranks, [0] * len(shapes)
    for i in sorted(range(len(shapes)), key=lambda i: -cost(shapes[i])):
        out[i] = costs.index(min(costs))
        costs[out[i]] += cost(shapes[i])
    return out


def row_bounds(rows: int, ranks: int) -> list[tuple[int, int]]:
    """(start, stop) of each rank's rows, as fully_shard cuts them (torch.chunk).

    >>> row_bounds(5, 4)
    [(0, 2), (2, 4), (4, 5), (5, 5)]
    """
    each = -(-rows // ranks)
    return [(min(r * each, rows), min((r + 1) * each, rows)) for r in range(ranks)]


class MuonExchange(Orthogonalizer):
    """`shapes`: parameter (this rank's rows) -> shape of the whole matrix, in the same order on every rank."""

    def __init__(self, dtype: torch.dtype, ranks: Ranks, shapes: dict[Tensor, torch.Size], settings: MuonSettings | None = None):
        super().__init__(dtype, settings)
        self.ranks, self.shapes = ranks, shapes
        self.owner = dict(zip(shapes, owners(list(shapes.values()), ranks.world_size), strict=True))

    def shape(self, param: Tensor) -> torch.Size:
        return self.shapes[param]

    def for_each_batch(self, params: Sequence[Tensor], update: Callable[[list[int]], None]) -> None:
        """Each call of update has up to a batch of matrices of every owner, so that all ranks compute at the same time."""
        batch = self.settings(params[0]).batch if params else 1
        num_assigned = [0] * self.ranks.world_size
        rounds: dict[int, list[int]] = {}
        for i, p in sorted(enumerate(params), key=lambda pair: -cost(self.shapes[pair[1]])):
            rounds.setdefault(num_assigned[self.owner[p]] // batch, []).append(i)
            num_assigned[self.owner[p]] += 1
        for indices in rounds.values():
            update(indices)

    def __call__(self, params: Sequence[Tensor], updates: Sequence[Tensor], steps: int) -> list[Tensor]:
        """This rank's rows of the updates in, the same rows of the directions out."""
        world = self.ranks.world_size
        owned_by = [[i for i, p in enumerate(params) if self.owner[p] == rank] for rank in range(world)]
        empty = updates[0].new_empty(0)  # torch.cat needs a tensor where a rank owns nothing
        to_owners = [torch.cat([empty, *(updates[i].flatten() for i in owned_by[rank])]) for rank in range(world)]
        shapes = [self.shapes[params[i]] for i in owned_by[self.ranks.rank]]
        to_holders = self._directions_of_owned(to_owners, shapes, steps)
        returned = self.ranks.all_to_all(to_holders, [sent.numel() for sent in to_owners])
        out: dict[int, Tensor] = {}
        for rank, flat in enumerate(returned):
            ends = [0, *accumulate(updates[i].numel() for i in owned_by[rank])]
            for i, (start, stop) in zip(owned_by[rank], pairwise(ends), strict=True):
                out[i] = flat[start:stop].view_as(updates[i])
        return [out[i] for i in range(len(updates))]

    def _directions_of_owned(self, to_owners: list[Tensor], shapes: list[torch.Size], steps: int) -> list[Tensor]:
        """Bring the matrices that this rank owns together and orthogonalize them.

        to_owners[r]: this rank's rows of rank r's matrices, flattened. `shapes`: of this rank's matrices. Returns for each
        rank its rows of the directions of this rank's matrices, flattened.
        """
        world = self.ranks.world_size
        bounds = [row_bounds(rows, world) for rows, _ in shapes]
        sizes = [[(b[r][1] - b[r][0]) * columns for b, (_, columns) in zip(bounds, shapes, strict=True)] for r in range(world)]
        received = self.ranks.all_to_all(to_owners, [sum(s) for s in sizes])
        pieces = [flat.split(s) for flat, s in zip(received, sizes, strict=True)]
        whole = [torch.cat([pieces[r][k] for r in range(world)]).view(shape) for k, shape in enumerate(shapes)]
        directions = super().__call__(whole, whole, steps) if whole else []
        empty = to_owners[0].new_empty(0)
        return [
            torch.cat([empty, *(d[b[r][0] : b[r][1]].flatten() for d, b in zip(directions, bounds, strict=True))])
            for r in range(world)
        ]
