"""Replicated weights; gradients, optimizer state and the step itself are spread over ranks (ZeRO-2,
https://arxiv.org/abs/1910.02054).

While the last micro-batch's backward still runs, buckets of gradients that are ready are summed into the shares of the ranks
that step them. Each rank steps its share, and the new weights go to all: first those that forward needs first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from chattrain.optim.groups import Groups
from chattrain.optim.named import NamedOptimizer
from chattrain.optim.newton_schulz import cost
from chattrain.parallel import layout
from chattrain.parallel.layout import Item
from chattrain.parallel.ranks import Ranks
from chattrain.parallel.sharded import OwnedSlice, ShardedStrategy

SUMMED_AT_ONCE = 2  # buckets of gradients on their way: the network goes on with the second when the first has arrived


class Bucket:
    """Parameters whose gradients and weights travel together."""

    def __init__(self, plan: layout.Bucket, params: dict[str, nn.Parameter]):
        self.plan = plan
        self.params = {piece.name: params[piece.name] for share in plan.shards for piece in share}
        self.missing = len(self.params)  # gradients that backward has not given yet
        self.grad_shard: Tensor | None = None  # of summed gradients
        self.wait = None  # for the collective that is on its way
        self.gathered: Tensor | None = None  # weights of all ranks, on their way

    def arrive(self) -> None:
        """Wait for what is on its way, if it is, and forget the collective: while it is known, it holds the tensors it moved."""
        if self.wait is not None:
            self.wait()
            self.wait = None

    def gradients(self) -> Tensor:
        """All ranks' shares one after another. The parameters' own gradients are dropped; one that backward has not reached
        counts as zero."""
        parts = []
        for share in self.plan.shards:
            for name, start, stop in share:
                grad = self.params[name].grad
                parts.append((torch.zeros_like(self.params[name]) if grad is None else grad).view(-1)[start:stop])
            parts.append(self._room(share))
        flat = torch.cat(parts)
        for p in self.params.values():
            p.grad = None
        return flat

    def weights(self, place: int) -> Tensor:
        """Room for those of all places, with this place's in it."""
        p = next(iter(self.params.values()))
        room = p.new_empty(len(self.plan.shards), self.plan.size)
        share = self.plan.shards[place]
        torch.cat([self.params[n].detach().view(-1)[a:b] for n, a, b in share] + [self._room(share)], out=room[place])
        return room

    def take_weights(self, place: int) -> None:
        """Those of the other places, which have come."""
        for other, (share, new) in enumerate(zip(self.plan.shards, self.gathered, strict=True)):
            if other != place and share:
                sizes = [b - a for _, a, b in share]
                old = [self.params[n].detach().view(-1)[a:b] for n, a, b in share]
                torch._foreach_copy_(old, list(new[: sum(sizes)].split(sizes)))

    def _room(self, share: tuple[layout.ParamSlice, ...]) -> Tensor:
        p = next(iter(self.params.values()))
        return p.new_zeros(self.plan.size - sum(b - a for _, a, b in share))


class ZeroDDP(ShardedStrategy):
    """See the module. `model.blocks`, where it has any, are what forward runs through one after another."""

    def __init__(self, model: nn.Module, ranks: Ranks, dtype: torch.dtype):
        super().__init__(ranks, dtype)
        self.model = model
        self.buckets: list[Bucket] = []  # in the order of backward
        self.last, self.launched = False, 0

    def partition_params(self, groups: Groups, whole: tuple[str, ...] = ()) -> Groups:
        params = dict(self.model.named_parameters())
        group_of = {name: group for group, members in groups.items() for name, _ in members}
        items = [
            Item(name, p.numel(), cost(p.shape) if group_of[name] in whole else None) for name, p in reversed(params.items())
        ]
        self.group = self.ranks.in_groups(layout.ranks_that_share(items, self.ranks.world_size))
        self.shapes = {name: p.shape for name, p in params.items()}
        self.buckets = [Bucket(plan, params) for plan in layout.buckets(items, self.group.size)]
        self._owned_slices = {name: [] for name in params}
        for bucket in self.buckets:
            for place, share in enumerate(bucket.plan.shards):
                for name, start, stop in share:
                    self._owned_slices[name].append(OwnedSlice(place, start, stop))
            for p in bucket.params.values():
                p.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self._one_more(bucket))
        self._hook_forward()
        self.pieces_of = {bucket: self._pieces(bucket) for bucket in self.buckets}  # (name, parameter) this rank steps
        mine = [pair for pairs in self.pieces_of.values() for pair in pairs]
        return {group: [(n, p) for n, p in mine if group_of[n] == group] for group in groups}

    def owned_slices(self, name: str) -> list[OwnedSlice]:
        return self._owned_slices[name]

    @property
    def shard_rank(self) -> int:
        return self.group.shard_rank

    def set_requires_gradient_sync(self, last: bool) -> None:
        self.last = last

    def reduce_gradients(self, optimizer: NamedOptimizer) -> Tensor:
        self.last = False
        while self.launched < len(self.buckets):  # parameters that this model's loss does not reach
            self._launch_next()
        self.launched = 0
        for bucket in self.buckets:
            bucket.arrive()
            bucket.missing = len(bucket.params)
            sizes = [p.numel() for _, p in self.pieces_of[bucket]]
            for (_, p), grad in zip(self.pieces_of[bucket], bucket.grad_shard[: sum(sizes)].split(sizes), strict=True):
                p.grad = grad.view_as(p)
        return self.group.norm(nn.utils.get_total_norm([bucket.grad_shard for bucket in self.buckets]))

    def step(self, optimizer: NamedOptimizer) -> None:
        """Bucket by bucket: while the weights of one are on their way to the others, the next is stepped."""
        grads = {p: p.grad for p in optimizer.parameters()}
        optimizer.zero_grad()
        for bucket in reversed(self.buckets):
            for _, p in self.pieces_of[bucket]:
                p.grad = grads.pop(p)
            optimizer.step()
            optimizer.zero_grad()
            bucket.grad_shard = None
            bucket.gathered = bucket.weights(self.shard_rank)
            bucket.wait = self.group.all_gather(bucket.gathered)
        if not self.model.blocks:  # nothing tells when which weights are needed
            self.wait_for_weights()

    def wait_for_weights(self) -> None:
        for bucket in self.buckets:
            self._take_weights(bucket)

    def full_weights(self, model: nn.Module) -> dict[str, Tensor]:
        self.wait_for_weights()
        return model.weights()

    def _pieces(self, bucket: Bucket) -> list[tuple[str, nn.Parameter]]:
        """Views of the weights that this rank steps."""
        out = []
        for name, start, stop in bucket.plan.shards[self.shard_rank]:
            view = bucket.params[name].detach().view(-1)[start:stop]
            out.append((name, nn.Parameter(view.view(self.slice_shape(name, OwnedSlice(self.shard_rank, start, stop))))))
        return out

    def _one_more(self, bucket: Bucket) -> None:
        """A gradient is complete; what can go, goes, in the same order on all ranks."""
        if not self.last:
            return
        bucket.missing -= 1
        while self.launched < len(self.buckets) and not self.buckets[self.launched].missing:
            self._launch_next()

    def _launch_next(self) -> None:
        """Sum a bucket's gradients into their shares, once fewer than SUMMED_AT_ONCE others are on their way: all of them at
        once would be another model in memory."""
        for bucket in self.buckets[: max(0, self.launched + 1 - SUMMED_AT_ONCE)]:
            bucket.arrive()
        bucket = self.buckets[self.launched]
        bucket.grad_shard, bucket.wait = self.group.reduce_scatter(bucket.gradients())
        self.launched += 1

    @torch.no_grad()
    def _take_weights(self, bucket: Bucket) -> None:
        if bucket.gathered is not None:
            bucket.arrive()
            bucket.take_weights(self.shard_rank)
            bucket.gathered = None

    def _hook_forward(self) -> None:
        """Each block waits for its own weights, what comes before the blocks for what is in none, what comes after for all."""
        model = self.model
        in_blocks = {id(p) for block in model.blocks for p in block.parameters()}
        outside = {id(p) for p in model.parameters()} - in_blocks - {id(model.lm_head.weight)}
        for module in (m for m in model.modules() if isinstance(m, nn.Embedding)):
            self._wait_before(module, outside | {id(module.weight)})
        for block in model.blocks:
            self._wait_before(block, {id(p) for p in block.parameters()})
        if model.blocks:
            model.blocks[-1].register_forward_hook(lambda *_: self.wait_for_weights())

    def _wait_before(self, module: nn.Module, needed: set[int]) -> None:
        buckets = [bucket for bucket in self.buckets if needed & {id(p) for p in bucket.params.values()}]

        def wait(*_) -> None:
            for bucket in buckets:
                self._take_weights(bucket)

        module.register_forward_pre_hook(wait)
