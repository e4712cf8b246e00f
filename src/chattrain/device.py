"""What the machine can do: device, number format, compilation, peak speed."""

from __future__ import annotations

import logging
import shutil
from contextlib import AbstractContextManager, nullcontext

import torch

from chattrain.config import Device, DType
from chattrain.errors import UserError

log = logging.getLogger("chattrain")

# Dense bf16 matmul peak in FLOP/s by a part of the device's name (vendors' data sheets, without sparsity).
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
              "RTX 4090": 165e12, "RTX 3090": 71e12}


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
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def can_compile(device: torch.device) -> bool:
    """torch.compile builds code with the host's compiler: C++ for a CPU, C for what starts CUDA kernels. Not on MPS."""
    compilers = {"cpu": ("g++", "c++", "clang++"), "cuda": ("gcc", "cc", "clang")}
    return any(shutil.which(name) for name in compilers.get(device.type, ()))


def compiles(asked: bool, device: torch.device) -> bool:
    """Is the model to be compiled? With a warning where that was asked for in vain; readies torch.compile otherwise."""
    if asked and not can_compile(device):
        reason = "it is not used on mps" if device.type == "mps" else "no C and C++ compiler is installed"
        log.warning("train.compile=true, but %s: running without torch.compile, slower", reason)
        return False
    if not asked:
        return False
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)  # one entry a row width
    return True


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a known GPU in FLOP/s; None where it is not known, so that MFU reads n/a."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
