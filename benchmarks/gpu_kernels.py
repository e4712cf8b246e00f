"""What a training step spends its time on: the kernels of one profiled step, by kind."""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

OPTIMIZER = "optimizer"  # the kind of every kernel that the optimizer launches, whatever its name
# The first pattern found in a kernel's name gives its kind. FlashAttention's names hold `cutlass` too, so attention comes first.
KINDS = [
    ("attention", r"flash|fmha|sdpa|attention|softmax_warp|softmax_forward|softmax_backward"),
    ("copies", r"memcpy|memset|direct_copy|copy_kernel|copy_device|catarray|fused__to_copy_\d+$|aten::(copy_|cat|clone|fill_)$"),
    ("products", r"gemm|nvjet|cutlass|cublas|xmma|splitk|wgmma|triton_(tem|mm)|scaled_mm|aten::(mm|addmm|bmm|baddbmm|matmul)$"),
    ("loss", r"tanh|log_?softmax|logsumexp|nll|cross_entropy"),
    ("norm, rotary, activation", r"rms_?norm|rsqrt|layer_norm|rotary|cos|sin|_cat|relu|silu|mul|pow"),
]
TOP = 25  # kernels listed one by one


class Kernel(NamedTuple):
    name: str
    ms: float  # in all
    calls: int
    kind: str


def kind_of(name: str) -> str:
    """The kind of a kernel, or of an operation on a CPU, by its name.

    >>> kind_of("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_NNT"), kind_of("void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>")
    ('products', 'attention')
    >>> kind_of("triton_red_fused__to_copy_div_exp_mul_sub_tanh_3"), kind_of("triton_per_fused__to_copy_mean_mul_pow_rsqrt_7")
    ('loss', 'norm, rotary, activation')
    >>> kind_of("triton_poi_fused__to_copy_12"), kind_of("Memcpy DtoD (Device -> Device)"), kind_of("DeviceRadixSortKernel")
    ('copies', 'copies', 'other')
    """
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def profiled(work: Callable[[], object], cuda: bool) -> list[Kernel]:
    """The kernels of work(), the longest first. Kernels launched within `in_optimizer` are the optimizer's.

    On a CPU: torch's operations with the time that each takes itself; compiled functions are one operation.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        work()
        if cuda:
            torch.cuda.synchronize()
    if not cuda:
        rows = [(e.key, e.self_cpu_time_total / 1e3, e.count) for e in profiler.key_averages()]
        return _sorted(Kernel(name, ms, calls, OPTIMIZER if name == OPTIMIZER else kind_of(name)) for name, ms, calls in rows)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return kernels_of_trace(json.loads(file.read_text(encoding="utf-8", errors="replace"))["traceEvents"])


def in_optimizer(step: Callable) -> Callable:
    """The function `step`, under the name by which the profile finds what it launches."""

    def call(*arguments):
        with record_function(OPTIMIZER):
            return step(*arguments)

    return call


def kernels_of_trace(events: list[dict]) -> list[Kernel]:
    """The kernels of a Chrome trace, summed by name. A kernel is the optimizer's if its launch lies within an `optimizer` span.

    >>> span = {"cat": "user_annotation", "name": "optimizer", "ts": 10, "dur": 5}
    >>> launches = [{"cat": "cuda_runtime", "ts": ts, "args": {"correlation": ts}} for ts in (1, 2, 11)]
    >>> kernels = [{"cat": "kernel", "name": "gemm", "dur": 500, "args": {"correlation": ts}} for ts in (1, 2, 11)]
    >>> [tuple(kernel) for kernel in kernels_of_trace([span, *launches, *kernels])]
    [('gemm', 1.0, 2, 'products'), ('gemm', 0.5, 1, 'optimizer')]
    """
    spans = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "user_annotation" and e["name"] == OPTIMIZER]
    launched = {
        e["args"]["correlation"]: e["ts"]
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            at = launched.get(event["args"].get("correlation"))
            ours = at is not None and any(start <= at < stop for start, stop in spans)
            total = sums[event["name"], OPTIMIZER if ours else kind_of(event["name"])]
            total[0] += event["dur"] / 1e3
            total[1] += 1
    return _sorted(Kernel(name, ms, int(calls), kind) for (name, kind), (ms, calls) in sums.items())


def by_kind(kernels: list[Kernel]) -> dict[str, float]:
    """Milliseconds of each kind, the most first.

    >>> by_kind([Kernel("a", 1.0, 1, "copies"), Kernel("b", 2.0, 1, "loss"), Kernel("c", 2.5, 1, "copies")])
    {'copies': 3.5, 'loss': 2.0}
    """
    sums: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        sums[kernel.kind] += kernel.ms
    return dict(sorted(sums.items(), key=lambda pair: -pair[1]))


def show(kernels: list[Kernel]) -> str:
    """Two tables as text: the kinds with their shares, and the longest kernels."""
    kinds = by_kind(kernels)
    total = sum(kinds.values()) or 1.0
    lines = [f"{'kind':26s} {'ms':>10s} {'share':>7s}"]
    lines += [f"{kind:26s} {ms:10,.1f} {ms / total:7.1%}" for kind, ms in kinds.items()]
    lines += ["", f"{'ms':>10s} {'calls':>7s}  {'kind':26s} kernel"]
    lines += [f"{k.ms:10,.2f} {k.calls:7,}  {k.kind:26s} {k.name[:110]}" for k in kernels[:TOP]]
    return "\n".join(lines)


def _sorted(kernels) -> list[Kernel]:
    return sorted(kernels, key=lambda kernel: -kernel.ms)
