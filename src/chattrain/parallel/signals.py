"""Signals, in a rank and in its launcher. The first Ctrl-C or SIGTERM stops the run after a checkpoint, the second at once;
SIGUSR1 saves one and goes on."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

log = logging.getLogger("chattrain")

# submitit makes Slurm send SIGUSR2 before a job's time limit.
STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
SAVE = signal.SIGUSR1
SAME_SIGNAL_S = 2.0  # seconds within which several signals count as one


class Signals:
    """What signals have asked of the loop."""

    def __init__(self) -> None:
        self._stop, self._save = threading.Event(), threading.Event()

    def stop_asked(self) -> bool:
        """To stop after the step, and save?"""
        return self._stop.is_set()

    def save_asked(self) -> bool:
        """To save after the step? Once for each time."""
        asked = self._save.is_set()
        self._save.clear()
        return asked

    def ask_to_stop(self) -> None:
        self._stop.set()

    def ask_to_save(self) -> None:
        self._save.set()


def _handled() -> tuple[signal.Signals, ...]:
    """The signals that a run answers. A closed terminal (SIGHUP) stops it too, unless nohup has it go on."""
    hangup = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
    return (*STOP, *hangup, SAVE)


@contextmanager
def listen_to_signals(failed: Callable[[], bool]) -> Iterator[Signals]:
    """Yields what signals ask of the loop from now on. The second signal to stop raises KeyboardInterrupt.

    With several ranks one Ctrl-C arrives twice, from the terminal and from the launcher: signals within SAME_SIGNAL_S count as
    one. After a rank has `failed`, signals are ignored: the launcher sends them because of the failure.
    """
    signals, first = Signals(), 0.0

    def on_signal(number, frame):
        nonlocal first
        if failed():
            return
        if number == SAVE:
            signals.ask_to_save()
            log.info("saving after this step")
            return
        if signals.stop_asked():
            if time.monotonic() - first > SAME_SIGNAL_S:
                raise KeyboardInterrupt
            return
        first = time.monotonic()
        signals.ask_to_stop()
        log.warning("stopping after this step and saving; a second signal stops at once")

    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, on_signal) for number in _handled()}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, before)  # see signals_to_ranks
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stopped_at_once() -> Iterator[None]:
    """Signals end this process at once, also inside C++ code: for waits on other ranks before there is anything to save."""
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
    """Forward Ctrl-C and SIGTERM to the ranks of this host, which save and return. A second signal ends them within
    launch.STOP_S seconds. Yields a function that tells whether there was a signal.

    A terminal sends SIGINT to all processes at once, and a rank that is still importing would print a traceback. So SIGINT is
    blocked in this thread. The ranks inherit that and unblock it once they handle it. Here another thread receives it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    first: float | None = None
    done = threading.Event()

    def forward(number, frame):
        from torch.distributed.elastic.multiprocessing.api import SignalException

        nonlocal first
        ranks = multiprocessing.active_children()
        if number == SAVE:
            if ranks and ranks[0].pid:  # one is enough: the ranks tell each other
                os.kill(ranks[0].pid, SAVE)
            return
        if not ranks or (first is not None and time.monotonic() - first > SAME_SIGNAL_S):
            raise SignalException("stopped", signal.SIGTERM)
        if first is None:
            first = time.monotonic()
            for rank in ranks:
                rank.terminate()

    resource_tracker.ensure_running()  # before SIGINT is blocked: starting it would unblock SIGINT
    threading.Thread(target=done.wait, daemon=True, name="signals").start()
    before = {number: signal.signal(number, forward) for number in _handled()}
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield lambda: first is not None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        done.set()
