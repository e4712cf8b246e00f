"""What the machine can do: device, number format, compilation, peak speed, memory."""

from __future__ import annotations

import ctypes
import logging
import platform
import resource
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from chattrain.config.words import Device, DType
from chattrain.errors import UserError

log = logging.getLogger("chattrain")

# Dense bf16 matmul peak with fp32 sums, in FLOP/s, by what torch calls the device: vendors' data sheets, without sparsity. Whole
# names, as others begin alike: an "H100 NVL" is no "H100", an "RTX 4090 Laptop GPU" no "RTX 4090", a MIG slice no whole GPU.
PEAK_FLOPS = {
    f"NVIDIA {name}": peak
    for names, peak in [
        (["B200"], 2250e12),
        (["H100 80GB HBM3", "H200", "GH200 480GB"], 989e12),
        (["H100 NVL", "H200 NVL"], 835e12),
        (["H100 PCIe"], 756e12),
        (["A100-SXM4-40GB", "A100-SXM4-80GB", "A100-PCIE-40GB", "A100 80GB PCIe"], 312e12),
        (["L40S"], 362e12),
        (["GeForce RTX 4090"], 165e12),
        (["GeForce RTX 3090"], 71e12),
    ]
    for name in names
}
GIB = 1 << 30
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # options of mallopt(3), in bytes


def pick_device(asked: Device, local_rank: int = 0) -> torch.device:
    """The device asked for; auto takes CUDA, then MPS, then the CPU. Raises UserError where it is not there."""
    available = {Device.cuda: torch.cuda.is_available(), Device.mps: torch.backends.mps.is_available(), Device.cpu: True}
    if asked == Device.auto:
        asked = next(device for device, there in available.items() if there)
    if not available[asked]:
        raise UserError(f"train.device={asked.name}, but torch finds no such device here; use train.device=auto")
    return torch.device("cuda", local_rank) if asked == Device.cuda else torch.device(asked.name)


def use_bf16(asked: DType, device: torch.device) -> bool:
    """auto takes bf16 where the device computes it natively."""
    if asked != DType.auto:
        return asked == DType.bf16
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def autocast(bf16: bool, device: torch.device) -> AbstractContextManager:
    """The number format of a run: matrix products in bf16, or all in fp32.

    What is left in fp32 is exact: TF32, which rounds factors to 10 bits, is off here, whatever was set before.
    """
    torch.set_float32_matmul_precision("highest")
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def keep_freed_memory(device: torch.device) -> None:
    """Let glibc keep the memory of tensors that a step on a CPU freed. By default each large one goes back to the kernel, and the
    next step waits for fresh, zeroed pages: 4 % to a third of a step of d6. The peak grows by 5 %. Elsewhere nothing happens."""
    if device.type == "cpu" and sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, size in ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, (1 << 31) - 1)):
            libc.mallopt(option, size)


def can_compile(device: torch.device) -> bool:
    """torch.compile builds code with the host's compiler: C++ for a CPU, C for what starts CUDA kernels. Not on MPS."""
    compilers = {"cpu": ("g++", "c++", "clang++"), "cuda": ("gcc", "cc", "clang")}
    return any(shutil.which(name) for name in compilers.get(device.type, ()))


def should_compile(asked: bool, device: torch.device) -> bool:
    """Is the model to be compiled? With a warning where that was asked for in vain; readies torch.compile otherwise."""
    if asked and not can_compile(device):
        reason = "it is not used on mps" if device.type == "mps" else "no C and C++ compiler is installed"
        log.warning("train.compile=true, but %s: running without torch.compile, slower", reason)
        return False
    if not asked:
        return False
    # One entry a shape, for all jobs of a sweep together.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
    return True


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a known GPU in FLOP/s; None where it is not known, so that MFU reads n/a."""
    if device.type != "cuda":
        return None
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device))


def meters(device: torch.device) -> Callable[[], dict[str, float]]:
    """A function that gives train/peak_memory_gib, see `peak_memory`, and train/compilations: the graphs that torch.compile has
    made since it was last called. 0 once all shapes have been seen."""
    peak, compiled = peak_memory(device), _compiled_graphs()

    def read() -> dict[str, float]:
        nonlocal compiled
        before, compiled = compiled, _compiled_graphs()
        return {"train/peak_memory_gib": peak(), "train/compilations": compiled - before}

    return read


def _compiled_graphs() -> int:
    dynamo = sys.modules.get("torch._dynamo.utils")  # takes seconds to import, and a run that compiles has done so
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def peak_memory(device: torch.device) -> Callable[[], float]:
    """A function that gives the peak so far in GiB: on CUDA of what tensors take on the device, from this call on; elsewhere
    of what the process has had resident in all its life. It reads counters of the host and waits for no device."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device) / GIB
    return _peak_resident_gib


def _peak_resident_gib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss, see getrusage(2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
