"""Loss spikes: steps whose loss is far above those before, kept with the rows that made them."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median

from chattrain.storage.files import replace_text

log = logging.getLogger("chattrain")

WINDOW, LEAST = 100, 20  # steps that a loss is compared with, at most and at least
DEVIATIONS, FACTOR = 8.0, 1.2  # a spike is above both: the median + 8 standard deviations, and 1.2 times the median
OF_MEDIAN = 1.4826  # standard deviation of normal values over the median of their distances from the median
MOST = 100  # spikes that are kept


class Spikes:
    """Called with (steps completed, loss of the last) for each step in order; writes <run>/spikes/step_000123.json.

    `describe`: from a step, counted from 0, to the documents in its rows.
    """

    def __init__(self, run_dir: Path, describe: Callable[[int], str], writes: bool):
        self.folder, self.describe, self.writes = run_dir / "spikes", describe, writes
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.found = 0

    def __call__(self, step: int, loss: float) -> None:
        if self.writes and is_spike(loss, list(self.losses)) and self.found < MOST:
            self.found += 1
            usual, rows = median(self.losses), self.describe(step - 1)
            self.folder.mkdir(parents=True, exist_ok=True)
            content = {"step": step, "loss": loss, "median_before": usual, "rows": rows}
            replace_text(self.folder / f"step_{step:06d}.json", json.dumps(content, indent=1) + "\n")
            log.warning(
                "step %d: the loss is %.4g, of the steps before %.4g; command=inspect inspect.step=%d shows its rows: %s",
                step,
                loss,
                usual,
                step,
                rows,
            )
        self.losses.append(loss)


def is_spike(loss: float, before: list[float]) -> bool:
    """
    >>> is_spike(5.0, [2.0, 2.1] * 20), is_spike(2.3, [2.0, 2.1] * 20), is_spike(9.0, [2.0])
    (True, False, False)
    """
    if len(before) < LEAST:
        return False
    usual = median(before)
    deviation = OF_MEDIAN * median(abs(value - usual) for value in before)
    return loss > usual + DEVIATIONS * deviation and loss > FACTOR * usual
