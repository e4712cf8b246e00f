"""How far two runs agree: the tensors of their checkpoints, and the numbers of their metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from chattrain.tracking.metrics import read_metrics

# Metrics that depend on the clock or on the process.
OF_THE_PROCESS = (
    "time",
    "train/tokens_per_second",
    "train/data_wait",
    "train/mfu",
    "train/peak_memory",
    "train/compilations",
    "train/sent_gib",
)


def compare_tensors(one: Path, two: Path, files: tuple[str, ...]) -> dict:
    """Of these files of two checkpoints: the number of tensors, how many differ, and the largest deviation of an element (inf: of
    another shape, or only in one)."""
    different, tensors, largest = 0, 0, 0.0
    for file in files:
        first, second = load_file(one / file), load_file(two / file)
        tensors += len(first)
        for name in first.keys() | second.keys():
            a, b = first.get(name), second.get(name)
            if a is None or b is None or a.shape != b.shape:
                different, largest = different + 1, float("inf")
            elif not torch.equal(a, b):
                different, largest = different + 1, max(largest, float((a.double() - b.double()).abs().max()))
    return {"tensors": tensors, "different_tensors": different, "largest_deviation": largest}


def read_numbers(run_dir: Path) -> list[dict]:
    """The rows of metrics.jsonl without what depends on the clock or on the process."""
    return [
        {name: value for name, value in row.items() if not name.startswith(OF_THE_PROCESS)}
        for row in read_metrics(run_dir / "metrics.jsonl")
    ]


def numbers_by_step(run_dir: Path, last_step: int) -> dict[int, dict[str, float | None]]:
    """The same, of all rows of a step together, up to last_step."""
    found: dict[int, dict[str, float | None]] = {}
    for row in read_numbers(run_dir):
        if row["step"] <= last_step:
            found.setdefault(row["step"], {}).update({name: value for name, value in row.items() if name != "step"})
    return found


def compare_numbers(one: Path, two: Path, last_step: int) -> dict:
    """Of the numbers that both runs have, up to last_step: how many are compared, the first that differs, as (step, name, value,
    value), and the largest relative deviation of each metric that differs."""
    first, second = numbers_by_step(one, last_step), numbers_by_step(two, last_step)
    compared, first_difference = 0, None
    largest: dict[str, float] = {}
    for step in sorted(first.keys() & second.keys()):
        for name in [name for name in first[step] if name in second[step]]:
            a, b = first[step][name], second[step][name]
            compared += 1
            if a != b:
                first_difference = first_difference or [step, name, a, b]
                largest[name] = max(largest.get(name, 0.0), relative_deviation(a, b))
    return {"compared_numbers": compared, "first_difference": first_difference, "largest_relative": largest}


def relative_deviation(a: float | None, b: float | None) -> float:
    """
    >>> relative_deviation(2.0, 2.5), relative_deviation(0.0, 0.0), relative_deviation(1.0, None)
    (0.2, 0.0, inf)
    """
    if a is None or b is None:  # one of them was not finite
        return float("inf") if a != b else 0.0
    return abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0
