"""Matrix products of few rows on a CPU: the linear layers of a decoding step.

torch multiplies rows x (M, K) by a weight w (N, K) with the rows on the left, and BLAS then repacks the whole weight for a few
rows. With the weight on the left, w x^T, it does not: that takes 0.5 to 0.8 of the time from 4 to 64 rows in fp32, and from 2 to
128 in bf16 (one core of an Intel Xeon with AVX-512 and AMX, torch 2.13). In fp32 the weight goes in blocks of 32 outputs, which
BLAS multiplies without packing. A single row in bf16 is a product of matrix and vector.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

BLOCK = 32  # outputs of a block in fp32
ROWS = {torch.float32: range(4, 65), torch.bfloat16: range(1, 129)}  # rows for which this is faster, by dtype


class ThinProducts(TorchFunctionMode):
    """Within this context, linear layers of few rows are computed as above; others as always. Results differ by rounding."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.linear and not kwargs:
            return linear(*args)
        return func(*args, **(kwargs or {}))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times weight (N, K) transposed, plus bias (N,): (..., N)."""
    rows, (outputs, inputs) = x.numel() // x.size(-1), weight.shape
    blocks = x.dtype == torch.float32 and outputs % BLOCK == 0
    if x.dtype != weight.dtype or rows not in ROWS.get(x.dtype, ()) or (x.dtype == torch.float32 and not blocks):
        return F.linear(x, weight, bias)
    if rows == 1:
        y = weight.mv(x.flatten())
    elif blocks:
        columns = x.reshape(rows, inputs).t().contiguous()
        y = torch.bmm(weight.view(-1, BLOCK, inputs), columns.expand(outputs // BLOCK, inputs, rows)).view(outputs, rows)
        y = y.t().contiguous()
    else:
        y = (weight @ x.reshape(rows, inputs).t()).t().contiguous()
    y = y.view(*x.shape[:-1], outputs)
    return y if bias is None else y.add_(bias)
