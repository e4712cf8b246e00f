"""Muon's direction: the nearest semi-orthogonal matrix, roughly, by Newton-Schulz iterations.

Keller Jordan's Muon, https://kellerjordan.github.io/posts/muon/.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from chattrain.optim.cores import on_cores


@dataclass(frozen=True)
class MuonSettings:
    """How the iterations are spread over a device; the directions are the same, to rounding."""

    batch: int = 1  # matrices of one shape that go through an iteration together
    strip: float = math.inf  # rows of a symmetric product that are computed at a time, up to the diagonal
    threads: bool = False  # are matrices taken on several cores at a time, each on one?


# Batches fill a GPU and start fewer kernels. On a CPU one matrix after the other is faster, each on a core of its own.
SETTINGS = {"cpu": MuonSettings(strip=192, threads=True), "cuda": MuonSettings(batch=16)}


def muon_settings(device: torch.device) -> MuonSettings:
    return SETTINGS.get(device.type, MuonSettings())


# Quintic of the iteration, chosen for the steepest slope at 0: singular values end near 1, not at it.
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SMALL = 192  # rows up to which a wide matrix gains nothing by several iterations at once
AT_ONCE = 3  # iterations of a wide matrix: with more, rounding of its Gram matrix would be many times that of single ones


def orthogonalize(update: Tensor, steps: int, dtype: torch.dtype = torch.bfloat16, strip: float | None = None) -> Tensor:
    """Nearest semi-orthogonal matrix to `update` (rows, columns), roughly, computed in `dtype`.

    With (matrices, rows, columns), of each matrix. `strip`: see MuonSettings; None: that of the device.
    """
    strip = muon_settings(update.device).strip if strip is None else strip
    short, long = sorted(update.shape[-2:])
    wide = update.size(-2) == short
    x = (update if wide else update.mT).to(dtype)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # spectral norm at most 1
    for times in fused_iterations(short, long, steps):
        x = iterate(x, times, strip)
    return x if wide else x.mT


def iterate(x: Tensor, times: int, strip: float = math.inf) -> Tensor:
    """x after so many iterations x <- p(x x^T) x, with p(g) = a + b g + c g^2.

    Several at once take fewer multiplications where x is wide: x x^T goes through them alone, as p(g) g p(g), and x is multiplied
    by the product of all p. In the code `p` holds p(g) - a I: a is added separately, to avoid rounding it.
    """
    a, b, c = NS_COEFFICIENTS
    symmetric = partial(symmetric_product, strip=strip)
    gram = symmetric(x, x)
    p = symmetric(gram, gram, gram, b, c)
    if times == 1:
        return _multiply_add(x, p, x, a)
    product = p.clone()
    product.diagonal(dim1=-2, dim2=-1).add_(a)
    for _ in range(times - 1):
        half = symmetric(p, gram, gram, a)
        gram = symmetric(half, p, half, a)
        p = symmetric(gram, gram, gram, b, c)
        product = symmetric(p, product, product, a)
    return product @ x


def symmetric_product(
    x: Tensor, y: Tensor, plus: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0, strip: float = math.inf
) -> Tensor:
    """alpha x y^T + beta plus, where that is known to be symmetric: of a matrix on a CPU strips up to the diagonal are computed,
    and mirrored.

    >>> x = torch.randn(500, 300, dtype=torch.float64)
    >>> torch.allclose(symmetric_product(x, x, strip=192), x @ x.T)
    True
    """
    rows = x.size(-2)
    if x.ndim > 2 or rows <= strip:
        return x @ y.mT if plus is None else _multiply_add(plus, x, y.mT, beta, alpha)
    out = x.new_empty(rows, rows)
    for start in range(0, rows, int(strip)):
        stop = min(start + int(strip), rows)
        lower = out[start:stop, :stop]
        if plus is None:
            torch.mm(x[start:stop], y[:stop].mT, out=lower)
        else:
            torch.addmm(plus[start:stop, :stop], x[start:stop], y[:stop].mT, beta=beta, alpha=alpha, out=lower)
        out[:start, start:stop] = lower[:, :start].mT
    return out


def _multiply_add(plus: Tensor, x: Tensor, y: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
    """alpha x y + beta plus, of matrices or of batches of them."""
    return (torch.addmm if x.ndim == 2 else torch.baddbmm)(plus, x, y, beta=beta, alpha=alpha)


def cost(shape: tuple[int, int], steps: int = 5) -> int:
    """Multiplications of the iterations on a matrix of this shape, all products in full.

    >>> cost(torch.Size([4, 4]), 1), cost(torch.Size([16, 4]), 1), cost(torch.Size([1600, 400])) / cost(torch.Size([400, 400]))
    (192, 576, 2.0)
    """
    short, long = sorted(shape)
    turns = fused_iterations(short, long, steps)
    return short * short * sum(2 * long + (4 * times - 3) * short for times in turns)


def fused_iterations(short: int, long: int, steps: int) -> list[int]:
    """How many of the iterations go at once."""
    most = AT_ONCE if short > SMALL and long >= 2 * short else 1
    return [min(most, steps - done) for done in range(0, steps, most)]


def group_by_shape(matrices: list[Tensor], together: int) -> list[list[int]]:
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

    def __init__(self, dtype: torch.dtype = torch.bfloat16, settings: MuonSettings | None = None):
        """`settings` None: those of the device that the matrices are on."""
        self.dtype, self._settings = dtype, settings

    def settings(self, matrix: Tensor) -> MuonSettings:
        return self._settings or muon_settings(matrix.device)

    def for_each_batch(self, params: list[Tensor], update: Callable[[list[int]], None]) -> None:
        """update(places) until all these matrices have had their turn, for those that go through one call together; on a CPU
        several turns are taken at a time, in threads."""
        if not params:
            return
        settings = self.settings(params[0])
        turns = group_by_shape(params, settings.batch)
        if settings.threads:
            on_cores(update, sorted(turns, key=lambda places: -cost(params[places[0]].shape)))
        else:
            for places in turns:
                update(places)

    def shape(self, param: Tensor) -> torch.Size:
        """Of the whole matrix."""
        return param.shape

    def __call__(self, params: list[Tensor], updates: list[Tensor], steps: int) -> list[Tensor]:
        """One direction for each update; params tell which matrices these are."""
        out, strip = {}, self.settings(updates[0]).strip if updates else None
        for places in group_by_shape(updates, len(updates)):
            if len(places) == 1:
                moves = [orthogonalize(updates[places[0]], steps, self.dtype, strip)]
            else:
                moves = orthogonalize(torch.stack([updates[i].to(self.dtype) for i in places]), steps, self.dtype, strip).unbind()
            out |= dict(zip(places, moves, strict=True))
        return [out[i] for i in range(len(updates))]
