"""Sharded weights, for models that do not fit: FSDP2 (https://arxiv.org/abs/2304.11277), a block at a time.

Every rank holds, and steps, some rows of every parameter. A block's weights are gathered before its forward and its backward
and freed after; its gradients are summed in fp32 into the rows' holders, in every micro-batch: kept whole until the last one,
they would not fit where the weights do not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from chattrain.optim.groups import Groups
from chattrain.optim.named import NamedOptimizer
from chattrain.parallel.muon_exchange import MuonExchange, row_bounds
from chattrain.parallel.ranks import Ranks
from chattrain.parallel.sharded import OwnedSlice, ShardedStrategy

OTHER_FORWARDS = ("loss", "choice_logits", "seen", "at")  # methods of models and blocks that read weights, besides `forward`


class FSDP(ShardedStrategy):
    """Shards the model, which is on the CPU or already where it is trained; its shards are on `device`."""

    def __init__(self, model: nn.Module, ranks: Ranks, dtype: torch.dtype, device: torch.device):
        super().__init__(ranks, dtype)
        self.model = model
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        mesh = ranks.mesh(device.type)
        bf16 = dtype == torch.bfloat16
        policy = MixedPrecisionPolicy(param_dtype=dtype if bf16 else None, reduce_dtype=torch.float32 if bf16 else None)
        for part in [*model.blocks, model]:
            fully_shard(part, mesh=mesh, mp_policy=policy)
            part.set_gradient_divide_factor(1.0)  # the loss is divided by its targets over all ranks already
            part.set_force_sum_reduction_for_comms(True)
            for name in OTHER_FORWARDS:
                if hasattr(part, name):
                    register_fsdp_forward_method(part, name)

    def partition_params(self, groups: Groups, whole: tuple[str, ...] = ()) -> Groups:
        """This rank's rows of all parameters: Muon's matrices come together in its orthogonalizer."""
        sharded = dict(self.model.named_parameters())
        self.rows = {name: nn.Parameter(p.to_local().detach()) for name, p in sharded.items()}
        self.matrices = {self.rows[name]: self.shapes[name] for group in whole for name, _ in groups[group]}
        return {group: [(name, self.rows[name]) for name, _ in members] for group, members in groups.items()}

    def orthogonalizer(self) -> MuonExchange:
        return MuonExchange(self.dtype, self.ranks, self.matrices, self.muon_settings)

    def owned_slices(self, name: str) -> list[OwnedSlice]:
        rows, *rest = self.shapes[name]
        size = torch.Size(rest).numel()
        return [
            OwnedSlice(r, start * size, stop * size) for r, (start, stop) in enumerate(row_bounds(rows, self.ranks.world_size))
        ]

    def slice_shape(self, name: str, part: OwnedSlice) -> torch.Size:
        rows, *rest = self.shapes[name]
        return torch.Size([(part.stop - part.start) * rows // self.shapes[name].numel(), *rest])

    def reduce_gradients(self, optimizer: NamedOptimizer) -> Tensor:
        for name, p in self.model.named_parameters():
            row = self.rows[name]
            row.grad = torch.zeros_like(row) if p.grad is None else p.grad.to_local()
            p.grad = None
        norm = nn.utils.get_total_norm([row.grad for row in self.rows.values()])
        return self.ranks.in_groups(self.ranks.world_size).norm(norm)

    def full_weights(self, model: nn.Module) -> dict[str, Tensor]:
        whole = {}
        for name, tensor in model.weights().items():
            value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            whole[name] = value.detach().cpu() if self.ranks.is_main else value.new_empty(0)
        return whole
