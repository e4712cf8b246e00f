"""Successive halving (Jamieson and Talwalkar, 2016, arXiv:1502.07943): all jobs begin, and at each rung only the best go on.

A job that goes on resumes exactly, so the winner's numbers are those of an uninterrupted run.
"""

from __future__ import annotations

import math


def rungs(count: int, keep: int) -> list[float]:
    """The fractions of the steps at which `count` jobs are compared and the best 1/`keep` go on; the last is 1.

    >>> rungs(9, 3), rungs(7, 2), rungs(2, 3)
    ([0.1111111111111111, 0.3333333333333333, 1.0], [0.25, 0.5, 1.0], [1.0])
    """
    rounds = 0
    while keep ** (rounds + 1) <= count:
        rounds += 1
    return [float(keep) ** -i for i in range(rounds, 0, -1)] + [1.0]


def survivors(objectives: dict[int, float], keep: int, direction: str) -> list[int]:
    """The numbers of the best 1/`keep` of the jobs, rounded up; of equals the first. `direction`: minimize or maximize.

    >>> survivors({0: 3.0, 1: 1.0, 2: 2.0}, 2, "minimize")
    [1, 2]
    """
    sign = 1 if direction == "minimize" else -1
    ordered = sorted(objectives, key=lambda num: (sign * objectives[num], num))
    return sorted(ordered[: math.ceil(len(objectives) / keep)])
