"""Activation checkpointing (https://arxiv.org/abs/1604.06174): backward recomputes the activations that forward did not save.

Losses and gradients do not change, to the bit without torch.compile: the same operations run twice on the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten._scaled_mm.default}
WITH_BIAS = {aten.addmm.default, aten.baddbmm.default}  # their first argument is what is added
ATTENTION = ("attention", "attn")  # substrings of attention operators' names, which differ between devices and masks


def recompute(blocks: Iterable[nn.Module], selective: bool) -> None:
    """Make each module save only its inputs in forward, in place; backward runs its forward again.

    selective: the outputs of attention, and of matrix products that are no wider than their input, are saved too: they take time
    and little memory. What runs twice is element-wise operations and products that widen, such as the first of an MLP. Passes
    without gradients (evaluation, generation) are unaffected.
    """
    for block in blocks:
        block.forward = (_save_products if selective else _save_inputs)(block.forward)


def _save_inputs(forward: Callable) -> Callable:
    def called(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # No operation here draws random numbers, and reading a GPU's random state would wait for the GPU.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return called


def _save_products(forward: Callable) -> Callable:
    def called(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts, **kwargs)

    return called


def _contexts() -> tuple[Any, Any]:
    """Contexts of forward and of its second run. A module-level function, as torch.compile accepts no other."""
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operation in PRODUCTS:
        right = args[2 if operation in WITH_BIAS else 1]  # (..., inputs, outputs)
        saved = right.size(-1) <= right.size(-2)
    else:
        saved = any(part in str(operation) for part in ATTENTION)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE
