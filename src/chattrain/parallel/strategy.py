"""How the work of a step is spread over processes: one process, replicated weights (ZeroDDP) or sharded weights (FSDP).

The timeline of an optimizer step, with the calls that `loop.train_step` makes:

    call                         SingleProcess       ZeroDDP                               FSDP
    ---------------------------  ------------------  ------------------------------------  ------------------------------------
    for each micro-batch:
      set_requires_gradient_sync nothing             note whether it is the last           nothing
      forward                    compute             hooks wait for the weights of the     all-gather a block's weights before
                                                     step before, a block at a time        the block, free them after it
      backward, not the last     add to p.grad       add to p.grad                         as the last
      backward, the last         add to p.grad       as soon as the gradients of a bucket  all-gather a block's weights again,
                                                     are complete: start its               reduce-scatter its gradients into the
                                                     reduce-scatter                        ranks' rows
    reduce_gradients             zero gradients for  start the remaining reduce-scatters,  take the gradients of this rank's
                                 unused parameters   wait for all of them                  rows
      returns the gradient norm  of all gradients    of the shards: all-reduce             of the rows: all-reduce
    group_norms (logged steps)   of each group       as above                              as above
    (the loop clips gradients)
    step                         optimizer.step      bucket by bucket, in the order of     optimizer.step on this rank's rows;
                                                     forward: step the own shard, start    Muon's matrices come together on
                                                     the all-gather of the new weights     their owners (muon_exchange.py)
    the next forward             compute             hooks wait for those all-gathers      all-gather, as above

wait_for_weights is for everything but forward that reads weights: evaluations and checkpoints. whole_weights is for replies, of
which each rank writes its own: FSDP gathers all weights once, instead of a block before each pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from chattrain.optim.groups import Groups
from chattrain.optim.named import NamedOptimizer
from chattrain.optim.newton_schulz import MuonSettings, Orthogonalizer
from chattrain.optim.trainable import TrainableModel


class ParallelStrategy(ABC):
    """`dtype`: number format of the run's matrix products."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16):
        self.dtype = dtype
        self.muon_settings: MuonSettings | None = None  # None: the defaults of the device

    # Called by optimizers.

    @abstractmethod
    def partition_params(self, groups: Groups, whole: tuple[str, ...] = ()) -> Groups:
        """The parameters, or slices of parameters, that this process steps, under the names of the parameters.

        Parameters of the groups in `whole` need all their elements for a step: a strategy that slices them must bring them
        together in its orthogonalizer. Called once.
        """

    def orthogonalizer(self) -> Orthogonalizer:
        """Computes Muon's directions for the parameters that this process steps."""
        return Orthogonalizer(self.dtype, self.muon_settings)

    # Called by the loop.

    def set_requires_gradient_sync(self, last: bool) -> None:  # noqa: B027
        """Called before forward and backward of each micro-batch. `last`: gradients are complete after it."""

    @abstractmethod
    def reduce_gradients(self, optimizer: NamedOptimizer) -> Tensor:
        """Set the .grad of the optimizer's parameters to gradients summed over ranks.

        Returns the norm of all gradients of the model, a scalar on the device, the same on every rank.
        """

    def group_norms(self, optimizer: NamedOptimizer, total: Tensor) -> Tensor:
        """The norm of the gradients of each of the optimizer's groups, (groups,) on the device, the same on every rank.

        Called after reduce_gradients, whose result is `total`, before gradients are clipped.
        """
        norms = []
        for group in optimizer.param_groups:
            grads = [p.grad for p in group["params"] if p.grad is not None]
            norms.append(nn.utils.get_total_norm(grads) if grads else torch.zeros_like(total))
        return self.reduce_norms(torch.stack(norms))

    def reduce_norms(self, norms: Tensor) -> Tensor:
        """Norms over all ranks, from those of the gradients that this process holds."""
        return norms

    def step(self, optimizer: NamedOptimizer) -> None:
        """Step the optimizer and free the gradients."""
        optimizer.step()
        optimizer.zero_grad()

    def wait_for_weights(self) -> None:  # noqa: B027
        """Wait until the weights that other ranks stepped have arrived."""

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Within, this process holds all weights, so that it may run passes that other ranks do not run."""
        self.wait_for_weights()
        yield

    # Called when checkpoints are saved and loaded, on every rank.

    @abstractmethod
    def full_weights(self, model: TrainableModel) -> dict[str, Tensor]:
        """All tensors of the model that a checkpoint holds. They are complete on rank 0 only."""

    @abstractmethod
    def consolidate_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Optimizer state of whole parameters on rank 0, from the state of every rank's slices.

        Keys are `<parameter>/<entry>`, such as `lm_head.weight/exp_avg`.
        """

    @abstractmethod
    def shard_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The reverse: the state of this rank's slices, from a checkpoint's. Raises ValueError for other parameters."""


class SingleProcess(ParallelStrategy):
    """One process holds and steps all parameters."""

    def partition_params(self, groups: Groups, whole: tuple[str, ...] = ()) -> Groups:
        return groups

    def reduce_gradients(self, optimizer: NamedOptimizer) -> Tensor:
        grads = []
        for p in optimizer.parameters():
            if p.grad is None:  # the loss does not depend on it
                p.grad = torch.zeros_like(p)
            grads.append(p.grad)
        return nn.utils.get_total_norm(grads)

    def full_weights(self, model: TrainableModel) -> dict[str, Tensor]:
        return model.weights()

    def consolidate_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state

    def shard_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state
