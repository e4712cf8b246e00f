"""What every collator yields and the loop takes.

B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from chattrain.data.packing import cu_seqlens_of, pad_rows, positions_of


class Batch(NamedTuple):
    """One micro-batch. inputs and targets are (B, T) int64, already shifted; IGNORE_INDEX where there is no target."""

    inputs: torch.Tensor
    targets: torch.Tensor
    num_tokens: int  # inputs that are no padding
    num_supervised: int  # targets that are not ignored
    positions: torch.Tensor | None = None  # (B, T) int64, from 0 in each document, where documents are isolated
    cu_seqlens: torch.Tensor | None = None  # (documents + 1,) int32, where each begins in the flattened batch; see packing
    target_indices: torch.Tensor | None = None  # (N,) int64, indices of targets in the flattened batch; None: all of it

    @property
    def arguments(self) -> tuple[torch.Tensor, ...]:
        """What the model is called with for the losses of single targets."""
        return (self.inputs, self.targets, *([] if self.positions is None else [self.positions]))

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """The batch with every tensor changed."""
        tensors = {name: value for name, value in self._asdict().items() if isinstance(value, torch.Tensor)}
        return self._replace(**{name: change(tensor) for name, tensor in tensors.items()})

    def to(self, device: torch.device) -> Batch:
        pinned = device.type == "cuda"  # elsewhere an asynchronous copy may read memory that is gone
        return self.each(lambda tensor: tensor.to(device, non_blocking=pinned))


def as_batch(pairs: list[tuple[np.ndarray, np.ndarray]], width: int, pad_id: int, sizes: list[list[int]] | None = None) -> Batch:
    """The (inputs, targets) of each row, padded to the width. `sizes`: of each row's documents, where they are isolated."""
    inputs, targets = pad_rows(pairs, width, pad_id)
    positions = None if sizes is None else np.stack([positions_of(row, width) for row in sizes])
    indices = np.flatnonzero(targets >= 0)
    return Batch(
        torch.from_numpy(inputs),
        torch.from_numpy(targets),
        num_tokens=sum(len(x) for x, _ in pairs),
        num_supervised=len(indices),
        positions=None if positions is None else torch.from_numpy(positions),
        cu_seqlens=None if positions is None else torch.from_numpy(cu_seqlens_of(positions)),
        target_indices=torch.from_numpy(indices) if len(indices) < targets.size else None,
    )
