"""All cases: a table on stdout, and benchmarks/results.json with the machine they ran on."""

from __future__ import annotations

import importlib
import json
import os
import platform
from pathlib import Path

import torch

from benchmarks.timing import show

CASES = ("tokenise", "optimizer", "mid", "sft", "multiple_choice", "generation")


def main() -> None:
    rows = [r for case in CASES for r in importlib.import_module(f"benchmarks.{case}").measure()]
    show(rows)
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cores": os.cpu_count(),
               "processor": platform.processor() or platform.machine(),
               "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}
    file = Path(__file__).with_name("results.json")
    file.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    print(f"\nwritten to {file}")


if __name__ == "__main__":
    main()
