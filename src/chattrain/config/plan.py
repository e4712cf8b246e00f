"""The keys `plan.*`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from chattrain.config.words import PlanDevice
from chattrain.errors import UserError


@dataclass
class PlanConfig:
    """The hardware that command=plan plans for. null: the known value of the device; a custom device needs memory_gib,
    bandwidth_gb_s and peak_tflops."""

    world_size: int = 8  # devices
    device: PlanDevice = PlanDevice.h100  # custom needs memory_gib, bandwidth_gb_s and peak_tflops
    memory_gib: float | None = None  # of each device; null in this and the next keys: the known value of the device
    bandwidth_gb_s: float | None = None  # between a device and its own memory
    link_gb_s: float | None = None  # between devices of a host, in one direction
    network_gb_s: float | None = None  # from each device to other hosts, in one direction
    peak_tflops: float | None = None  # of each device, for dense matrix products in train.dtype
    mfu: float | None = None  # model FLOPs utilization of forward and backward
    price_per_gpu_hour: float | None = None  # in any currency; null: no cost

    def check(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int | float) and not 0 < value < math.inf:
                raise UserError(f"plan.{name}={value} must be above 0")
        if self.mfu is not None and self.mfu > 1:
            raise UserError(f"plan.mfu={self.mfu} is a share of the peak: at most 1")
