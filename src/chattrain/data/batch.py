"""The micro-batch that every collator returns and the training loop consumes.

B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from chattrain.data.packing import Tokens, cu_seqlens_of, pad_rows, positions_of


class Batch(NamedTuple):
    """One micro-batch. inputs and targets are (B, T) int64, already shifted. Targets of weight 0 are IGNORE_INDEX."""

    inputs: torch.Tensor
    targets: torch.Tensor
    num_tokens: int  # inputs other than padding
    num_supervised: int  # targets of weight 1
    # With isolated documents only: positions (B, T) int64 count from 0 in each document, cu_seqlens (documents + 1,) int32 are
    # the documents' starts in the flattened batch (packing.cu_seqlens_of).
    positions: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    # (N,) int64: the targets other than IGNORE_INDEX, in the flattened batch; None: all are
    target_indices: torch.Tensor | None = None
    weights: torch.Tensor | None = None  # (B, T) fp32: how much each target's loss counts; None: 1, and 0 where ignored
    sum_of_weights: float | None = None  # None: num_supervised
    sources: torch.Tensor | None = None  # (B, T) int16: index of each target's source in the mixture; None: not known

    @property
    def loss_weight(self) -> float:
        """The sum of the targets' weights."""
        return float(self.num_supervised) if self.sum_of_weights is None else self.sum_of_weights

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


def as_batch(rows: list[Tokens], width: int, pad_id: int, sizes: list[list[int]] | None = None) -> Batch:
    """The Batch of rows, padded to `width`. `sizes`: with isolated documents, the tokens of each document in each row; None:
    documents are not isolated."""
    inputs, targets, weights, sources = pad_rows(rows, width, pad_id)
    positions = None if sizes is None else np.stack([positions_of(row_sizes, width) for row_sizes in sizes])
    indices = np.flatnonzero(targets >= 0)
    num_supervised = int((weights == 1).sum())
    weighed = num_supervised < len(indices)
    return Batch(
        torch.from_numpy(inputs),
        torch.from_numpy(targets),
        num_tokens=sum(len(row.inputs) for row in rows),
        num_supervised=num_supervised,
        positions=None if positions is None else torch.from_numpy(positions),
        cu_seqlens=None if positions is None else torch.from_numpy(cu_seqlens_of(positions)),
        target_indices=torch.from_numpy(indices) if len(indices) < targets.size else None,
        weights=torch.from_numpy(weights) if weighed else None,
        sum_of_weights=float(weights.sum(dtype=np.float64)) if weighed else None,
        sources=torch.from_numpy(sources),
    )
