"""What ZeroDDP and FSDP share: optimizer state is sharded over ranks, and whole in checkpoints."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from chattrain.parallel.ranks import Ranks
from chattrain.parallel.strategy import ParallelStrategy


class OwnedSlice(NamedTuple):
    """A range of a parameter's flattened elements, and the rank (of a shard group) that steps it."""

    rank: int
    start: int
    stop: int


class ShardedStrategy(ParallelStrategy):
    """Each rank steps slices of parameters. A checkpoint holds whole ones, so any number of ranks can resume from it."""

    def __init__(self, ranks: Ranks, dtype: torch.dtype):
        super().__init__(dtype)
        self.ranks = ranks
        self.shapes: dict[str, torch.Size] = {}  # of whole parameters, by name

    @abstractmethod
    def owned_slices(self, name: str) -> list[OwnedSlice]:
        """The slices of a parameter with their owners; together they cover each element once."""

    @property
    def shard_rank(self) -> int:
        """The rank whose slices this process steps."""
        return self.ranks.rank

    def slice_shape(self, name: str, part: OwnedSlice) -> torch.Size:
        """Shape of the slice in the optimizer."""
        whole = self.shapes[name]
        if part.stop - part.start == whole.numel():
            return whole
        return torch.Size([part.stop - part.start])

    def consolidate_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        own: dict[str, dict[str, Tensor]] = {name: {} for name in self.shapes}
        for key, value in state.items():
            name, _, entry = key.rpartition("/")
            own[name][entry] = value
        whole: dict[str, Tensor] = {}
        for name, shape in self.shapes.items():
            parts = [(part, self.ranks.send_to_rank0(part.rank, own[name])) for part in self.owned_slices(name)]
            received = [(part, tensors) for part, tensors in parts if tensors is not None]
            if self.ranks.is_main:
                whole |= {f"{name}/{entry}": value for entry, value in _join_slices(received, shape).items()}
        return whole

    def shard_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        names = {key.rpartition("/")[0] for key in state}
        if names != set(self.shapes):
            raise ValueError("the optimizer state is of other parameters")
        mine = {name: part for name in self.shapes for part in self.owned_slices(name) if part.rank == self.shard_rank}
        out = {}
        for key, value in state.items():
            name = key.rpartition("/")[0]
            if name not in mine:
                continue
            part = mine[name]
            is_number = value.ndim == 0  # a step count
            out[key] = value if is_number else value.flatten()[part.start : part.stop].view(self.slice_shape(name, part))
        return out


def _join_slices(parts: list[tuple[OwnedSlice, dict[str, Tensor]]], shape: torch.Size) -> dict[str, Tensor]:
    """Each entry of a parameter's state, whole. Numbers (step counts) are the same in all slices."""
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
