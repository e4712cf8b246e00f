"""AdamW on every parameter (https://arxiv.org/abs/1711.05101): torch's, with groups by name."""

from __future__ import annotations

import torch

from chattrain.optim.groups import parameter_groups
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
) -> NamedOptimizer:
    """One learning rate for all groups, weight decay on matrices only. `strategy` None: this process steps all parameters."""
    groups = parameter_groups(model)
    used = [name for name, members in groups.items() if members]
    groups = strategy.partition_params(groups) if strategy else groups
    members = [
        {
            "name": name,
            "params": [p for _, p in groups[name]],
            "lr": lr * lr_scale,
            "weight_decay": weight_decay if name == "matrix" else 0.0,
        }
        for name in used
    ]
    fused = model.lm_head.get_parameter("weight").device.type in ("cuda", "cpu")
    optimizer = torch.optim.AdamW(members, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=fused)
    return NamedOptimizer([optimizer], groups)
