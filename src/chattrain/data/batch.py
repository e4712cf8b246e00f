"""The micro-batch that every collator returns and the training loop consumes.

B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from chattrain.data.packing import cu_seqlens_of, pad_rows, positions_of


class Batch(NamedTuple):
    """One micro-batch. inputs and targets are (B, T) int64, already shifted. Targets without loss are IGNORE_INDEX."""

    inputs: torch.Tensor
    targets: torch.Tensor
    num_tokens: int  # inputs other than padding
    num_supervised: int  # targets other than IGNORE_INDEX
    # With isolated documents only: positions (B, T) int64 count from 0 in each document, cu_seqlens (documents + 1,) int32 are
    # the documents' starts in the flattened batch (packing.cu_seqlens_of).
    positions: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    target_indices: torch.Tensor | None = None  # (num_supervised,) int64, in the flattened batch; None: every target has loss

    @property
    def arguments(self) -> tuple[torch.Tensor, ...]:
        """Arguments of the model's forward, which returns the loss of each target."""
        return (self.inputs, self.targets, *([] if self.positions is None else [self.positions]))

    def map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """The batch with the function applied to every tensor."""
        tensors = {name: value for name, value in self._asdict().items() if isinstance(value, torch.Tensor)}
        return self._replace(**{name: function(tensor) for name, tensor in tensors.items()})

    def to(self, device: torch.device) -> Batch:
        """The batch on the device. On CUDA the copy is asynchronous if the batch is in pinned memory."""
        non_blocking = device.type == "cuda"  # on other devices, the source may be freed before the copy has read it
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))


def as_batch(pairs: list[tuple[np.ndarray, np.ndarray]], width: int, pad_id: int, sizes: list[list[int]] | None = None) -> Batch:
    """The Batch of rows given as (inputs, targets), padded to `width`. `sizes`: with isolated documents, the tokens of each
    document in each row; None: documents are not isolated."""
    inputs, targets = pad_rows(pairs, width, pad_id)
    positions = None if sizes is None else np.stack([positions_of(row_sizes, width) for row_sizes in sizes])
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
