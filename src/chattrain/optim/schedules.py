"""Learning-rate factors as pure functions of the step and the known number of steps.

`step` counts from 0. Step s of n has the factor at progress s / n, so that a decay would end just after the last step: no step
is wasted on a learning rate of 0.
"""

from __future__ import annotations

import math


def constant_then_linear(
    step: int,
    num_steps: int,
    init_lr_frac: float = 1.0,
    decay_ratio: float = 0.2,
    min_lr_factor: float = 0.0,
    warmup_steps: int = 0,
) -> float:
    """1, then linear to min_lr_factor over the last decay_ratio (0 to 1) of the steps; times init_lr_frac and the warm-up.

    >>> [round(constant_then_linear(s, 10, decay_ratio=0.4), 2) for s in (0, 6, 7, 9)]
    [1.0, 1.0, 0.75, 0.25]
    """
    remaining = min(1.0, (num_steps - step) / (decay_ratio * num_steps))
    return init_lr_frac * _warmup(step, warmup_steps) * _interpolate(min_lr_factor, remaining)


def linear(step: int, num_steps: int, init_lr_frac: float = 1.0, min_lr_factor: float = 0.0, warmup_steps: int = 0) -> float:
    """Linear from 1 at the first step to min_lr_factor; times init_lr_frac and the warm-up.

    >>> [linear(s, 4) for s in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    return init_lr_frac * _warmup(step, warmup_steps) * _interpolate(min_lr_factor, 1 - step / num_steps)


def cosine(step: int, num_steps: int, init_lr_frac: float = 1.0, min_lr_factor: float = 0.0, warmup_steps: int = 0) -> float:
    """Half a cosine from 1 to min_lr_factor (https://arxiv.org/abs/1608.03983), after the warm-up.

    >>> [round(cosine(s, 4), 3) for s in range(4)]
    [1.0, 0.854, 0.5, 0.146]
    """
    progress = max(0, step - warmup_steps) / max(1, num_steps - warmup_steps)
    remaining = (1 + math.cos(math.pi * progress)) / 2
    return init_lr_frac * _warmup(step, warmup_steps) * _interpolate(min_lr_factor, remaining)


def wsd(
    step: int,
    num_steps: int,
    init_lr_frac: float = 1.0,
    decay_ratio: float = 0.2,
    min_lr_factor: float = 0.0,
    warmup_steps: int = 0,
) -> float:
    """Warm-up, stable phase, decay by 1 - sqrt(progress of the decay) over the last decay_ratio of the steps (https://arxiv.org/abs/2405.18392).

    >>> [round(wsd(s, 10, decay_ratio=0.4, warmup_steps=2), 2) for s in (0, 1, 5, 6, 7, 9)]
    [0.5, 1.0, 1.0, 1.0, 0.5, 0.13]
    """
    decayed = max(0.0, 1 - (num_steps - step) / (decay_ratio * num_steps))
    return init_lr_frac * _warmup(step, warmup_steps) * _interpolate(min_lr_factor, 1 - math.sqrt(decayed))


def _warmup(step: int, warmup_steps: int) -> float:
    """Linear to 1 over the first warmup_steps steps."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def _interpolate(low: float, weight: float) -> float:
    """From low at weight 0 to 1 at weight 1."""
    return low + (1 - low) * weight
