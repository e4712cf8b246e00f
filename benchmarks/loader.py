"""Share of the time of real steps that is spent waiting for data: the metric train/data_wait, over steps of the tiny model.

The smallest model has the shortest steps, in which the next batches must be built. The reference is a goal, not a measurement:
0.5 % of the time. The two warm-up steps are not counted.
"""

from __future__ import annotations

import tempfile
import time

from benchmarks.timing import show
from chattrain import loop
from chattrain.config.compose import compose
from chattrain.parallel.ranks import Ranks
from chattrain.parallel.signals import Signals
from chattrain.setup.build import build_components
from chattrain.setup.plan import setup_run
from chattrain.tracking.tracker import NullTracker

STEPS, GOAL = 10, 0.5  # per cent of the time


def measure() -> list[dict]:
    return [_measure(collator) for collator in ("packed", "masked")]


def _measure(collator: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        cfg = compose(
            [
                "stage=mid",
                "init.from=scratch",
                f"run.root={folder}",
                "eval=none",
                "tracking=none",
                "model=tiny",
                f"collator={collator}",
                "train.max_steps=1000",
                "train.compile=false",
            ]
        )
        setup, data = setup_run(cfg, world_size=1)
        components, _ = build_components(cfg, setup, Ranks(), data, NullTracker(), Signals(), None)
        for step in range(2):
            loop.train_step(components, components.loader.step(step), step)
        waited, begun = components.loader.waited_s, time.perf_counter()
        for step in range(2, 2 + STEPS):
            loop.train_step(components, components.loader.step(step), step)
        share = 100 * (components.loader.waited_s - waited) / (time.perf_counter() - begun)
        components.loader.close()
    return {
        "case": f"waiting for data, tiny, {collator} (goal)",
        "unit": "% of time",
        "ours": share,
        "reference": GOAL,
        "ratio": GOAL / max(share, 1e-9),
    }


if __name__ == "__main__":
    show(measure())
