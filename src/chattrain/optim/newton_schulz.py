"""Muon's direction: approximately the nearest semi-orthogonal matrix, by Newton-Schulz iterations.

Keller Jordan's Muon, https://kellerjordan.github.io/posts/muon/.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from chattrain.optim.cores import on_cores


@dataclass(frozen=True)
class MuonSettings:
    """How the iterations run on a device. The directions are the same up to rounding."""

    batch: int = 1  # matrices of the same shape that are iterated as one batch
    strip: float = math.inf  # rows of a symmetric product that are computed at a time, up to the diagonal
    threads: bool = False  # are several matrices computed at the same time, each on one core?


# Batches fill a GPU and launch fewer kernels. A CPU is faster with single matrices, each on a core of its own.
SETTINGS = {"cpu": MuonSettings(strip=192, threads=True), "cuda": MuonSettings(batch=16)}


def muon_settings(device: torch.device) -> MuonSettings:
    """The fastest settings that are known for the device."""
    return SETTINGS.get(device.type, MuonSettings())


# Quintic of the iteration, chosen for the steepest slope at 0: singular values end near 1, not at it.
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SMALL = 192  # rows up to which fusing iterations of a wide matrix saves no time
MAX_FUSED = 3  # iterations of a wide matrix in one fused pass: more would multiply the rounding error of its Gram matrix


def orthogonalize(update: Tensor, steps: int, dtype: torch.dtype = torch.bfloat16, strip: float | None = None) -> Tensor:
    """Approximately the nearest semi-orthogonal matrix to `update`, (rows, columns) or (batch, rows, columns), in `dtype`.

    `strip`: see MuonSettings; None: the default of the device.
    """
    strip = muon_settings(update.device).strip if strip is None else strip
    short, long = sorted(update.shape[-2:])
    wide = update.size(-2) == short
    x = (update if wide else update.mT).to(dtype)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # spectral norm at most 1
    for count in fused_iterations(short, long, steps):
        x = iterate(x, count, strip)
    return x if wide else x.mT


def iterate(x: Tensor, count: int, strip: float = math.inf) -> Tensor:
    """`count` fused iterations x <- p(x x^T) x, with p(g) = a I + b g + c g^2.

    Fusing takes fewer multiplications for a wide x: each iteration maps the Gram matrix g = x x^T to p(g) g p(g), and at the
    end x is multiplied once by the product of all p(g). In the code `p` holds p(g) - a I: a is added separately to avoid
    rounding.
    """
    a, b, c = NS_COEFFICIENTS
    symmetric = partial(symmetric_product, strip=strip)
    gram = symmetric(x, x)
    p = symmetric(gram, gram, gram, b, c)
    if count == 1:
        return _multiply_add(x, p, x, a)
    product = p.clone()
    product.diagonal(dim1=-2, dim2=-1).add_(a)
    for _ in range(count - 1):
        half = symmetric(p, gram, gram, a)
        gram = symmetric(half, p, half, a)
        p = symmetric(gram, gram, gram, b, c)
        product = symmetric(p, product, product, a)
    return product @ x


def symmetric_product(
    x: Tensor, y: Tensor, plus: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0, strip: float = math.inf
) -> Tensor:
    """alpha x y^T + beta plus, which must be symmetric.

    With a finite `strip`, a product of single matrices is computed in strips of rows up to the diagonal, and mirrored.

    >>> x = torch.randn(500, 300, dtype=torch.float64)
    >>> torch.allclose(symmetric_product(x, x, strip=192), x @ x.T)
    True
    """
    rows = x.size(-2)
    if x.ndim > 2 or rows <= strip:
        return x @ y.mT if plus is None else _multiply_add(plus, x, y.mT, beta, alpha)
    out, height = x.new_empty(rows, rows), int(strip)
    for start in range(0, rows, height):
        stop = min(start + height, rows)
        lower = out[start:stop, :stop]
        if plus is None:
            torch.mm(x[start:stop], y[:stop].mT, out=lower)
        else:
            torch.addmm(plus[start:stop, :stop], x[start:stop], y[:stop].mT, beta=beta, alpha=alpha, out=lower)
        out[:start, start:stop] = lower[:, :start].mT
    return out


def _multiply_add(plus: Tensor, x: Tensor, y: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
    """alpha x y + beta plus, for matrices or for batches of them."""
    return (torch.addmm if x.ndim == 2 else torch.baddbmm)(plus, x, y, beta=beta, alpha=alpha)


def cost(shape: Sequence[int], steps: int = 5) -> int:
    """Multiplications of the iterations on a matrix of this shape (rows, columns), with all products computed in full.

    >>> cost(torch.Size([4, 4]), 1), cost(torch.Size([16, 4]), 1), cost(torch.Size([1600, 400])) / cost(torch.Size([400, 400]))
    (192, 576, 2.0)
    """
    short, long = sorted(shape)
    counts = fused_iterations(short, long, steps)
    return short * short * sum(2 * long + (4 * count - 3) * short for count in counts)


def fused_iterations(short: int, long: int, steps: int) -> list[int]:
    """How many iterations are fused in each pass; they add up to `steps`.

    >>> fused_iterations(768, 768, 5), fused_iterations(768, 3072, 5)
    ([1, 1, 1, 1, 1], [3, 2])
    """
    most = MAX_FUSED if short > SMALL and long >= 2 * short else 1
    return [min(most, steps - done) for done in range(0, steps, most)]


def group_by_shape(matrices: Sequence[Tensor], batch: int) -> list[list[int]]:
    """Indices of the matrices in lists of up to `batch`, each of matrices of one shape."""
    by_shape: dict[torch.Size, list[int]] = {}
    for i, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape, []).append(i)
    return [indices[i : i + batch] for indices in by_shape.values() for i in range(0, len(indices), batch)]


class Orthogonalizer:
    """Directions of matrices that are whole on this process, computed in `dtype`: the format of the run's matrix products.

    A run in fp32 needs fp32 here too. The iterations amplify rounding, so in bf16, runs whose gradients differ in the last bit
    only (with another number of ranks) would differ in the fourth digit of their losses.
    """

    def __init__(self, dtype: torch.dtype = torch.bfloat16, settings: MuonSettings | None = None):
        """`settings` None: the defaults of the device that the matrices are on."""
        self.dtype, self._settings = dtype, settings

    def settings(self, matrix: Tensor) -> MuonSettings:
        return self._settings or muon_settings(matrix.device)

    def for_each_batch(self, params: Sequence[Tensor], update: Callable[[list[int]], None]) -> None:
        """Split params into batches and call update(indices) for each; on a CPU several calls run at the same time."""
        if not params:
            return
        settings = self.settings(params[0])
        batches = group_by_shape(params, settings.batch)
        if settings.threads:
            on_cores(update, sorted(batches, key=lambda indices: -cost(params[indices[0]].shape)))
        else:
            for indices in batches:
                update(indices)

    def shape(self, param: Tensor) -> torch.Size:
        """Shape of the whole matrix."""
        return param.shape

    def __call__(self, params: Sequence[Tensor], updates: Sequence[Tensor], steps: int) -> list[Tensor]:
        """The direction of each update, after `steps` iterations. params[i] is the parameter that updates[i] belongs to."""
        out, strip = {}, self.settings(updates[0]).strip if updates else None
        for indices in group_by_shape(updates, len(updates)):
            if len(indices) == 1:
                directions = [orthogonalize(updates[indices[0]], steps, self.dtype, strip)]
            else:
                batch = torch.stack([updates[i].to(self.dtype) for i in indices])
                directions = orthogonalize(batch, steps, self.dtype, strip).unbind()
            out |= dict(zip(indices, directions, strict=True))
        return [out[i] for i in range(len(updates))]
