"""Sharded weights, for models that do not fit into a device's memory: PyTorch's FSDP2
(https://arxiv.org/abs/2304.11277), a block at a time.

Every rank holds and steps some rows of every parameter. A block's weights are gathered before its forward and its backward,
and freed after. Its gradients are summed into the ranks' rows after every micro-batch's backward: whole gradients, kept until
the last micro-batch, would not fit where whole weights do not. The timeline is in strategy.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from chattrain import torch_compat
from chattrain.optim.groups import Groups
from chattrain.optim.named import NamedOptimizer
from chattrain.optim.trainable import TrainableModel
from chattrain.parallel.muon_exchange import MuonExchange, row_bounds
from chattrain.parallel.ranks import Ranks
from chattrain.parallel.sharded import OwnedSlice, ShardedStrategy


class FSDP(ShardedStrategy):
    """Shards the model, which may be on the CPU, onto `device`.

    FSDP2 gathers weights around `forward` alone, so a model names its other methods that read weights: `forward_methods` of
    its own, `block_forward_methods` of its blocks. Raises ValueError for a name without a method.
    """

    def __init__(self, model: TrainableModel, ranks: Ranks, dtype: torch.dtype, device: torch.device):
        super().__init__(ranks, dtype)
        self.model = model
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        mesh = ranks.mesh(device.type)
        bf16 = dtype == torch.bfloat16
        policy = MixedPrecisionPolicy(param_dtype=dtype if bf16 else None, reduce_dtype=torch.float32 if bf16 else None)

        def shard(module: nn.Module, forward_methods: tuple[str, ...]) -> None:
            sharded = fully_shard(module, mesh=mesh, mp_policy=policy)
            sharded.set_gradient_divide_factor(1.0)  # the loss is already divided by the supervised tokens of all ranks
            sharded.set_force_sum_reduction_for_comms(True)
            for name in forward_methods:
                register_fsdp_forward_method(module, name)

        for block in model.blocks:
            shard(block, model.block_forward_methods)
        shard(model, model.forward_methods)  # pyright: ignore[reportArgumentType]

    def partition_params(self, groups: Groups, whole: tuple[str, ...] = ()) -> Groups:
        """This rank's rows of all parameters. Those in `whole` come together in the orthogonalizer."""
        self.rows = {name: nn.Parameter(_local(p).detach()) for name, p in self.model.named_parameters()}
        self.matrices: dict[Tensor, torch.Size] = {
            self.rows[name]: self.shapes[name] for group in whole for name, _ in groups[group]
        }
        return {group: [(name, self.rows[name]) for name, _ in members] for group, members in groups.items()}

    def orthogonalizer(self) -> MuonExchange:
        return MuonExchange(self.dtype, self.ranks, self.matrices, self.muon_settings)

    def owned_slices(self, name: str) -> list[OwnedSlice]:
        rows, *rest = self.shapes[name]
        row_numel = torch.Size(rest).numel()
        bounds = row_bounds(rows, self.ranks.world_size)
        return [OwnedSlice(rank, start * row_numel, stop * row_numel) for rank, (start, stop) in enumerate(bounds)]

    def slice_shape(self, name: str, part: OwnedSlice) -> torch.Size:
        rows, *rest = self.shapes[name]
        return torch.Size([(part.stop - part.start) * rows // self.shapes[name].numel(), *rest])

    def reduce_gradients(self, optimizer: NamedOptimizer) -> Tensor:
        grads = []
        for name, p in self.model.named_parameters():
            rows = self.rows[name]
            rows.grad = torch.zeros_like(rows) if p.grad is None else _local(p.grad)
            grads.append(rows.grad)
            p.grad = None
        return self.reduce_norms(nn.utils.get_total_norm(grads))

    def reduce_norms(self, norms: Tensor) -> Tensor:
        return self.ranks.in_groups(self.ranks.world_size).norm(norms)

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """It takes the memory of all weights, in the dtype of the run.

        The hooks of the model's own methods are off within: one that calls another, as `losses` calls `features`, gathers and
        drops weights whatever it is told, and the other ranks would have to join in.
        """
        parts = [part for part in (self.model, *self.model.blocks) if isinstance(part, FSDPModule)]
        torch_compat.make_fsdp_root(parts[0])  # else the first part to run, a block, would be taken for the whole model
        for part in parts:
            part.unshard()
            part.set_reshard_after_forward(False, recurse=False)
        hooked = {name: vars(self.model).pop(name) for name in self.model.forward_methods}
        try:
            yield
        finally:
            vars(self.model).update(hooked)
            for part in parts:
                part.set_reshard_after_forward(part is not self.model, recurse=False)
                part.reshard()

    def full_weights(self, model: TrainableModel) -> dict[str, Tensor]:
        whole = {}
        for name, tensor in model.weights().items():
            value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            whole[name] = value.detach().cpu() if self.ranks.is_main else value.new_empty(0)
        return whole


def _local(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local()
