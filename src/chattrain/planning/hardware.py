"""The devices that a run can be planned for: their memory, and how fast they compute and communicate."""

from __future__ import annotations

from dataclasses import dataclass, replace

from chattrain.config.plan import PlanConfig
from chattrain.device import GIB, PEAK_FLOPS
from chattrain.errors import UserError

GPUS_PER_HOST = 8  # as in the vendors' own servers
# Memory that tensors cannot use: the CUDA context with the buffers of cuBLAS and NCCL, in bytes, and the share that fragments of
# the caching allocator take. Both are judgements, not measurements.
CONTEXT = 1 * GIB
FRAGMENTED = 0.05
ASSUMED_MFU = 0.4  # of devices without a measurement


@dataclass(frozen=True)
class Measured:
    """Model FLOPs utilization of forward and backward, without the optimizer, on one device; and what was run for it."""

    mfu: float
    run: str


# d20 at 32 x 2,048 tokens a pass, 4 passes a step: 127,971 tokens/s with torch 2.11, which is 45.2 % with the optimizer's 34 of
# 2,048 ms. nanochat of December 2025 reached 52.8 % on the same device at the same shapes.
MEASURED = {"h100": Measured(0.46, "d20, rows of 2,048 tokens, bf16, compiled")}


@dataclass(frozen=True)
class Hardware:
    """One device. Speeds are the vendor's figures, a second; of links in one direction, for each device."""

    name: str
    memory: float  # bytes in all
    bandwidth: float  # bytes a second, of its own memory
    link: float  # bytes a second to devices of the same host
    network: float  # bytes a second to devices of other hosts
    bf16: float  # FLOPs a second, dense matrix products with fp32 sums
    fp32: float  # FLOPs a second, without TF32
    measured: Measured | None = None

    @property
    def mfu(self) -> float:
        """The utilization to plan with: the measured one, else ASSUMED_MFU."""
        return self.measured.mfu if self.measured else ASSUMED_MFU

    @property
    def usable(self) -> float:
        """Bytes that tensors can use."""
        return max(0.0, self.memory * (1 - FRAGMENTED) - CONTEXT)

    def between(self, world_size: int) -> float:
        """Bytes a second that each of world_size devices can send while all of them send: the speed of the slowest link."""
        return self.link if world_size <= GPUS_PER_HOST else min(self.link, self.network)


def _device(name: str, memory_gib: float, bandwidth: float, link: float, network: float, known_as: str, fp32: float) -> Hardware:
    return Hardware(name, memory_gib * GIB, bandwidth, link, network, PEAK_FLOPS[known_as], fp32, MEASURED.get(name))


# Memory: the total capacity that torch's out-of-memory messages name, a little below the data sheet's. bf16 peaks: device.py.
DEVICES = {
    device.name: device
    for device in [
        # NVIDIA H100 data sheet (SXM5): 3.35 TB/s, NVLink 900 GB/s in both directions, 67 TFLOPS fp32. DGX H100 user guide: eight
        # ConnectX-7 of 400 Gb/s, one a GPU.
        _device("h100", 79.1, 3.35e12, 450e9, 50e9, "NVIDIA H100 80GB HBM3", 67e12),
        # NVIDIA H200 data sheet (SXM): 141 GB at 4.8 TB/s, else as the H100. DGX H200 user guide: eight ConnectX-7 of 400 Gb/s.
        _device("h200", 139.8, 4.8e12, 450e9, 50e9, "NVIDIA H200", 67e12),
        # NVIDIA A100 80GB data sheet (SXM): 2,039 GB/s, NVLink 600 GB/s in both directions, 19.5 TFLOPS fp32. DGX A100
        # user guide: eight ConnectX-6 of 200 Gb/s.
        _device("a100", 79.2, 2.039e12, 300e9, 25e9, "NVIDIA A100-SXM4-80GB", 19.5e12),
        # NVIDIA Ada GPU architecture white paper, appendix A: 1,008 GB/s, 82.6 TFLOPS fp32; no NVLink, PCI Express 4.0 x16
        # (32 GB/s in one direction). Network: there is no standard; we assume one card of 100 Gb/s for the eight GPUs of a host.
        _device("4090", 23.6, 1.008e12, 32e9, 12.5e9 / GPUS_PER_HOST, "NVIDIA GeForce RTX 4090", 82.6e12),
        # NVIDIA Ampere GA102 white paper, appendix A: 936 GB/s, 35.6 TFLOPS fp32; PCI Express 4.0 x16 (NVLink joins pairs only).
        # Network as above.
        _device("3090", 23.7, 0.936e12, 32e9, 12.5e9 / GPUS_PER_HOST, "NVIDIA GeForce RTX 3090", 35.6e12),
    ]
}
REQUIRED = ("memory_gib", "bandwidth_gb_s", "peak_tflops")  # of a custom device


def hardware_of(plan: PlanConfig) -> Hardware:
    """The device of plan.device, with plan.memory_gib and similar keys in place of the table's values.

    A custom device has the link and network of a 4090 unless the keys say otherwise.

    Raises UserError if a custom device lacks memory, bandwidth or peak.
    """
    name = plan.device.name
    if name == "custom":
        missing = [key for key in REQUIRED if getattr(plan, key) is None]
        if missing:
            raise UserError(
                f"plan.device=custom, but plan.{missing[0]} is not set; give {', '.join(f'plan.{key}' for key in REQUIRED)}"
            )
        known = replace(DEVICES["4090"], name="custom", measured=None)
    else:
        known = DEVICES[name]
    changes = {
        "memory": (plan.memory_gib, GIB),
        "bandwidth": (plan.bandwidth_gb_s, 1e9),
        "link": (plan.link_gb_s, 1e9),
        "network": (plan.network_gb_s, 1e9),
        "bf16": (plan.peak_tflops, 1e12),
        "fp32": (plan.peak_tflops, 1e12),
    }
    return replace(known, **{field: value * unit for field, (value, unit) in changes.items() if value is not None})
