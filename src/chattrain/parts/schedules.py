"""The check of schedules."""

from __future__ import annotations

import math

from chattrain.parts.contracts import Schedule, require

LENGTHS = (1, 2, 3, 10, 97, 1000)  # steps of the runs that are tried


def check_schedule(schedule: Schedule) -> None:
    """Raises ContractBroken unless the schedule is a pure function with finite factors of 0 or more, not all 0."""
    for num_steps in LENGTHS:
        factors = [schedule(step, num_steps) for step in range(num_steps)]
        for step, factor in enumerate(factors):
            where = f"step {step} of {num_steps} has the factor {factor!r}"
            require(isinstance(factor, int | float), f"{where}, which is no number")
            require(math.isfinite(factor) and factor >= 0, f"{where}, which is not finite or below 0")
        require(any(factors), f"all factors of a run of {num_steps} steps are 0: it would learn nothing")
        again = [schedule(step, num_steps) for step in reversed(range(num_steps))][::-1]
        require(again == factors, f"the factors of {num_steps} steps are others when asked again: a resumed run would differ")
