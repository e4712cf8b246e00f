"""Our own model: d20 in bf16 with a cold and a warm cache of compiled kernels, in fp8, and what the plan expects of it."""

from __future__ import annotations

import json
from importlib.util import find_spec

from benchmarks import gpu_kernels
from benchmarks.gpu_check.context import Context, Skipped, benchmark_gpu, own_model, own_shape, python


def own(context: Context) -> None:
    shape = own_shape(context)
    cold = benchmark_gpu(context, "cold", *shape, "--steps", "0", env=cache(context))
    context.add("start_to_first_step_cold", cold["start_to_first_step_s"])
    context.add("first_step_cold", cold["first_step_s"])
    steps = "2" if context.tiny else "5"
    warm = benchmark_gpu(context, "warm", *shape, "--steps", steps, "--profile", env=cache(context))
    listed = [gpu_kernels.Kernel(**kernel) for kernel in warm.pop("kernels")]
    context.add("tokens_per_second", warm["tokens_per_second"])
    if warm["mfu"] is not None:
        context.add("mfu", warm["mfu"])
    context.add("peak_memory", warm["peak_memory_gib"])
    context.add("start_to_first_step_warm", warm["start_to_first_step_s"])
    context.add("first_step_warm", warm["first_step_s"])
    context.add("optimizer", 1e3 * warm["optimizer_s"])
    context.details["kernels"] = [kernel._asdict() for kernel in listed[:200]]
    context.details["text"] = gpu_kernels.show(listed)
    kinds = gpu_kernels.by_kind(listed)
    for kind, ms in kinds.items():
        context.add(f"kernels/{kind}", ms / sum(kinds.values()))


def cache(context: Context) -> dict[str, str]:
    """Where d20's compiled kernels are kept: empty when `own` begins."""
    folder = context.folder("compiled-own")
    return {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}


def fp8(context: Context) -> None:
    if context.tiny:
        raise Skipped("fp8 needs a GPU")
    if find_spec("torchao") is None:
        raise Skipped("torchao is not installed")
    found = benchmark_gpu(context, "fp8", *own_shape(context), "--steps", "5", "train.fp8=true")
    context.add("tokens_per_second", found["tokens_per_second"])
    bf16 = context.earlier("own", "tokens_per_second")
    if bf16:
        context.add("ratio_to_bf16", found["tokens_per_second"] / bf16)


def forecast(context: Context) -> None:
    """The memory and times that command=plan expects, against those of `own`; and uncompiled memory, which is measured now."""
    found = planned(context, "compiled", own_shape(context))
    context.add("memory", found["peak_gib"])
    if (peak := context.earlier("own", "peak_memory")) and not context.tiny:  # on a CPU the process's peak holds all of torch
        context.add("memory_error", found["peak_gib"] / peak - 1)
    rate, optimizer = context.earlier("own", "tokens_per_second"), context.earlier("own", "optimizer")
    if "step_s" in found and rate and optimizer:
        context.add("step_error", found["step_s"] / (found["tokens"] / rate) - 1)
        context.add("optimizer_error", found["optimizer_s"] / (optimizer / 1e3) - 1)
    eager = own_shape(context, rows=2 if context.tiny else 8, compiled=False)
    expected = planned(context, "uncompiled", eager)["peak_gib"]
    context.add("memory_uncompiled", expected)
    measured = benchmark_gpu(context, "uncompiled", *eager, "--steps", "1")["peak_memory_gib"]
    context.add("memory_uncompiled_measured", measured)
    if not context.tiny:
        context.add("memory_uncompiled_error", expected / measured - 1)


def planned(context: Context, name: str, overrides: list[str]) -> dict:
    """What the plan expects of a run with these keys; kept in the details."""
    file = context.scratch / f"forecast-{name}.json"
    python(
        "-m", "benchmarks.gpu_check.forecast", file, f"model={own_model(context)}", f"train.device={context.device}", *overrides
    )
    context.details[name] = json.loads(file.read_text(encoding="utf-8"))
    return context.details[name]
