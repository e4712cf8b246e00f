"""AdamW on every parameter (https://arxiv.org/abs/1711.05101), with groups by name: torch's, or with moments in bf16 our own,
as torch's fused step requires moments in the dtype of the weights."""

from __future__ import annotations

import torch

from chattrain.config.words import StateDType
from chattrain.optim.adamw_bf16 import AdamWBF16
from chattrain.optim.groups import parameter_groups
from chattrain.optim.muon_adamw import STATE_DTYPES
from chattrain.optim.named import NamedOptimizer
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
    groups = parameter_groups(model)
    used = [name for name, members in groups.items() if members]
    groups = strategy.partition_params(groups) if strategy else groups
    members = [
        {
            "name": name,
            "params": [p for _, p in groups[name]],
            "lr": lr * lr_scale,
            "weight_decay": weight_decay if name == "matrix" else 0.0,
            "state_dtype": STATE_DTYPES[state_dtype],
        }
        for name in used
    ]
    if state_dtype == StateDType.bf16:
        return NamedOptimizer([AdamWBF16(members, lr=lr, betas=(betas[0], betas[1]), eps=eps)], groups)
    fused = model.lm_head.get_parameter("weight").device.type in ("cuda", "cpu")
    optimizer = torch.optim.AdamW(members, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=fused)
    return NamedOptimizer([optimizer], groups)
