"""What depends on the machine: device, number format, compilation, peak FLOP/s, memory."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from chattrain.config.words import Device, DType
from chattrain.errors import UserError

log = logging.getLogger("chattrain")

# Peak FLOP/s of dense bf16 matrix products with fp32 accumulation, by torch's name of the device. From the vendors' data sheets,
# without sparsity. Full names, because other devices have the same prefix: H100 NVL, RTX 4090 Laptop GPU, MIG slices.
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
CUBLAS_VARIABLE, CUBLAS_DETERMINISTIC = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")  # values of which torch needs one
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # options of mallopt(3), in bytes

_cublas_is_deterministic = False  # has this process begun to use CUDA under the variable?


def pick_device(setting: Device, local_rank: int = 0) -> torch.device:
    """The device of train.device; auto takes CUDA, else MPS, else the CPU. Raises UserError if torch does not find it."""
    available = {Device.cuda: torch.cuda.is_available(), Device.mps: torch.backends.mps.is_available(), Device.cpu: True}
    if setting == Device.auto:
        setting = next(device for device, is_available in available.items() if is_available)
    if not available[setting]:
        raise UserError(f"train.device={setting.name}, but torch finds no such device here; use train.device=auto")
    return torch.device("cuda", local_rank) if setting == Device.cuda else torch.device(setting.name)


def use_bf16(setting: DType, device: torch.device) -> bool:
    """Whether matrix products are computed in bf16, by train.dtype; auto takes bf16 if the device supports it natively."""
    if setting != DType.auto:
        return setting == DType.bf16
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def autocast(bf16: bool, device: torch.device) -> AbstractContextManager:
    """The context that a run computes in: matrix products in bf16, or everything in fp32.

    Also turns TF32 off for the whole process, so that fp32 matrix products do not round their inputs to 10 bits.
    """
    torch.set_float32_matmul_precision("highest")
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def choose_attention_kernels(device: torch.device, varying_shapes: bool) -> None:
    """On CUDA, use cuDNN's attention where all batches have one shape, and never where shapes vary; for the whole process.

    cuDNN plans anew for each shape that it meets: sft of a 0.6B model on rows of 130 to 450 tokens ran at 4,000 to 6,000 tokens/s
    with it and at 5,800 to 10,100 without, on an H100.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(not varying_shapes)


@contextmanager
def varying_shapes(device: torch.device) -> Iterator[None]:
    """Passes of many shapes, whatever the batches of the run have: see `choose_attention_kernels`."""
    before = torch.backends.cuda.cudnn_sdp_enabled() if device.type == "cuda" else None
    choose_attention_kernels(device, varying_shapes=True)
    try:
        yield
    finally:
        if before is not None:
            torch.backends.cuda.enable_cudnn_sdp(before)


@contextmanager
def deterministic(on: bool, setting: Device) -> Iterator[None]:
    """train.deterministic: only kernels that give the same bits each time; torch raises where it has none. The process's settings
    are as before at the end.

    On CUDA, cuBLAS needs a variable of the environment from before the first use of the device. Raises UserError where that has
    passed without it.
    """
    if not on:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    with _cublas_workspace(setting):
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


@contextmanager
def _cublas_workspace(setting: Device) -> Iterator[None]:
    """The environment that makes cuBLAS deterministic, where the run may use CUDA and the user has not set it."""
    global _cublas_is_deterministic
    given = os.environ.get(CUBLAS_VARIABLE)
    may_use_cuda = setting in (Device.auto, Device.cuda) and torch.cuda.is_available()
    if not may_use_cuda or given in CUBLAS_DETERMINISTIC:
        yield
        return
    if torch.cuda.is_initialized() and not _cublas_is_deterministic:
        raise UserError(
            f"train.deterministic=true, but this process has used CUDA already, without {CUBLAS_VARIABLE}; start it with "
            f"{CUBLAS_VARIABLE}={CUBLAS_DETERMINISTIC[0]} in its environment"
        )
    _cublas_is_deterministic = True
    os.environ[CUBLAS_VARIABLE] = CUBLAS_DETERMINISTIC[0]
    try:
        yield
    finally:
        if given is None:
            del os.environ[CUBLAS_VARIABLE]
        else:
            os.environ[CUBLAS_VARIABLE] = given


def keep_freed_memory(device: torch.device) -> None:
    """On a Linux CPU, let glibc keep the memory of freed tensors. By default it returns large blocks to the kernel, and the next
    step waits for new, zeroed pages: 4 % to a third of a step of d6. Peak memory grows by 5 %. No effect on other devices."""
    if device.type == "cpu" and sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, size in ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, (1 << 31) - 1)):
            libc.mallopt(option, size)


def busy_cores(device: torch.device) -> str | None:
    """What slows a run down on a CPU whose cores other programs use; None where they are free, or it has one thread.

    The threads of an operation wait for each other at its end, so it lasts as long as the last of them waits for a core. Load is
    of the last minute and of all programs, this one among them: 1.5 a core is more than a run makes alone.
    """
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or not hasattr(os, "getloadavg") or (load := os.getloadavg()[0]) < 1.5 * cores:
        return None
    return (
        f"other programs use the cores (load {load:.1f} on {cores}), and {threads} threads that wait for each other may be many "
        "times slower then: OMP_NUM_THREADS=1 in front of the command gives the run one"
    )


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile can run."""
    return obstacle_to_compiling(device) is None


def obstacle_to_compiling(device: torch.device) -> str | None:
    """Why torch.compile cannot run; None: it can. It needs a C++ compiler on a CPU and a C compiler on CUDA."""
    if device.type == "mps":
        return "it is not used on mps"
    compilers = {"cpu": ("g++", "c++", "clang++"), "cuda": ("gcc", "cc", "clang")}
    found = any(shutil.which(name) for name in compilers.get(device.type, ()))
    return None if found else "no C and C++ compiler is installed"


def allow_many_shapes() -> None:
    """Let torch.compile keep an entry for each shape: those of the jobs of a sweep in one process add up."""
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of dense bf16 matrix products; None for an unknown GPU and for other devices, whose MFU is then n/a."""
    if device.type != "cuda":
        return None
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device))


def meters(device: torch.device) -> Callable[[], dict[str, float]]:
    """A function that returns two metrics: train/peak_memory_gib (see `peak_memory`) and train/compilations, the number of graphs
    that torch.compile has compiled since its last call. The latter is 0 once all shapes have occurred."""
    peak, num_graphs = peak_memory(device), _num_compiled_graphs()

    def read() -> dict[str, float]:
        nonlocal num_graphs
        before, num_graphs = num_graphs, _num_compiled_graphs()
        return {"train/peak_memory_gib": peak(), "train/compilations": num_graphs - before}

    return read


def _num_compiled_graphs() -> int:
    dynamo = sys.modules.get("torch._dynamo.utils")  # importing it takes seconds; a run that compiles has imported it already
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def peak_memory(device: torch.device) -> Callable[[], float]:
    """A function that returns peak memory in GiB. On CUDA: of the tensors on the device, since this call. Elsewhere: resident
    memory of the process, since its start. Reading it does not synchronize with the device."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device) / GIB
    return _peak_resident_gib


def _peak_resident_gib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss, see getrusage(2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
