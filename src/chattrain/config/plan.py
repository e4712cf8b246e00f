"""The keys `plan.*`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from chattrain.config.words import PlanDevice
from chattrain.errors import UserError


@dataclass
class PlanConfig:
    """What command=plan plans for. null takes what is known of the device; a custom one needs memory, bandwidth and peak."""

    world_size: int = 8  # devices
    device: PlanDevice = PlanDevice.h100
    memory_gib: float | None = None  # of a device
    bandwidth_gb_s: float | None = None  # of a device to its own memory
    link_gb_s: float | None = None  # of a device to others of its host, in one direction
    network_gb_s: float | None = None  # of a device to other hosts, in one direction
    peak_tflops: float | None = None  # of a device, dense matrix products in train.dtype
    mfu: float = 0.4  # share of the peak that forward and backward reach, by the model's FLOPs: an assumption
    price_per_gpu_hour: float | None = None  # in any currency; null: no cost

    def check(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int | float) and not 0 < value < math.inf:
                raise UserError(f"plan.{name}={value} must be above 0")
        if self.mfu > 1:
            raise UserError(f"plan.mfu={self.mfu} is a share of the peak: at most 1")
