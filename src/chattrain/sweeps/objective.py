"""What a job returns to the sweeper: one number, to be made small or large."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from chattrain.config.sweep import SweepConfig
from chattrain.config.words import Direction
from chattrain.errors import RunFailed
from chattrain.tracking.metrics import read_metrics


def direction_of(objective: str | None, direction: Direction) -> str:
    """`minimize` or `maximize`.

    >>> direction_of("eval/mmlu_acc", Direction.auto), direction_of("val/bpb", Direction.auto)
    ('maximize', 'minimize')
    """
    if direction != Direction.auto:
        return direction.name
    return "maximize" if objective and objective.endswith("_acc") else "minimize"


def metrics_at(summary: dict[str, Any], step: int) -> dict[str, float | None]:
    """The last value of each metric of a run up to a step: it may have gone further in an earlier launch."""
    metrics: dict[str, float | None] = {}
    for row in read_metrics(Path(summary["run_dir"]) / "metrics.jsonl"):
        if row["step"] <= step:
            metrics |= row
    return metrics


def objective_of(sweep: SweepConfig, metrics: dict[str, float | None], required: bool) -> float | None:
    """The last value of sweep.objective, or None where it was not measured.

    Raises RunFailed where it is not finite and, with `required`, where it was not measured: a sweeper that searches needs it.
    """
    if sweep.objective is None or sweep.objective not in metrics:
        if required:
            raise RunFailed(
                f"sweep.objective={sweep.objective} was not measured, and the sweeper needs it; measured were: "
                f"{', '.join(sorted(metrics)) or 'no metrics'}"
            )
        return None
    value = metrics[sweep.objective]
    if value is None or not math.isfinite(value):
        raise RunFailed(f"{sweep.objective}, the sweep's objective, is not finite")
    return float(value)
