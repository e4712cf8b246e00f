"""Sides in alternating turns, and the table of what they measured."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

from benchmarks.peers.rounds import Side, Turn, side, speed

WARM_UP = 2  # steps after the first one that are not timed


class Result(NamedTuple):
    name: str
    tokens_per_second: tuple[float, float, float]  # median, lowest and highest of the turns; without padding
    supervised_per_second: tuple[float, float, float]
    peak_memory_gib: float
    first_step_s: float
    start_to_first_step_s: float  # from the start of the side's process: imports, data and weights too
    losses: list[float]  # of the first steps
    first_supervised: int | None  # targets of the first step, as the side counted them
    settings: dict[str, Any]


class Entry:
    """A side, and what it has measured: the first steps, then turns with the number of the first step of each."""

    def __init__(self, name: str, main: Callable[..., None], arguments: tuple):
        self.name, self.main, self.arguments = name, main, arguments
        self.facts: dict[str, Any] = {}
        self.first: Turn | None = None  # the first step
        self.losses: list[float] = []  # of the first step and the warm-up
        self.turns: list[tuple[int, Turn]] = []
        self.side: Side | None = None  # while its process runs

    def result(self, tokens: list[int], supervised: list[int]) -> Result:
        assert self.first is not None
        turns = [turn for _, turn in self.turns]
        rates = [speed(turns, [sizes[i] for start, t in self.turns for i in range(start, start + len(t.steps))])
                 for sizes in (tokens, supervised)]  # fmt: skip
        return Result(
            self.name,
            *rates,
            max(turn.peak_memory_gib for turn in turns),
            self.first.seconds,
            self.first.since_start_s,
            self.losses,
            self.first.steps[0].supervised,
            self.facts["settings"],
        )


class Contest:
    """Sides that take `rounds` turns of `steps` steps each, after the first step and WARM_UP others, in which shapes that are new
    compile.

    `together`: their processes live as long as the contest and wait for their turns, so that a machine that slows down slows all.
    Otherwise each turn is a new process that trains the first steps again: a GPU's memory holds one side at a time.
    """

    def __init__(self, rounds: int, steps: int, together: bool):
        self.rounds, self.steps, self.together = rounds, steps, together
        self.entries: list[Entry] = []
        self._stack = ExitStack()

    @property
    def num_steps(self) -> int:
        """Steps that a side trains, at most."""
        return 1 + WARM_UP + self.rounds * self.steps

    def __enter__(self) -> Contest:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, name: str, main: Callable[..., None], *arguments: Any) -> dict[str, Any]:
        """Start a side, which is main(turns, *arguments), and train its first step. Returns what it says of itself.

        Raises Missing where the side is missing.
        """
        entry = Entry(name, main, arguments)
        if self.together:
            self._begin(entry, self._stack)
        else:
            self._turn_of_its_own(entry)
        self.entries.append(entry)
        return entry.facts

    def results(self, tokens: list[int], supervised: list[int]) -> list[Result]:
        """Take the turns that are left. tokens[i], supervised[i]: of the i-th step."""
        for number in range(0 if self.together else 1, self.rounds):
            for entry in self.entries:
                if entry.side:
                    entry.turns.append((1 + WARM_UP + number * self.steps, entry.side.train(self.steps)))
                else:
                    self._turn_of_its_own(entry)
        return [entry.result(tokens, supervised) for entry in self.entries]

    def _begin(self, entry: Entry, stack: ExitStack) -> None:
        entry.side = stack.enter_context(side(entry.main, *entry.arguments))
        first, warm_up = entry.side.train(1), entry.side.train(WARM_UP)
        if entry.first is None:  # later processes find what this one has compiled
            entry.facts, entry.first = entry.side.facts, first
            entry.losses = [step.loss for step in (*first.steps, *warm_up.steps)]

    def _turn_of_its_own(self, entry: Entry) -> None:
        with ExitStack() as stack:
            self._begin(entry, stack)
            assert entry.side is not None
            entry.turns.append((1 + WARM_UP, entry.side.train(self.steps)))
        entry.side = None


def check_same_targets(results: list[Result], supervised: int) -> None:
    """Raises RuntimeError unless the first step of each side has `supervised` targets and a loss within 2 % of the first's."""
    for result in results:
        if result.first_supervised != supervised:
            raise RuntimeError(f"{result.name} has {result.first_supervised} targets in its first step, not {supervised}")
        ours, theirs = results[0].losses[0], result.losses[0]
        if abs(theirs - ours) > 0.02 * abs(ours):
            raise RuntimeError(f"the first loss of {result.name} is {theirs:.4f}, that of {results[0].name} {ours:.4f}")


def show(results: list[Result]) -> str:
    """The table as text, in Markdown. The last column: how many times as fast as each side the first one is.

    >>> rates = (100.0, 90.0, 110.0)
    >>> ours = Result("ours", rates, rates, 1.0, 2.0, 3.0, [4.0, 3.5], 9, {})
    >>> print(show([ours, ours._replace(name="peer", tokens_per_second=(50.0, 50.0, 50.0))]))
    | side | tokens/s (lowest, highest) | supervised/s | peak GiB | first step, s (from start) | first losses | ours / side |
    |---|---|---|---|---|---|---|
    | ours | 100 (90, 110) | 100 | 1.00 | 2.0 (3.0) | 4.0000 3.5000 | 1.00 |
    | peer | 50 (50, 50) | 100 | 1.00 | 2.0 (3.0) | 4.0000 3.5000 | 2.00 |
    """
    first = results[0]
    lines = [
        "| side | tokens/s (lowest, highest) | supervised/s | peak GiB | first step, s (from start) | first losses | "
        f"{first.name} / side |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        median, lowest, highest = result.tokens_per_second
        lines.append(
            f"| {result.name} | {median:,.0f} ({lowest:,.0f}, {highest:,.0f}) | {result.supervised_per_second[0]:,.0f} | "
            f"{result.peak_memory_gib:.2f} | {result.first_step_s:.1f} ({result.start_to_first_step_s:.1f}) | "
            f"{' '.join(f'{loss:.4f}' for loss in result.losses)} | {first.tokens_per_second[0] / median:.2f} |"
        )
    return "\n".join(lines)
