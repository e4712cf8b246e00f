"""A schedule: a function from step and number of steps to the factor on every learning rate. Arguments after them are keys."""


def stairs(step: int, num_steps: int, stairs: int = 4, drop: float = 0.5) -> float:
    """Constant on each of `stairs` equal parts of the run, times `drop` from one to the next."""
    return drop ** (step * stairs // num_steps)
