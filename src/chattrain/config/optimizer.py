"""The group `optimizer`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from omegaconf import MISSING

from chattrain.config.words import StateDType
from chattrain.errors import UserError


@dataclass
class OptimizerConfig:
    """An optimizer, chattrain's or one's own (own.py)."""

    _target_: str = MISSING

    def check(self) -> None:
        """Raises UserError for a value out of range."""


@dataclass
class ScaledOptimizerConfig(OptimizerConfig):
    lr_scale: float = 1.0  # multiplies the learning rate of every group; the key for sweeps

    def check(self) -> None:
        if not 0 < self.lr_scale < math.inf:
            raise UserError(f"optimizer.lr_scale={self.lr_scale} must be above 0")
        for name, value in vars(self).items():
            if isinstance(value, float | int) and not 0 <= value < math.inf:
                raise UserError(f"optimizer.{name}={value} must be 0 or more")
        betas = getattr(self, "betas", [0.0, 0.0])
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise UserError(f"optimizer.betas={betas} must be two numbers from 0 to below 1")


@dataclass
class MuonAdamWConfig(ScaledOptimizerConfig):
    matrix_lr: float = 0.02  # Muon: the matrices of the blocks
    embed_lr: float = 0.2  # AdamW, at n_embd 768; scaled by (n_embd / 768)^-0.5
    lm_head_lr: float = 0.004  # AdamW, at n_embd 768; scaled like embed_lr
    vector_lr: float | None = None  # AdamW: norms and biases of a Hugging Face model; chattrain's GPT has none
    momentum: float = 0.95  # Muon, after the warm-up
    momentum_start: float = 0.85  # Muon, at step 0; then linear to `momentum`
    momentum_warmup_steps: int = 300  # optimizer steps from momentum_start to momentum
    ns_steps: int = 5  # Newton-Schulz iterations that make an update orthogonal
    momentum_dtype: StateDType = StateDType.fp32  # in which Muon's momentum is stored; AdamW's moments are always fp32
    betas: list[float] = field(default_factory=lambda: [0.8, 0.95])  # AdamW: decay of the averages of gradients and their squares
    eps: float = 1e-10  # AdamW: added to the root of the squares' average
    weight_decay: float = 0.0  # of the AdamW groups except vectors


@dataclass
class AdamWConfig(ScaledOptimizerConfig):
    lr: float = 1e-3  # of all parameters, times lr_scale and the schedule
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # decay of the averages of gradients and of their squares
    eps: float = 1e-8  # added to the root of the squares' average
    weight_decay: float = 0.0  # matrices only
    state_dtype: StateDType = StateDType.fp32  # in which the two moments are stored
