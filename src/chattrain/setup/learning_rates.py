"""The real learning rates of a run: what the optimizer's keys, lr_scale and the schedule with init_lr_frac come to."""

from __future__ import annotations

import logging
from collections.abc import Callable

from chattrain.config import Config
from chattrain.config.compose import key_of
from chattrain.config.instantiate import instantiate_config
from chattrain.optim.named import NamedOptimizer
from chattrain.setup.job import current_job

log = logging.getLogger("chattrain")

SAMPLES = 1_000  # steps at which the schedule is read, at most


def build_lr_factor(cfg: Config, num_steps: int) -> Callable[[int], float]:
    """What the learning rates are multiplied by at a step."""
    schedule = instantiate_config(cfg.schedule)
    return lambda step: schedule(step, num_steps) * cfg.schedule.outer_factor


def peak_rates(optimizer: NamedOptimizer, lr_factor: Callable[[int], float], num_steps: int) -> dict[str, float]:
    """The highest learning rate that each parameter group gets in the run, by its name."""
    steps = range(0, num_steps, max(1, num_steps // SAMPLES))
    peak = max(lr_factor(step) for step in steps) if num_steps else 0.0
    return {group["name"]: float(group["base_lr"]) * peak for group in optimizer.param_groups}


def report_rates(cfg: Config, rates: dict[str, float]) -> None:
    """Log the peak rates and what they are made of. Warns where init_lr_frac shrinks a rate that was typed."""
    shown = ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items())
    if len(set(rates.values())) == 1:
        shown = f"{next(iter(rates.values())):.3g} for all parameters"
    scale, frac = getattr(cfg.optimizer, "lr_scale", 1.0), cfg.schedule.init_lr_frac
    log.info("learning rates at their peak: %s (optimizer.* x lr_scale %g x init_lr_frac %g)", shown, scale, frac)
    given = {key_of(override): override for override in current_job().overrides}
    typed = [
        text for key, text in given.items() if key.startswith("optimizer.") and (key.endswith("_lr") or key == "optimizer.lr")
    ]
    if typed and frac != 1 and "schedule.init_lr_frac" not in given:
        log.warning(
            "%s is multiplied by schedule.init_lr_frac=%g. For the learning rate that you typed, add schedule.init_lr_frac=1",
            " and ".join(typed),
            frac,
        )
