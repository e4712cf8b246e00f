"""metrics.jsonl: the record of a run, one JSON object a line."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path


def is_detail(name: str) -> bool:
    """Is the metric recorded, but not shown in tables and on log lines: how sure an accuracy is, and validation by source?

    >>> [is_detail(name) for name in ("eval/arc_acc", "eval/arc_stderr", "val/loss", "val/loss/gsm8k", "eval/gsm8k_ended")]
    [False, True, False, True, True]
    """
    return name.endswith(("_stderr", "_n", "_bpb", "_ended")) or (name.startswith(("val/", "test/")) and name.count("/") > 1)


def read_metrics(path: Path) -> list[dict]:
    """The complete lines of a metrics.jsonl, in order; [] where there is no file. A line cut off by a crash is left out."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return [row for line in lines if (row := parse_row(line)) is not None]


def parse_row(line: str) -> dict | None:
    """A line of a metrics.jsonl; None where it is none."""
    try:
        row = json.loads(line, parse_constant=lambda word: None)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def now_row(step: int, metrics: dict[str, float]) -> dict[str, float | None]:
    """A line of a metrics.jsonl. nan and inf become null: JSON has neither."""
    return {"step": step, "time": round(time.time(), 3), **{name: _finite(value) for name, value in metrics.items()}}


def _finite(value: float) -> float | None:
    value = value if isinstance(value, int) else float(value)
    return value if math.isfinite(value) else None


def write_metrics(path: Path, rows: Iterable[dict]) -> None:
    """Replace the file atomically: a crash leaves the old file or the new one, never half of one."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
