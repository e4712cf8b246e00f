"""AdamW on every parameter (https://arxiv.org/abs/1711.05101), with groups by name: torch's, or with moments in bf16 our own,
as torch's fused step requires moments in the dtype of the weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from chattrain.config.words import StateDType
from chattrain.optim.adamw_bf16 import AdamWBF16
from chattrain.optim.named import FUSED, NamedOptimizer, over_groups
from chattrain.optim.partition import Partition
from chattrain.optim.trainable import TrainableModel


def build(
    model: TrainableModel,
    strategy: Partition | None = None,
    *,
    lr: float,
    lr_scale: float,
    betas: list[float],
    eps: float,
    weight_decay: float,
    state_dtype: StateDType = StateDType.fp32,
) -> NamedOptimizer:
    """One learning rate for all groups, weight decay on matrices only; moments in `state_dtype`. `strategy` None: this process
    steps all parameters."""
    make: Callable[..., torch.optim.Optimizer] = AdamWBF16
    if state_dtype == StateDType.fp32:
        make = partial(torch.optim.AdamW, fused=model.lm_head.get_parameter("weight").device.type in FUSED)
    return over_groups(make, model, strategy, lr * lr_scale, weight_decay, betas=(betas[0], betas[1]), eps=eps)
