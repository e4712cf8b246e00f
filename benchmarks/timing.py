"""Two functions in turns, so that a machine that slows down slows both."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any


def for_each_batch(ours: Callable[[], None], reference: Callable[[], None], rounds: int = 7) -> tuple[float, float]:
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


@contextmanager
def apart(make: Callable[..., Callable[[], Any]], *arguments: Any) -> Iterator[Callable[[], None]]:
    """A function that calls make(*arguments)() in a process of its own, made there once. Raises EOFError or OSError where that
    process fails; its traceback is on stderr."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(there, make, arguments), daemon=True)
    process.start()
    there.close()

    def call() -> None:
        here.send(True)
        here.recv()

    try:
        yield call
    finally:
        here.close()
        process.join()


def _serve(asked: Connection, make: Callable[..., Callable[[], Any]], arguments: tuple) -> None:
    function = make(*arguments)
    while True:
        try:
            asked.recv()
        except EOFError:
            return
        function()
        asked.send(True)


def row(case: str, work: float, unit: str, ours: float, reference: float, products: float | None = None) -> dict:
    """One line of the table: work units a second of both, how many times faster ours is, and what share of our seconds the
    matrix products alone take (`products` seconds, see roofline.py)."""
    return {
        "case": case,
        "unit": f"{unit}/s",
        "ours": work / ours,
        "reference": work / reference,
        "ratio": reference / ours,
        **({} if products is None else {"roofline": products / ours}),
    }


def show(rows: list[dict]) -> None:
    print(f"{'case':44s} {'unit':14s} {'ours':>12s} {'reference':>12s} {'ratio':>8s} {'roofline':>9s}")
    for r in rows:
        share = f"{r['roofline']:9.0%}" if "roofline" in r else f"{'':9s}"
        print(f"{r['case']:44s} {r['unit']:14s} {r['ours']:12,.1f} {r['reference']:12,.1f} {r['ratio']:7.2f}x {share}")
