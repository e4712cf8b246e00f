"""Muon's direction: the nearest semi-orthogonal matrix, roughly, by Newton-Schulz iterations.

Keller Jordan's Muon, https://kellerjordan.github.io/posts/muon/.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Quintic of the iteration, chosen for the steepest slope at 0: singular values end near 1, not at it.
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Matrices of one shape that go through a batched iteration together: on a GPU they fill it and start fewer kernels, on a CPU one
# after the other is faster.
TOGETHER = {"cuda": 16}


def orthogonalize(update: Tensor, steps: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Nearest semi-orthogonal matrix to `update` (rows, columns), roughly, computed in `dtype`.

    With (matrices, rows, columns), of each matrix.
    """
    a, b, c = NS_COEFFICIENTS
    multiply_add = torch.addmm if update.ndim == 2 else torch.baddbmm
    wide = update.size(-2) <= update.size(-1)
    x = (update if wide else update.mT).to(dtype)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # spectral norm at most 1
    for _ in range(steps):
        gram = x @ x.mT
        x = multiply_add(x, multiply_add(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # a x + (b gram + c gram^2) x
    return x if wide else x.mT


def cost(shape: torch.Size) -> int:
    """Multiplications of one iteration on a matrix of this shape.

    >>> cost(torch.Size([4, 4])), cost(torch.Size([16, 4]))
    (192, 576)
    """
    short, long = sorted(shape)
    return short * short * (2 * long + short)


def alike(matrices: list[Tensor], together: int) -> list[list[int]]:
    """Places of matrices of the same shape, up to `together` of them in a list."""
    by_shape: dict[torch.Size, list[int]] = {}
    for place, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape, []).append(place)
    return [places[i : i + together] for places in by_shape.values() for i in range(0, len(places), together)]


class Orthogonalizer:
    """Directions of matrices that are whole on this process, in the number format `dtype` of the run's matrix products.

    In bf16, and in fp32 for a run in fp32: five iterations enlarge rounding, so that runs whose gradients differ in the last
    bit only (another number of ranks) would part in the fourth digit of their losses.
    """

    def __init__(self, dtype: torch.dtype = torch.bfloat16):
        self.dtype = dtype

    def turns(self, params: list[Tensor]) -> list[list[int]]:
        """Places of the matrices that go through one call."""
        return alike(params, TOGETHER.get(params[0].device.type, 1)) if params else []

    def shape(self, param: Tensor) -> torch.Size:
        """Of the whole matrix."""
        return param.shape

    def __call__(self, params: list[Tensor], updates: list[Tensor], steps: int) -> list[Tensor]:
        """One direction for each update; params tell which matrices these are."""
        out = {}
        for places in alike(updates, len(updates)):
            if len(places) == 1:
                moves = [orthogonalize(updates[places[0]], steps, self.dtype)]
            else:
                moves = orthogonalize(torch.stack([updates[i].to(self.dtype) for i in places]), steps, self.dtype).unbind()
            out |= dict(zip(places, moves, strict=True))
        return [out[i] for i in range(len(updates))]
