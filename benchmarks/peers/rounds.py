"""Sides that take turns: each in a process of its own, where it builds its model once and then trains as many steps as asked."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, NamedTuple


class Missing(Exception):
    """The peer is not installed here, or is not as expected; the message is a sentence."""


class Step(NamedTuple):
    """What a side says of a step that it has trained."""

    loss: float  # mean over the supervised tokens
    supervised: int | None = None  # None: not counted


class Turn(NamedTuple):
    """Some steps of a side, one after the other."""

    seconds: float
    steps: list[Step]
    peak_memory_gib: float  # of the process so far: on CUDA of its tensors, else resident
    since_start_s: float  # from the start of the process to the end of the turn


class Turns:
    """The end of the connection that a side holds."""

    def __init__(self, connection: Connection):
        self.connection = connection

    def built(self, facts: dict[str, Any]) -> None:
        """Say that the model is built; `facts`: settings, and whatever the caller of `side` wants to know."""
        self.connection.send(facts)

    def next(self) -> int:
        """How many steps to train now; 0: no more."""
        try:
            return self.connection.recv()
        except EOFError:
            return 0

    def done(self, turn: Turn) -> None:
        self.connection.send(turn)


def train_in_turns(turns: Turns, step: Callable[[int], Callable[[], Step]], cuda: bool) -> None:
    """Train as asked. step(i) trains the i-th step; it returns a function that gives its result and may wait for the device."""
    from benchmarks import STARTED
    from benchmarks.gpu import wait_for_device
    from chattrain.config.words import Device
    from chattrain.device import peak_memory, pick_device

    peak, number = peak_memory(pick_device(Device.cuda if cuda else Device.cpu)), 0
    while count := turns.next():
        begun = time.perf_counter()
        results = [step(number + i) for i in range(count)]
        wait_for_device()
        ended = time.perf_counter()
        number += count
        turns.done(Turn(ended - begun, [result() for result in results], peak(), ended - STARTED))


class Side:
    """A side whose process has built its model."""

    def __init__(self, connection: Connection, facts: dict[str, Any]):
        self.connection, self.facts = connection, facts

    def train(self, steps: int) -> Turn:
        self.connection.send(steps)
        return _received(self.connection)


@contextmanager
def side(main: Callable[..., None], *arguments: Any) -> Iterator[Side]:
    """A process that runs main(turns, *arguments). Raises Missing where the side does, RuntimeError where it fails."""
    spawn = multiprocessing.get_context("spawn")
    connection, child = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(child, main, arguments))
    process.start()
    child.close()
    try:
        yield Side(connection, _received(connection))
    finally:
        connection.close()
        process.join(10)
        process.kill()
        process.join()


def _serve(connection: Connection, main: Callable[..., None], arguments: tuple) -> None:
    try:
        main(Turns(connection), *arguments)
    except Missing as error:
        connection.send(error)


def _received(connection: Connection) -> Any:
    try:
        value = connection.recv()
    except EOFError:
        raise RuntimeError("the process of a side has ended; its traceback is above") from None
    if isinstance(value, Missing):
        raise value
    return value


def speed(turns: list[Turn], tokens: list[int]) -> tuple[float, float, float]:
    """Median, lowest and highest tokens a second of turns. tokens[i]: of the i-th step.

    >>> turn = Turn(2.0, [Step(1.0), Step(1.0)], 0.0, 0.0)
    >>> speed([turn, turn._replace(seconds=1.0)], [10, 30, 20, 20])
    (30.0, 20.0, 40.0)
    """
    rates, number = [], 0
    for turn in turns:
        rates.append(sum(tokens[number : number + len(turn.steps)]) / turn.seconds)
        number += len(turn.steps)
    return statistics.median(rates), min(rates), max(rates)
