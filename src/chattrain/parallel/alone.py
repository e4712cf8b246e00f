"""One process: it holds, and steps, all. Also what the strategies of several processes offer the loop and the optimizers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from chattrain.optim.named import NamedOptimizer
from chattrain.optim.newton_schulz import Orthogonalizer

Groups = dict[str, list[tuple[str, nn.Parameter]]]  # group -> (name, parameter) pairs


class Alone:
    """`dtype`: the number format of the run's matrix products."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16):
        self.dtype = dtype

    # What optimizers ask for.

    def share(self, groups: Groups, whole: tuple[str, ...] = ()) -> Groups:
        """What of the model's parameters this process steps, under the same names; groups in `whole` are not cut in pieces
        that could not be stepped alone. Called once."""
        return groups

    def orthogonalizer(self) -> Orthogonalizer:
        return Orthogonalizer(self.dtype)

    # What the loop asks for, in this order in every step.

    def before_backward(self, last: bool) -> None:
        """A micro-batch comes; `last`: gradients are complete after it."""

    def reduce(self, optimizer: NamedOptimizer) -> Tensor:
        """Give the optimizer's parameters their gradients, summed over ranks; returns the norm of all, on the device."""
        for p in optimizer.parameters():
            if p.grad is None:  # the loss does not reach it
                p.grad = torch.zeros_like(p)
        return nn.utils.get_total_norm([p.grad for p in optimizer.parameters()])

    def step(self, optimizer: NamedOptimizer) -> None:
        """Step, and drop the gradients. Weights that come from other ranks may still be on their way."""
        optimizer.step()
        optimizer.zero_grad()

    def settle(self) -> None:
        """Wait until the weights are there: before anything but a training step reads them."""

    # What checkpoints ask for, on every rank.

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """All that a checkpoint holds of the model; only rank 0 gets it whole."""
        return model.weights()

    def gather(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """An optimizer's state by `<parameter>/<entry>`, of this rank's pieces, as one of whole parameters on rank 0."""
        return state

    def pieces(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The reverse: what of a checkpoint's optimizer state is this rank's. Raises ValueError for other parameters."""
        return state
