"""Muon on the matrices of the blocks, AdamW on all else: nanochat's optimizer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from chattrain.errors import UserError
from chattrain.optim.config import StateDType
from chattrain.optim.groups import parameter_groups
from chattrain.optim.named import NamedOptimizer

# Quintic of the Newton-Schulz iteration, chosen for the steepest slope at 0: singular values end near 1, not at it.
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STATE_DTYPES = {StateDType.fp32: torch.float32, StateDType.bf16: torch.bfloat16}
# Matrices of one shape that go through a batched iteration together: on a GPU they fill it and start fewer kernels, on a CPU one
# after the other is faster.
TOGETHER = {"cuda": 16}
WIDTH_OF_TUNING = 768  # n_embd at which embed_lr and lm_head_lr were tuned


def orthogonalize(update: Tensor, steps: int) -> Tensor:
    """Nearest semi-orthogonal matrix to `update` (rows, columns), roughly, in bf16 by Newton-Schulz iterations.

    With (matrices, rows, columns), of each matrix. Keller Jordan's Muon, https://kellerjordan.github.io/posts/muon/.
    """
    a, b, c = NS_COEFFICIENTS
    multiply_add = torch.addmm if update.ndim == 2 else torch.baddbmm
    wide = update.size(-2) <= update.size(-1)
    x = (update if wide else update.mT).bfloat16()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # spectral norm at most 1
    for _ in range(steps):
        gram = x @ x.mT
        x = multiply_add(x, multiply_add(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # a x + (b gram + c gram^2) x
    return x if wide else x.mT


def alike(matrices: list[Tensor], together: int) -> list[list[int]]:
    """Places of matrices of the same shape, up to `together` of them in a list."""
    by_shape: dict[torch.Size, list[int]] = {}
    for place, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape, []).append(place)
    return [places[i : i + together] for places in by_shape.values() for i in range(0, len(places), together)]


def momentum_at(step: int, start: float, end: float, warmup_steps: int) -> float:
    """Linear from start to end over the first steps.

    >>> [round(momentum_at(s, 0.85, 0.95, 300), 3) for s in (0, 150, 300, 1000)]
    [0.85, 0.9, 0.95, 0.95]
    """
    share = min(step / warmup_steps, 1.0) if warmup_steps else 1.0
    return (1 - share) * start + share * end


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum whose update is orthogonalized, for 2-D parameters.

    A matrix of r rows and c columns moves by lr x sqrt(max(1, r / c)) along the orthogonalized update. The momentum
    warms up with the optimizer's own steps. Between steps it is kept in `momentum_dtype`; a step computes in the gradient's.
    """

    STATE = ("step", "momentum_buffer")

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95, momentum_start: float = 0.85,
                 momentum_warmup_steps: int = 300, ns_steps: int = 5, momentum_dtype: torch.dtype = torch.float32):
        super().__init__(params, {"lr": lr, "momentum": momentum, "momentum_start": momentum_start,
                                  "momentum_warmup_steps": momentum_warmup_steps, "ns_steps": ns_steps,
                                  "momentum_dtype": momentum_dtype})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for places in alike(params, TOGETHER.get(params[0].device.type, 1) if params else 1):
                self._update([params[place] for place in places], group)

    def _update(self, params: list[Tensor], group: dict) -> None:
        """One step of matrices of the same shape."""
        updates = [self._momentum(p, p.grad, group).bfloat16() for p in params]
        if len(params) == 1:
            moves = [orthogonalize(updates[0], group["ns_steps"])]
        else:
            moves = orthogonalize(torch.stack(updates), group["ns_steps"]).unbind()
        rows, columns = params[0].shape
        for p, move in zip(params, moves, strict=True):
            p.add_(move, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)

    def _momentum(self, p: Tensor, grad: Tensor, group: dict) -> Tensor:
        """Move the momentum on by the gradient; returns what Nesterov's step follows."""
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["momentum_buffer"] = torch.zeros_like(grad, dtype=group["momentum_dtype"])
        momentum = momentum_at(int(state["step"]), group["momentum_start"], group["momentum"],
                               group["momentum_warmup_steps"])
        state["step"] += 1
        buffer = state["momentum_buffer"].to(grad.dtype).lerp_(grad, 1 - momentum)  # in place, unless it is kept in bf16
        state["momentum_buffer"].copy_(buffer)
        return grad.lerp(buffer, momentum)


def build(model: nn.Module, lr_scale: float, matrix_lr: float, embed_lr: float, lm_head_lr: float, vector_lr: float | None,
          momentum: float, momentum_start: float, momentum_warmup_steps: int, ns_steps: int, betas: list[float], eps: float,
          weight_decay: float, momentum_dtype: StateDType = StateDType.fp32) -> NamedOptimizer:
    """Learning rates of embeddings and head are scaled by (n_embd / 768)^-0.5, all by lr_scale.

    Raises UserError where the model has vector parameters and there is no learning rate for them, or the reverse.
    """
    groups = parameter_groups(model)
    if bool(groups["vector"]) != (vector_lr is not None):
        raise UserError(f"optimizer.vector_lr=null, but the model has {groups['vector'][0][0]}: give a learning rate for such "
                        "norms and biases, or use optimizer=adamw" if groups["vector"] else
                        f"optimizer.vector_lr={vector_lr} has no effect: the model has no norms and biases to learn")
    params = {name: [p for _, p in members] for name, members in groups.items()}
    width = (model.n_embd / WIDTH_OF_TUNING) ** -0.5
    device = params["lm_head"][0].device.type
    rates = {"embed": embed_lr * width, "lm_head": lm_head_lr * width, "vector": vector_lr}
    adamw = torch.optim.AdamW(
        [{"name": name, "params": params[name], "lr": lr * lr_scale, "weight_decay": 0.0 if name == "vector" else weight_decay}
         for name, lr in rates.items() if params[name]],
        betas=tuple(betas), eps=eps, fused=device in ("cuda", "cpu"))
    muon = Muon([{"name": "matrix", "params": params["matrix"], "lr": matrix_lr * lr_scale}], momentum=momentum,
                momentum_start=momentum_start, momentum_warmup_steps=momentum_warmup_steps, ns_steps=ns_steps,
                momentum_dtype=STATE_DTYPES[momentum_dtype])
    return NamedOptimizer([muon, adamw], groups)
