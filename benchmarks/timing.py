"""Two functions in turns, so that a machine that slows down slows both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def in_turns(ours: Callable[[], None], reference: Callable[[], None], rounds: int = 7) -> tuple[float, float]:
    """Median seconds of each, after one call that warms up."""
    ours()
    reference()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for function, kept in zip((ours, reference), times, strict=True):
            begun = time.perf_counter()
            function()
            kept.append(time.perf_counter() - begun)
    return statistics.median(times[0]), statistics.median(times[1])


def row(case: str, work: float, unit: str, ours: float, reference: float) -> dict:
    """One line of the table: work units a second of both, and how many times faster ours is."""
    return {"case": case, "unit": f"{unit}/s", "ours": work / ours, "reference": work / reference,
            "ratio": reference / ours}


def show(rows: list[dict]) -> None:
    print(f"{'case':44s} {'unit':14s} {'ours':>12s} {'reference':>12s} {'ratio':>7s}")
    for r in rows:
        print(f"{r['case']:44s} {r['unit']:14s} {r['ours']:12,.1f} {r['reference']:12,.1f} {r['ratio']:6.2f}x")
