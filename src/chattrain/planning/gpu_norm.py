"""torch's RMSNorm as a GPU has it: one kernel, which keeps its input and a number a row.

A CPU, whose tensors stand in for those of the GPU, computes it in several operations, and in bf16 keeps an fp32 copy beside its
input.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _FusedNorm(torch.autograd.Function):
    """Allocates what aten._fused_rms_norm and its backward do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


class FusedNorms(TorchFunctionMode):
    """Within it, F.rms_norm without a weight is that kernel."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (F.rms_norm, torch.rms_norm) and len(args) == 2 and not kwargs:
            return _FusedNorm.apply(args[0])
        return func(*args, **(kwargs or {}))
