"""All cases: a table on stdout, and benchmarks/results.json with the machine they ran on."""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.timing import commit, show

CASES = ("tokenise", "warm_start", "loader", "optimizer", "mid", "sft", "multiple_choice", "generation")


def main() -> None:
    rows = []
    for case in CASES:
        print(f"{case} ...", file=sys.stderr)
        with ProcessPoolExecutor(
            1, mp_context=get_context("spawn")
        ) as process:  # so that a case cannot change the settings of the next one
            rows += process.submit(importlib.import_module(f"benchmarks.{case}").measure).result()
    show(rows)
    machine = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    file = Path(__file__).with_name("results.json")
    results = {
        "command": "python -m benchmarks",
        "real_data": "BENCHMARK_DATA" in os.environ,
        "commit": commit(),
        "machine": machine,
        "rows": rows,
    }
    file.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwritten to {file}")


if __name__ == "__main__":
    main()
