"""nanochat's optimizer: Muon on the matrices of the blocks, AdamW on all other parameters."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from chattrain.config.words import StateDType
from chattrain.errors import UserError
from chattrain.optim.groups import parameter_groups
from chattrain.optim.named import FUSED, NamedOptimizer
from chattrain.optim.newton_schulz import Orthogonalizer
from chattrain.optim.partition import Partition
from chattrain.optim.trainable import TrainableModel

STATE_DTYPES = {StateDType.fp32: torch.float32, StateDType.bf16: torch.bfloat16}
TUNED_N_EMBD = 768  # n_embd at which embed_lr and lm_head_lr were tuned


def momentum_at(step: int, start: float, end: float, warmup_steps: int) -> float:
    """Muon's momentum: linear from start to end over the first warmup_steps, then constant.

    >>> [round(momentum_at(s, 0.85, 0.95, 300), 3) for s in (0, 150, 300, 1000)]
    [0.85, 0.9, 0.95, 0.95]
    """
    progress = min(step / warmup_steps, 1.0) if warmup_steps else 1.0
    return (1 - progress) * start + progress * end


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum whose update is orthogonalized, for 2-D parameters
    (https://kellerjordan.github.io/posts/muon/).

    A matrix of r rows and c columns moves by lr x sqrt(max(1, r / c)) along the orthogonalized update. The momentum warms up
    over the optimizer's own steps. The momentum buffer is stored in `momentum_dtype`; a step computes in the gradient's dtype.
    `orthogonalizer` computes the directions. If each rank holds some rows of a matrix, it brings them together.
    """

    STATE = ("step", "momentum_buffer")

    def __init__(
        self,
        params,
        lr: float = 0.02,
        momentum: float = 0.95,
        momentum_start: float = 0.85,
        momentum_warmup_steps: int = 300,
        ns_steps: int = 5,
        momentum_dtype: torch.dtype = torch.float32,
        orthogonalizer: Orthogonalizer | None = None,
    ):
        self.orthogonalizer = orthogonalizer or Orthogonalizer()
        self.found_inf: Tensor | None = None  # see NamedOptimizer.void_if; the warm-up of momentum counts a void step
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "momentum_start": momentum_start,
                "momentum_warmup_steps": momentum_warmup_steps,
                "ns_steps": ns_steps,
                "momentum_dtype": momentum_dtype,
            },
        )

    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            self.orthogonalizer.for_each_batch(params, partial(self._update, group, params))

    @torch.no_grad()
    def _update(self, group: dict, params: list[Tensor], indices: list[int]) -> None:
        """Step params[i] for each i in `indices`."""
        batch = [params[i] for i in indices]
        updates = [self._nesterov_update(p, p.grad, group).to(self.orthogonalizer.dtype) for p in batch if p.grad is not None]
        directions = self.orthogonalizer(batch, updates, group["ns_steps"])
        for p, direction in zip(batch, directions, strict=True):
            rows, columns = self.orthogonalizer.shape(p)
            if self.found_inf is not None:
                direction = direction * (1 - self.found_inf).to(direction.dtype)
            p.add_(direction, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)

    def _nesterov_update(self, p: Tensor, grad: Tensor, group: dict) -> Tensor:
        """Update the momentum buffer with the gradient; returns Nesterov's update."""
        state = self.state[p]
        if not state:
            state["step"] = 0.0
            state["momentum_buffer"] = torch.zeros_like(grad, dtype=group["momentum_dtype"])
        momentum = momentum_at(int(state["step"]), group["momentum_start"], group["momentum"], group["momentum_warmup_steps"])
        state["step"] += 1
        buffer = state["momentum_buffer"].to(grad.dtype)  # the buffer itself if it has the gradient's dtype, else a copy
        if self.found_inf is not None:
            grad = torch.where(self.found_inf > 0, buffer, grad)  # which leaves the buffer as it is
        buffer.lerp_(grad, 1 - momentum)
        state["momentum_buffer"].copy_(buffer)
        return grad.lerp(buffer, momentum)


def build(
    model: TrainableModel,
    strategy: Partition | None = None,
    *,
    lr_scale: float,
    matrix_lr: float,
    embed_lr: float,
    lm_head_lr: float,
    vector_lr: float | None,
    momentum: float,
    momentum_start: float,
    momentum_warmup_steps: int,
    ns_steps: int,
    betas: list[float],
    eps: float,
    weight_decay: float,
    momentum_dtype: StateDType = StateDType.fp32,
) -> NamedOptimizer:
    """Learning rates of embeddings and head are scaled by (n_embd / 768)^-0.5, all of them by lr_scale. `strategy` None: this
    process steps all parameters.

    Raises UserError if the model has vector parameters without a learning rate for them, or the reverse.
    """
    groups = parameter_groups(model)
    if bool(groups["vector"]) != (vector_lr is not None):
        raise UserError(
            f"optimizer.vector_lr=null, but the model has {groups['vector'][0][0]}: give a learning rate for such "
            "norms and biases, or use optimizer=adamw"
            if groups["vector"]
            else f"optimizer.vector_lr={vector_lr} has no effect: the model has no norms and biases to learn"
        )
    width_scale = (model.n_embd / TUNED_N_EMBD) ** -0.5
    rates = {"embed": embed_lr * width_scale, "lm_head": lm_head_lr * width_scale, "vector": vector_lr}
    used = [name for name, members in groups.items() if members]
    groups = strategy.partition_params(groups, whole=("matrix",)) if strategy else groups
    params = {name: [p for _, p in members] for name, members in groups.items()}
    adamw = torch.optim.AdamW(
        [
            {"name": name, "params": params[name], "lr": lr * lr_scale, "weight_decay": 0.0 if name == "vector" else weight_decay}
            for name, lr in rates.items()
            if name in used and lr is not None
        ],
        betas=(betas[0], betas[1]),
        eps=eps,
        fused=model.lm_head.get_parameter("weight").device.type in FUSED,
    )
    muon = Muon(
        [{"name": "matrix", "params": params["matrix"], "lr": matrix_lr * lr_scale}],
        momentum=momentum,
        momentum_start=momentum_start,
        momentum_warmup_steps=momentum_warmup_steps,
        ns_steps=ns_steps,
        momentum_dtype=STATE_DTYPES[momentum_dtype],
        orthogonalizer=strategy.orthogonalizer() if strategy else None,
    )
    return NamedOptimizer([muon, adamw], groups)
