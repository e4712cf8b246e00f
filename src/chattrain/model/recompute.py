"""Activation checkpointing (https://arxiv.org/abs/1604.06174): backward computes again what forward did not keep.

Numbers stay what they are, to the bit where nothing is compiled: the same operations run on the same inputs a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten._scaled_mm.default}
ATTENTION = ("attention", "attn")  # parts of its operations' names: each device and kind of mask has its own


def recompute(blocks: Iterable[nn.Module], selective: bool) -> None:
    """From now on a forward pass through one of these modules keeps its inputs alone for backward, which runs it once more.

    selective: it keeps the results of matrix products and of attention too, which cost time; only element-wise work, which
    costs memory, is done twice. Passes without gradients (evaluation, generation) stay what they are.
    """
    for block in blocks:
        block.forward = (_keeping_products if selective else _keeping_inputs)(block.forward)


def _keeping_inputs(forward: Callable) -> Callable:
    def called(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        # Nothing here draws random numbers, and their state on a GPU is not to be had without waiting for it.
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **named)

    return called


def _keeping_products(forward: Callable) -> Callable:
    def called(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts, **named)

    return called


def _contexts() -> tuple:
    """Of forward and of its second run: a function of the module, because torch.compile takes no other."""
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    kept = operation in PRODUCTS or any(part in str(operation) for part in ATTENTION)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
