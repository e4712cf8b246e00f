"""Ctrl-C and SIGTERM: one asks for an end after a checkpoint, two for an end at once; in a rank, and in what launched it."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

log = logging.getLogger("chattrain")

STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)  # the last is what Slurm sends, as submitit asks, before the time is out
SAME_SIGNAL_S = 2.0  # seconds within which signals are one


@contextmanager
def stop_on_signal(failed: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM ask the loop to stop after its step and save; a second one stops at once.

    With several ranks one Ctrl-C arrives twice, from the terminal and from the launcher: signals close together are one.
    Where a rank has `failed`, the launcher's signal is no news: the run ends for that reason.
    """
    asked = threading.Event()
    first = 0.0

    def ask(number, frame):
        nonlocal first
        if failed():
            return
        if asked.is_set():
            if time.monotonic() - first > SAME_SIGNAL_S:
                raise KeyboardInterrupt
            return
        first = time.monotonic()
        asked.set()
        log.warning("stopping after this step and saving; once more stops at once")

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.signal(number, ask) for number in STOP}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, before)  # see signals_to_ranks
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stopped_at_once() -> Iterator[None]:
    """For waits on other ranks before there is anything to save: a signal ends this process even where Python does not run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def signals_to_ranks() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM go on to the ranks of this host, which save and return; a second one ends them within STOP_S.

    Yields whether there was one. SIGINT is blocked in this thread, and so in the ranks, until they are ready for it: a
    terminal sends it to all at once, and a rank that is still importing would answer with a traceback. Another thread of
    this process takes it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    first, over = None, threading.Event()

    def pass_on(number, frame):
        from torch.distributed.elastic.multiprocessing.api import SignalException

        nonlocal first
        ranks = multiprocessing.active_children()
        if not ranks or (first is not None and time.monotonic() - first > SAME_SIGNAL_S):
            raise SignalException("stopped", signal.SIGTERM)
        if first is None:
            first = time.monotonic()
            for rank in ranks:
                rank.terminate()

    resource_tracker.ensure_running()  # which would unblock SIGINT when it starts
    threading.Thread(target=over.wait, daemon=True, name="signals").start()
    before = {number: signal.signal(number, pass_on) for number in STOP}
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield lambda: first is not None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        over.set()
