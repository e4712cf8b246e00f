"""How the work of a step is spread over processes.

A step asks its strategy for these, in this order: set_requires_gradient_sync before each backward; reduce_gradients after the
last one; step. Weights that come from other ranks may then still be on their way: the next forward waits for them, and
wait_for_weights is for anything else that reads them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from chattrain.optim.groups import Groups
from chattrain.optim.named import NamedOptimizer
from chattrain.optim.newton_schulz import MuonSettings, Orthogonalizer


class ParallelStrategy(ABC):
    """`dtype`: the number format of the run's matrix products."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16):
        self.dtype = dtype
        self.muon_settings: MuonSettings | None = None  # None: those of the device

    # What optimizers ask for.

    @abstractmethod
    def partition_params(self, groups: Groups, whole: tuple[str, ...] = ()) -> Groups:
        """The part of the model's parameters that this process steps, under the same names. Parameters of the groups in
        `whole` are not cut into slices that could not be stepped alone. Called once."""

    def orthogonalizer(self) -> Orthogonalizer:
        """Muon's directions for the parameters that this process steps."""
        return Orthogonalizer(self.dtype, self.muon_settings)

    # What the loop asks for.

    def set_requires_gradient_sync(self, last: bool) -> None:  # noqa: B027
        """Called before the backward of each micro-batch; `last`: gradients are complete after it."""

    @abstractmethod
    def reduce_gradients(self, optimizer: NamedOptimizer) -> Tensor:
        """Give the optimizer's parameters their gradients, summed over ranks; returns the norm of all, on the device."""

    def step(self, optimizer: NamedOptimizer) -> None:
        """Step, and drop the gradients."""
        optimizer.step()
        optimizer.zero_grad()

    def wait_for_weights(self) -> None:  # noqa: B027
        """Wait until the weights of the last step have arrived from other ranks."""

    # What checkpoints ask for, on every rank.

    @abstractmethod
    def full_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """All that a checkpoint holds of the model; only rank 0 gets it whole."""

    @abstractmethod
    def consolidate_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """An optimizer's state by `<parameter>/<entry>`, of this rank's slices, as one of whole parameters on rank 0."""

    @abstractmethod
    def shard_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The reverse: this rank's slices of a checkpoint's optimizer state. Raises ValueError for other parameters."""


class SingleProcess(ParallelStrategy):
    """One process holds, and steps, all."""

    def partition_params(self, groups: Groups, whole: tuple[str, ...] = ()) -> Groups:
        return groups

    def reduce_gradients(self, optimizer: NamedOptimizer) -> Tensor:
        for p in optimizer.parameters():
            if p.grad is None:  # the loss does not reach it
                p.grad = torch.zeros_like(p)
        return nn.utils.get_total_norm([p.grad for p in optimizer.parameters()])

    def full_weights(self, model: nn.Module) -> dict[str, Tensor]:
        return model.weights()

    def consolidate_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state

    def shard_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state
