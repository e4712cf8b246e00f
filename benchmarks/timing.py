"""Time two functions in alternating rounds, so that a machine that slows down slows both."""

from __future__ import annotations

import multiprocessing
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def time_both(ours: Callable[[], None], reference: Callable[[], None], rounds: int = 7) -> tuple[float, float]:
    """Median seconds of each function, after one warm-up call."""
    ours()
    reference()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for function, seconds in zip((ours, reference), times, strict=True):
            started = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - started)
    return statistics.median(times[0]), statistics.median(times[1])


@contextmanager
def in_own_process(make: Callable[..., Callable[[], Any]], *arguments: Any) -> Iterator[Callable[[], None]]:
    """A function that calls make(*arguments)() in another process, where make is called once. Raises EOFError or OSError if that
    process fails; its traceback is on stderr."""
    spawn = multiprocessing.get_context("spawn")
    connection, child_connection = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(child_connection, make, arguments), daemon=True)
    process.start()
    child_connection.close()

    def call() -> None:
        connection.send(True)
        connection.recv()

    try:
        yield call
    finally:
        connection.close()
        process.join()


def _serve(connection: Connection, make: Callable[..., Callable[[], Any]], arguments: tuple) -> None:
    function = make(*arguments)
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        function()
        connection.send(True)


def commit() -> str | None:
    """The commit of the working tree, with a + if it has changes; None outside a repository."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return described.stdout.strip() or None


def row(case: str, work: float, unit: str, ours: float, reference: float, products: float | None = None) -> dict:
    """One line of the table: units of work a second of both, how many times faster ours is, and the share of our seconds that the
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
