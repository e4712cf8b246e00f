"""Head and loss in one pass, chunk by chunk, so that the logits of all tokens never exist at once.

A head of V tokens on N features has N x V logits, their exponentials and their gradients; at 4,096 tokens and a vocabulary of
65,536 each of the three takes a gigabyte. Here one chunk of rows goes through head, soft cap, cross-entropy and gradients before
the next begins, as in Liger (https://arxiv.org/abs/2410.10989). The gradients are kept until backward, which multiplies them by
the gradient of the sum.

N targets that carry loss, C channels, V vocabulary, R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from chattrain.data.batch import Batch

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 28}  # logits a chunk, R x V: a CPU's last-level cache; 1 GiB on a GPU


@dataclass(frozen=True)
class HeadSettings:
    """How head and loss are computed. All settings give the same result, to rounding."""

    chunk_elements: int  # logits a chunk, R x V
    losses_and_gradient: Callable[[Tensor, Tensor, float | None], tuple[Tensor, Tensor]]  # from a chunk's logits, targets, cap
    dynamic: bool = False  # is that function compiled once for any number of rows?


def head_settings(device_type: str, compiled: bool) -> HeadSettings:
    """The settings of training on a type of device. Uncompiled, each logit takes several fp32 numbers: on a GPU, where a chunk is
    large, it is then smaller by as much."""
    chunk_elements = CHUNK_ELEMENTS.get(device_type, CHUNK_ELEMENTS["cpu"])
    if device_type == "cuda" and not compiled:
        chunk_elements //= 4
    return HeadSettings(chunk_elements, _compiled() if compiled else _losses_and_gradient, dynamic=compiled)


def supervised(features: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of features (B, T, any) the rows (N, any) of the targets that carry loss, and these (N,)."""
    features, targets = features.flatten(0, 1), batch.targets.flatten()
    if batch.target_indices is None:
        return features, targets
    return features[batch.target_indices], targets[batch.target_indices]


def target_weights(batch: Batch) -> Tensor | None:
    """Loss weights (N,) of the targets that carry loss, or None where all weigh 1."""
    if batch.weights is None or batch.target_indices is None:
        return None if batch.weights is None else batch.weights.flatten()
    return batch.weights.flatten()[batch.target_indices]


def in_places(losses: Tensor, batch: Batch) -> Tensor:
    """Losses (N,) of the targets that carry loss in their places in the batch (B, T), 0 elsewhere."""
    if batch.target_indices is None:
        return losses.view(batch.targets.shape)
    return losses.new_zeros(batch.targets.numel()).index_put_((batch.target_indices,), losses).view(batch.targets.shape)


def summed_loss(
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    cap: float | None,
    settings: HeadSettings,
    bias: Tensor | None = None,
    loss_weights: Tensor | None = None,
) -> Tensor:
    """Sum of the cross-entropies of features (N, C) against targets (N,), in nats, of dtype `sum_dtype`.

    Targets are token ids; none is ignored. `loss_weights` (N,), fp32, multiply their losses; None: 1. Logits are
    cap x tanh(x / cap), or x where the cap is None; x is features times weight (V, C) transposed, plus the bias (V,). Under
    autocast the matrix products are in its dtype.
    """
    return _SummedLoss.apply(features, weight, bias, targets, loss_weights, cap, settings)


def token_losses(
    features: Tensor, weight: Tensor, targets: Tensor, cap: float | None, settings: HeadSettings, bias: Tensor | None = None
) -> Tensor:
    """The cross-entropies that `summed_loss` sums, fp32 (N,), without gradients: its own function makes them, chunk by chunk."""
    dtype = compute_dtype(weight)
    losses = torch.empty(targets.shape, dtype=torch.float32, device=features.device)
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        for rows, found, _ in _chunks(features.to(dtype), weight.to(dtype), _to(bias, dtype), targets, cap, settings):
            losses[rows] = found
    return losses


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of matrix products with this tensor: autocast's, or its own without autocast."""
    device = tensor.device.type
    autocasts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocasts else tensor.dtype


def sum_dtype(device: torch.device) -> torch.dtype:
    """fp64 for sums over thousands of tokens, so that they do not depend on how tokens are split over passes and ranks. MPS has
    no fp64, so it uses fp32."""
    return torch.float32 if device.type == "mps" else torch.float64


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        loss_weights: Tensor | None,
        cap: float | None,
        settings: HeadSettings,
    ) -> Tensor:
        dtype = compute_dtype(weight)
        x, w, b = features.detach().to(dtype), weight.detach().to(dtype), _to(bias, dtype)
        total = torch.zeros((), dtype=sum_dtype(x.device), device=x.device)
        grad_x = torch.empty_like(x)
        grad_w = torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
        grad_b = None if b is None else torch.zeros(b.shape, dtype=torch.float32, device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            for rows, losses, grad in _chunks(x, w, b, targets, cap, settings):
                factors = None if loss_weights is None else loss_weights[rows]
                total += _scaled(losses, factors).sum(dtype=total.dtype)
                grad_x[rows] = _scaled(grad @ w, factors)
                grad_w += grad.T @ _scaled(x[rows], factors)  # the factor of a row may stand on either side: C < V
                if grad_b is not None:
                    grad_b += _scaled(grad, factors).sum(dim=0, dtype=torch.float32)
        ctx.save_for_backward(grad_x, grad_w, grad_b)
        ctx.dtypes = features.dtype, weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor):
        grads = (
            None if grad is None else (grad * upstream).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*grads, None, None, None, None)


def _chunks(
    features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cap: float | None, settings: HeadSettings
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of a chunk, their losses fp32 (R,), and the gradients on their logits before the cap (R, V)."""
    size, stop = max(64, settings.chunk_elements // len(weight)), 0
    while stop < len(features):
        # The last chunk takes one row more rather than leave a chunk of one, for which torch.compile would compile anew.
        start, stop = stop, len(features) if len(features) - stop <= size + 1 else stop + size
        rows = slice(start, stop)
        logits, row_targets = F.linear(features[rows], weight, bias), targets[rows]
        if settings.dynamic:
            for tensor in (logits, row_targets):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        yield rows, *settings.losses_and_gradient(logits, row_targets, cap)


def _losses_and_gradient(logits: Tensor, targets: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """From logits (R, V) before the cap and targets (R,): the losses, fp32 (R,), and the gradient of their sum on the logits."""
    capped, slope = logits.float(), None
    if cap is not None:
        tanh = torch.tanh(capped / cap)
        capped, slope = tanh * cap, 1 - tanh * tanh
    log_sum = capped.logsumexp(dim=1, keepdim=True)
    losses = log_sum[:, 0] - capped.gather(1, targets[:, None])[:, 0]
    one_hot = torch.arange(logits.size(1), device=logits.device) == targets[:, None]
    grad = (capped - log_sum).exp() - one_hot.float()
    return losses, (grad if slope is None else grad * slope).to(logits.dtype)


def _scaled(rows: Tensor, factors: Tensor | None) -> Tensor:
    """Each of the rows (R, ...) times its factor (R,), in the dtype of the rows."""
    return rows if factors is None else rows * factors.to(rows.dtype).view(-1, *[1] * (rows.dim() - 1))


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(dtype)


@lru_cache(maxsize=1)
def _compiled() -> Callable[[Tensor, Tensor, float | None], tuple[Tensor, Tensor]]:
    return torch.compile(_losses_and_gradient)
