"""AdamW whose moments are stored in bf16: 4 bytes a weight instead of 8. A step computes in fp32 and rounds what it stores.

The average of squared gradients is rounded stochastically. It moves by at most 1 - beta2 of itself where gradients are small, and
neighbours in bf16 are 0.4 to 0.8 % apart: with beta2 = 0.999 and rounding to the nearest it could never fall
(https://arxiv.org/abs/2010.06192 shows what vanishes so). Rounded up or down by chance, in proportion to the distance, it is
right on average. The average of gradients moves by 1 - beta1, about a tenth, and is rounded to the nearest number, as in
DeepSeek-V3 (https://arxiv.org/abs/2412.19437).

Chance comes from a hash of the step and of the fp32 value that is rounded. So there is no generator whose state would have to be
saved, and a step does not depend on how parameters are cut over ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}  # weights stepped at a time; the working memory is about 20 bytes for each
LOW_BITS = (1 << 16) - 1  # of an fp32 number: those that bf16 does not have
# Odd multipliers of 32-bit hashes: the golden ratio for the step, the others of MurmurHash3's finalizer.
STEP, FIRST, SECOND = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35


class AdamWBF16(torch.optim.Optimizer):
    """torch.optim.AdamW (https://arxiv.org/abs/1711.05101) on fp32 parameters, with `exp_avg` and `exp_avg_sq` in bf16."""

    STATE = ("step", "exp_avg", "exp_avg_sq")

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0):
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "state_dtype": torch.bfloat16}
        )
        self.chunk_elements: int | None = None  # None: as many as suit the device
        self.found_inf: Tensor | None = None  # see NamedOptimizer.void_if

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, p.grad, group)

    def _step(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = 0.0
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p, dtype=group["state_dtype"]) for _ in range(2))
        state["step"] += 1
        size = self.chunk_elements or CHUNK_ELEMENTS.get(p.device.type, CHUNK_ELEMENTS["cuda"])
        flat = (tensor.view(-1).split(size) for tensor in (p, grad.contiguous(), state["exp_avg"], state["exp_avg_sq"]))
        for chunk in zip(*flat, strict=True):
            before = None if self.found_inf is None else [tensor.clone() for tensor in (chunk[0], chunk[2], chunk[3])]
            _update(*chunk, step=int(state["step"]), **{key: group[key] for key in ("lr", "betas", "eps", "weight_decay")})
            if self.found_inf is not None and before is not None:
                for tensor, old in zip((chunk[0], chunk[2], chunk[3]), before, strict=True):
                    tensor.copy_(torch.where(self.found_inf > 0, old, tensor))


def _update(
    p: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Step the weights p, fp32 (n,), in place. `step`: the number of this one, from 1."""
    mean = exp_avg.float().lerp_(grad, 1 - betas[0])
    exp_avg.copy_(mean)
    square = exp_avg_sq.float().mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    denominator = square.sqrt().div_((1 - betas[1] ** step) ** 0.5).add_(eps)
    exp_avg_sq.copy_(round_stochastically(square, step))
    if weight_decay:
        p.mul_(1 - lr * weight_decay)
    p.addcdiv_(mean, denominator, value=-lr / (1 - betas[0] ** step))


def round_stochastically(values: Tensor, step: int) -> Tensor:
    """fp32 values to neighbours that bf16 can represent, in place; the farther one with a probability that makes the mean right.

    >>> x = torch.full((1,), 1 + 1 / 512)  # a quarter of the way from 1 to the next number of bf16
    >>> [round_stochastically(x.clone(), step).item() for step in range(1, 7)]
    [1.0, 1.0, 1.0078125, 1.0, 1.0, 1.0078125]
    """
    bits = values.view(torch.int32)
    noise = bits ^ _int32(step * STEP)
    noise.mul_(_int32(FIRST))
    noise ^= (noise >> 13) & ((1 << 19) - 1)
    noise.mul_(_int32(SECOND))
    bits += (noise >> 16) & LOW_BITS
    bits &= ~LOW_BITS
    return values


def _int32(number: int) -> int:
    """The number modulo 2^32, as int32 holds it."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)
