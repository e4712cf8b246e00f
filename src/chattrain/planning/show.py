"""A plan as tables on the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from chattrain.config import Config
from chattrain.device import GIB
from chattrain.planning import cost
from chattrain.planning.cost import Step, Workload
from chattrain.planning.hardware import CONTEXT, FRAGMENTED

# What remains, see docs/planning.md.
MEMORY_ERROR = "peak within about 10 %"
TIME_ERROR = "within about 10 % for full rows on one device that was measured, else only the order of magnitude"

if TYPE_CHECKING:
    from rich.console import Console


def scaling_row(work: Workload, step: Step, price: float | None) -> dict[str, Any]:
    """One row of the scaling table, as facts."""
    hours = cost.hours_of(work, step)
    return {
        "world_size": step.world_size,
        "rows_per_step": step.rows,
        "device_batch_size": step.device_batch_size,
        "grad_accum_steps": step.grad_accum_steps,
        "steps": cost.steps_of(work, step),
        "seconds_per_step": step.seconds,
        "communication_seconds": step.communication_s,
        "exposed_seconds": step.exposed_s,
        "hours": hours,
        "gpu_hours": hours * step.world_size,
        "cost": None if price is None else hours * step.world_size * price,
    }


def plan(facts: dict[str, Any], step: Step, cfg: Config) -> None:
    """Print the plan."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 128, highlight=False)
    _pairs(console, f"{facts['world_size']} x {facts['device']}, {facts['strategy']}", _run(facts, step, cfg))
    _pairs(console, "memory of a rank, GiB", _memory(facts))
    _scaling(console, facts)


def _run(facts: dict[str, Any], step: Step, cfg: Config) -> dict[str, str]:
    how = "counted" if facts["supervised_exact"] else "estimated from steps spread over the run"
    suggested = facts["suggested_device_batch_size"]
    pairs = {
        "data": facts["data"],
        "parameters": f"{facts['parameters_total']:,} (" + ", ".join(f"{n} {s:,}" for n, s in facts["parameters"].items()) + ")",
        "FLOPs a token": f"{facts['flops_per_token']:.3g}, forward and backward",
        "steps": f"{facts['num_steps']:,}",
        "tokens": f"{facts['tokens']:,}",
        "supervised tokens": f"{facts['supervised_tokens']:,} ({how})",
        "bytes sent a step and rank": f"{facts['bytes_sent_per_step'] / 1e9:.3g} GB",
        "time a step": f"{facts['seconds_per_step']:.3g} s: forward and backward {step.compute_s:.3g}, "
        f"update {step.update_s:.3g}, communication {step.communication_s:.3g}, of which {step.exposed_s:.3g} not overlapped",
        "time": f"{_duration(facts['hours'])} without evaluation and checkpoints, at plan.mfu={facts['mfu']}, {facts['mfu_is']}; "
        f"{TIME_ERROR}",
    }
    if facts["cost"] is not None:
        pairs["cost"] = f"{facts['cost']:.3g} at {cfg.plan.price_per_gpu_hour} a GPU hour"
    most = facts["largest_device_batch_size"]
    tokens = facts["largest_device_batch_tokens"]  # None: rows are full
    passes, note = facts["grad_accum_steps"], ", all rows of a rank's step" if facts["all_rows_fit"] else ""
    micro_batches = f"{passes} micro-batch{'es' * (passes != 1)} a step"
    if not most:
        pairs["device_batch_size"] = "not even one row fits"
    elif tokens is not None:
        enough = ", enough for all rows of a rank's step" if facts["all_rows_fit"] else ""
        pairs["device_batch_tokens"] = f"{tokens:,} at most{enough}; with them about {micro_batches}"
    else:
        pairs["device_batch_size"] = f"{most} at most{note}; {suggested} with {micro_batches} for the configured batch"
    return pairs


def _duration(hours: float) -> str:
    """
    >>> _duration(0.0005), _duration(0.5), _duration(30.25)
    ('1.8 s', '30 min', '30.2 h')
    """
    unit, size = next((u, s) for u, s in (("h", 1.0), ("min", 60.0), ("s", 3600.0)) if hours * s >= 1 or u == "s")
    return f"{hours * size:.3g} {unit}"


def _memory(facts: dict[str, Any]) -> dict[str, str]:
    memory, usable = facts["memory"], facts["usable_bytes"]
    pairs = {f"at the peak: {name}": _gib(size) for name, size in memory["at_peak"].items()}
    pairs |= {
        "while the head runs: logits" if name == "logits" else f"kept by forward: {name}": _gib(size)
        for name, size in memory["components"].items()
    }
    pairs |= {f"peak in {phase}": _gib(size) for phase, size in memory["phases"].items()}
    fits = "fits" if facts["fits"] else "DOES NOT FIT"
    return pairs | {
        "peak": f"{_gib(memory['peak'])}: {fits} in {_gib(usable)} (the device's, less {FRAGMENTED:.0%} and {_gib(CONTEXT)}); "
        f"{MEMORY_ERROR}"
    }


def _scaling(console: Console, facts: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(title="the same run on more devices", box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for column in (
        "devices",
        "rows a step",
        "batch x micro",
        "steps",
        "s a step",
        "s comm.",
        "s exposed",
        "hours",
        "GPU hours",
        "cost",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for row in facts["scaling"]:
        table.add_row(
            f"{row['world_size']:,}",
            f"{row['rows_per_step']:,}",
            f"{row['device_batch_size']} x {row['grad_accum_steps']}",
            f"{row['steps']:,}",
            f"{row['seconds_per_step']:.3g}",
            f"{row['communication_seconds']:.3g}",
            f"{row['exposed_seconds']:.3g}",
            f"{row['hours']:.3g}",
            f"{row['gpu_hours']:.3g}",
            "" if row["cost"] is None else f"{row['cost']:,.2f}",
        )
    console.print(table)
    console.print(
        "Beyond 8 devices the network between hosts sets the pace. With more devices than rows a step, the step grows to one row "
        "a device. comm.: communication; exposed: the part of it that does not overlap with computing.",
        soft_wrap=True,
    )
    first = facts["communication_dominates_from"]
    console.print(
        "Communication stays below forward and backward."
        if first is None
        else f"From {first:,} devices on, communication takes longer than forward and backward.",
        soft_wrap=True,
    )


def _pairs(console: Console, title: str, pairs: dict[str, str]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs.items():
        table.add_row(name, value)
    console.print(table)


def _gib(size: float) -> str:
    return f"{size / GIB:.3f}"
