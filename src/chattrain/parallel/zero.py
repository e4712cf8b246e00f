"""Replicated weights; gradients, optimizer state and the step itself are sharded over ranks (ZeRO-2,
https://arxiv.org/abs/1910.02054).

While the last micro-batch's backward still runs, each bucket of complete gradients is summed into the shards of the ranks that
step them (reduce-scatter). Each rank steps its shards and sends the new weights to all ranks (all-gather), the bucket that the
next forward needs first before the others. The timeline is in strategy.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from chattrain.optim.groups import Groups
from chattrain.optim.named import NamedOptimizer
from chattrain.optim.newton_schulz import cost
from chattrain.optim.trainable import TrainableModel
from chattrain.parallel import layout
from chattrain.parallel.layout import BucketLayout, Item, ParamSlice
from chattrain.parallel.ranks import Ranks
from chattrain.parallel.sharded import OwnedSlice, ShardedStrategy

MAX_IN_FLIGHT = 2  # buckets of gradients: the network starts on the second as soon as it is done with the first


class GradientBucket:
    """Parameters whose gradients are reduce-scattered together, and whose weights are all-gathered together."""

    def __init__(self, layout: BucketLayout, params: dict[str, nn.Parameter]):
        self.layout = layout
        self.params = {piece.name: params[piece.name] for shard in layout.shards for piece in shard}
        self.incomplete = len(self.params)  # parameters whose gradients backward has not completed yet
        self.grad_shard: Tensor | None = None  # (layout.size,) summed gradients of this rank's shard
        self.gathered: Tensor | None = None  # (ranks, layout.size) weights, while their all-gather is pending
        self.wait: Callable[[], object] | None = None  # for the pending collective

    def finish_collective(self) -> None:
        """Wait for the pending collective, if there is one, and drop it: it holds references to its tensors."""
        if self.wait is not None:
            self.wait()
            self.wait = None

    def flatten_gradients(self) -> Tensor:
        """The gradients of all ranks' shards, concatenated: (ranks x layout.size,). Frees the parameters' own gradients.

        A parameter without a gradient counts as one of gradient zero.
        """
        parts = []
        for shard in self.layout.shards:
            for name, start, stop in shard:
                grad = self.params[name].grad
                parts.append((torch.zeros_like(self.params[name]) if grad is None else grad).view(-1)[start:stop])
            parts.append(self._padding(shard))
        flat = torch.cat(parts)
        for p in self.params.values():
            p.grad = None
        return flat

    def gather_buffer(self, rank: int) -> Tensor:
        """A buffer for the weights of all ranks' shards, (ranks, layout.size), with row `rank` filled in."""
        buffer = next(iter(self.params.values())).new_empty(len(self.layout.shards), self.layout.size)
        shard = self.layout.shards[rank]
        torch.cat([*self._weights(shard), self._padding(shard)], out=buffer[rank])
        return buffer

    def copy_gathered(self, gathered: Tensor, rank: int) -> None:
        """Copy the gathered weights of all ranks but `rank`, which has stepped its own, into the parameters."""
        for other, (shard, new) in enumerate(zip(self.layout.shards, gathered, strict=True)):
            if other != rank and shard:
                sizes = [stop - start for _, start, stop in shard]
                torch._foreach_copy_(self._weights(shard), list(new[: sum(sizes)].split(sizes)))  # pyright: ignore[reportPrivateImportUsage]

    def _weights(self, shard: tuple[ParamSlice, ...]) -> list[Tensor]:
        return [self.params[name].detach().view(-1)[start:stop] for name, start, stop in shard]

    def _padding(self, shard: tuple[ParamSlice, ...]) -> Tensor:
        p = next(iter(self.params.values()))
        return p.new_zeros(self.layout.size - sum(stop - start for _, start, stop in shard))


class ZeroDDP(ShardedStrategy):
    """Overlaps communication with the backward and forward of `model.blocks`; without blocks, with backward alone."""

    def __init__(self, model: TrainableModel, ranks: Ranks, dtype: torch.dtype):
        super().__init__(ranks, dtype)
        self.model = model
        self.buckets: list[GradientBucket] = []  # in the order in which backward completes them
        self.is_last_micro_batch = False
        self.num_reducing = 0  # buckets of this step whose reduce-scatter has started

    def partition_params(self, groups: Groups, whole: tuple[str, ...] = ()) -> Groups:
        """Those in `whole` are not cut."""
        params = dict(self.model.named_parameters())
        group_of = {name: group for group, members in groups.items() for name, _ in members}
        items = [
            Item(name, p.numel(), cost(p.shape) if group_of[name] in whole else None) for name, p in reversed(params.items())
        ]
        self.group = self.ranks.in_groups(layout.shard_group_size(items, self.ranks.world_size))
        self.shapes = {name: p.shape for name, p in params.items()}
        self.buckets = [GradientBucket(planned, params) for planned in layout.plan_buckets(items, self.group.size)]
        self._owned_slices: dict[str, list[OwnedSlice]] = {name: [] for name in params}
        for bucket in self.buckets:
            for rank, shard in enumerate(bucket.layout.shards):
                for name, start, stop in shard:
                    self._owned_slices[name].append(OwnedSlice(rank, start, stop))
            for p in bucket.params.values():
                p.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self._on_gradient(bucket))
        self._register_forward_hooks()
        self.own_slices = {bucket: self._views_of_own_shard(bucket) for bucket in self.buckets}
        mine = [pair for pairs in self.own_slices.values() for pair in pairs]
        return {group: [(n, p) for n, p in mine if group_of[n] == group] for group in groups}

    def owned_slices(self, name: str) -> list[OwnedSlice]:
        return self._owned_slices[name]

    @property
    def shard_rank(self) -> int:
        return self.group.shard_rank

    def set_requires_gradient_sync(self, last: bool) -> None:
        self.is_last_micro_batch = last

    def reduce_gradients(self, optimizer: NamedOptimizer) -> Tensor:
        self.is_last_micro_batch = False
        while self.num_reducing < len(self.buckets):  # buckets with parameters that the loss does not depend on
            self._reduce_scatter_next()
        self.num_reducing = 0
        shards = []
        for bucket in self.buckets:
            bucket.finish_collective()
            bucket.incomplete = len(bucket.params)
            assert bucket.grad_shard is not None
            shards.append(bucket.grad_shard)
            sizes = [p.numel() for _, p in self.own_slices[bucket]]
            for (_, p), grad in zip(self.own_slices[bucket], bucket.grad_shard[: sum(sizes)].split(sizes), strict=True):
                p.grad = grad.view_as(p)
        return self.reduce_norms(nn.utils.get_total_norm(shards))

    def reduce_norms(self, norms: Tensor) -> Tensor:
        return self.group.norm(norms)

    def step(self, optimizer: NamedOptimizer) -> None:
        """Bucket by bucket: while the weights of one are sent to the other ranks, the next is stepped."""
        grads = {p: p.grad for p in optimizer.parameters()}
        optimizer.zero_grad()
        for bucket in reversed(self.buckets):  # the order of forward
            for _, p in self.own_slices[bucket]:
                p.grad = grads.pop(p)
            optimizer.step()  # skips parameters without a gradient
            optimizer.zero_grad()
            bucket.grad_shard = None
            bucket.gathered = bucket.gather_buffer(self.shard_rank)
            bucket.wait = self.group.all_gather(bucket.gathered)
        if not self.model.blocks:  # no hooks wait in forward
            self.wait_for_weights()

    def wait_for_weights(self) -> None:
        for bucket in self.buckets:
            self._receive_weights(bucket)

    def full_weights(self, model: TrainableModel) -> dict[str, Tensor]:
        self.wait_for_weights()
        return model.weights()

    def _views_of_own_shard(self, bucket: GradientBucket) -> list[tuple[str, nn.Parameter]]:
        """(name, view) of each slice that this rank steps."""
        out = []
        for name, start, stop in bucket.layout.shards[self.shard_rank]:
            view = bucket.params[name].detach().view(-1)[start:stop]
            out.append((name, nn.Parameter(view.view(self.slice_shape(name, OwnedSlice(self.shard_rank, start, stop))))))
        return out

    def _on_gradient(self, bucket: GradientBucket) -> None:
        """Backward has completed a gradient. Buckets are sent in their own order, which is the same on all ranks."""
        if not self.is_last_micro_batch:
            return
        bucket.incomplete -= 1
        while self.num_reducing < len(self.buckets) and not self.buckets[self.num_reducing].incomplete:
            self._reduce_scatter_next()

    def _reduce_scatter_next(self) -> None:
        """Start the next bucket's reduce-scatter, when fewer than MAX_IN_FLIGHT are pending.

        Were all of them pending at once, their buffers would take as much memory as the model's gradients.
        """
        for bucket in self.buckets[: max(0, self.num_reducing + 1 - MAX_IN_FLIGHT)]:
            bucket.finish_collective()
        bucket = self.buckets[self.num_reducing]
        bucket.grad_shard, bucket.wait = self.group.reduce_scatter(bucket.flatten_gradients())
        self.num_reducing += 1

    @torch.no_grad()
    def _receive_weights(self, bucket: GradientBucket) -> None:
        """Wait for the bucket's all-gather, if it is pending, and copy the weights into the parameters."""
        if bucket.gathered is not None:
            bucket.finish_collective()
            bucket.copy_gathered(bucket.gathered, self.shard_rank)
            bucket.gathered = None

    def _register_forward_hooks(self) -> None:
        """Embeddings wait for the weights outside blocks (except the head), each block for its own; the head waits for all."""
        model = self.model
        block_param_ids = {id(p) for block in model.blocks for p in block.parameters()}
        head = model.lm_head.get_parameter("weight")
        outside = {id(p) for p in model.parameters()} - block_param_ids - {id(head)}
        for module in (m for m in model.modules() if isinstance(m, nn.Embedding)):
            self._wait_before(module, outside | {id(module.weight)})
        for block in model.blocks:
            self._wait_before(block, {id(p) for p in block.parameters()})
        if model.blocks:
            model.blocks[-1].register_forward_hook(lambda *_: self.wait_for_weights())

    def _wait_before(self, module: nn.Module, param_ids: set[int]) -> None:
        """Before the module's forward, wait for the buckets that hold these parameters."""
        buckets = [bucket for bucket in self.buckets if param_ids & {id(p) for p in bucket.params.values()}]

        def wait(*_) -> None:
            for bucket in buckets:
                self._receive_weights(bucket)

        module.register_forward_pre_hook(wait)
