"""The group `schedule`."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from chattrain.errors import UserError


@dataclass
class ScheduleConfig:
    """A schedule, chattrain's or one's own (own.py)."""

    _target_: str = MISSING
    _partial_: bool = True
    init_lr_frac: float = 1.0  # multiplies the whole schedule

    @property
    def outer_factor(self) -> float:
        """What multiplies the schedule besides the factor that it returns."""
        return 1.0

    def check(self) -> None:
        """Raises UserError for a value out of range."""


@dataclass
class ShapedScheduleConfig(ScheduleConfig):
    min_lr_factor: float = 0.0  # factor at the end of the decay, relative to its start; 0: down to nothing
    warmup_steps: int = 0  # optimizer steps of linear warm-up

    def check(self) -> None:
        if self.warmup_steps < 0 or self.init_lr_frac <= 0 or not 0 <= self.min_lr_factor <= 1:
            raise UserError(
                f"schedule.warmup_steps={self.warmup_steps} must be >= 0, init_lr_frac={self.init_lr_frac} "
                f"> 0 and min_lr_factor={self.min_lr_factor} between 0 and 1"
            )


@dataclass
class DecayScheduleConfig(ShapedScheduleConfig):
    decay_ratio: float = 0.2  # fraction of the steps, at the end, in which the rate decays

    def check(self) -> None:
        super().check()
        if not 0 < self.decay_ratio <= 1:
            raise UserError(f"schedule.decay_ratio={self.decay_ratio} must be above 0 and at most 1")
