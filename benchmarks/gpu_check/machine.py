"""The machine with its versions, the tests that need a GPU, and the quickstart."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from benchmarks.gpu_check.context import ROOT, Context, Skipped, python
from benchmarks.timing import commit

PACKAGES = ("torch", "triton", "transformers", "torchao", "flash-attn", "trl", "datasets", "mlflow", "pytest")


def versions(context: Context) -> None:
    import torch

    found: dict[str, str | float | None] = {"python": platform.python_version(), "commit": commit(), "cores": os.cpu_count()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    if context.device == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError("torch finds no CUDA device; `--device cpu` rehearses without one")
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": driver(),
        }
    context.details.update(found)
    context.details["text"] = ", ".join(f"{name} {value}" for name, value in found.items() if value is not None)


def driver() -> str | None:
    """The version of NVIDIA's driver; None where nvidia-smi does not say."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None


def tests(context: Context) -> None:
    """tests/test_gpu.py, on the device of this check."""
    if find_spec("pytest") is None:
        raise Skipped("pytest is not installed: tests/test_gpu.py has not been run")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--durations=5", "tests/test_gpu.py"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "GPU_TESTS_DEVICE": context.device}, stdout=subprocess.PIPE, text=True
    )
    print(done.stdout)
    counts = counted(done.stdout)
    context.details["lines"] = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
    context.add("passed", counts.get("passed", 0))
    context.add("skipped", counts.get("skipped", 0))
    if done.returncode:
        failed = [line.split(" - ")[0].removeprefix("FAILED tests/") for line in context.details["lines"] if "FAILED" in line]
        raise RuntimeError(", ".join(failed) or f"pytest ended with status {done.returncode}")


def counted(out: str) -> dict[str, int]:
    """The counts in pytest's last line.

    >>> counted("...\\n2 failed, 7 passed, 1 skipped in 3.21s")
    {'failed': 2, 'passed': 7, 'skipped': 1}
    """
    last = next((line for line in reversed(out.splitlines()) if re.search(r" in [\d.]+s", line)), "")
    return {word: int(count) for count, word in re.findall(r"(\d+) (\w+)", last.partition(" in ")[0])}


def quickstart(context: Context) -> None:
    """From nothing to a chat model, with empty caches. In a rehearsal only a few steps a stage."""
    root = context.folder("quickstart")
    short = ["train.max_steps=4", "eval.multiple_choice=false", "eval.max_tokens=4096", "train.compile=false"]
    begun = time.perf_counter()
    python(
        *("-m", "chattrain", "-m", "stage=base,mid,sft", "experiment=quickstart", "tracking=none"),
        f"run.root={root / 'runs'}",
        f"train.device={context.device}",
        *(short if context.tiny else []),
        env={"CHATTRAIN_CACHE": str(root / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(root / "compiled")},
        cwd=root,
    )
    seconds = time.perf_counter() - begun
    context.add("seconds", seconds)
    summaries = [json.loads(file.read_text()) for file in sorted((root / "runs").glob("*/*/summary.json"))]
    context.details["summaries"] = [
        {key: s[key] for key in ("stage", "status", "steps", "tokens_seen", "tokens_per_second", "metrics")} for s in summaries
    ]
    stepping = sum(s["tokens_seen"] / s["tokens_per_second"] for s in summaries if s["tokens_per_second"])
    context.add("share_of_training_steps", stepping / seconds)
