"""What ddp and fsdp have in common: state that lies in pieces on several ranks, brought together for a checkpoint."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from chattrain.parallel.ranks import Ranks
from chattrain.parallel.strategy import ParallelStrategy


class OwnedSlice(NamedTuple):
    """Elements of a flattened parameter that a rank steps."""

    rank: int
    start: int
    stop: int


class ShardedStrategy(ParallelStrategy):
    """Each rank steps ranges of parameters; a checkpoint holds whole ones, so that any number of ranks goes on from it."""

    def __init__(self, ranks: Ranks, dtype: torch.dtype):
        super().__init__(dtype)
        self.ranks = ranks
        self.shapes: dict[str, torch.Size] = {}  # of whole parameters

    @abstractmethod
    def owned_slices(self, name: str) -> list[OwnedSlice]:
        """Who steps which part of a parameter, each part once."""

    def consolidate_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        own: dict[str, dict[str, Tensor]] = {name: {} for name in self.shapes}
        for key, value in state.items():
            name, _, entry = key.rpartition("/")
            own[name][entry] = value
        whole: dict[str, Tensor] = {}
        for name, shape in self.shapes.items():
            parts = [(part, self.ranks.to_main(part.rank, own[name])) for part in self.owned_slices(name)]
            if self.ranks.is_main:
                whole |= {f"{name}/{entry}": value for entry, value in _joined(parts, shape).items()}
        return whole

    def shard_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        names = {key.rpartition("/")[0] for key in state}
        if names != set(self.shapes):
            raise ValueError("the optimizer state is of other parameters")
        mine = {part_of: part for part_of in self.shapes for part in self.owned_slices(part_of) if part.rank == self.shard_rank}
        out = {}
        for key, value in state.items():
            part = mine.get(key.rpartition("/")[0])
            if part is not None:
                out[key] = (
                    value.flatten()[part.start : part.stop].view(self.slice_shape(key.rpartition("/")[0], part))
                    if value.ndim
                    else value
                )
        return out

    @property
    def shard_rank(self) -> int:
        """The rank whose ranges this process steps."""
        return self.ranks.rank

    def slice_shape(self, name: str, part: OwnedSlice) -> torch.Size:
        """How the optimizer sees the range."""
        whole = self.shapes[name]
        if part.stop - part.start == whole.numel():
            return whole
        return torch.Size([part.stop - part.start])


def _joined(parts: list[tuple[OwnedSlice, dict[str, Tensor]]], shape: torch.Size) -> dict[str, Tensor]:
    """Each entry of a parameter's state, whole; numbers (step counts) are the same in all parts."""
    out = {}
    for entry, first in parts[0][1].items():
        if first.ndim == 0:
            out[entry] = first
            continue
        flat = torch.empty(shape.numel(), dtype=first.dtype)
        for part, tensors in parts:
            flat[part.start : part.stop] = tensors[entry].flatten()
        out[entry] = flat.view(shape)
    return out
