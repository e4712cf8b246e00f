"""Passes, padding and shapes of 200 sft steps, as a CPU and as a GPU would have them. Trains nothing.

Passes hold up to 8 x 1,024 tokens. Conversations as in benchmarks/sft.py: real ones where BENCHMARK_DATA names a folder.

    python -m benchmarks.passes [conversations a step, 32]
"""

from __future__ import annotations

import sys
import tempfile

import numpy as np

from benchmarks.sft import VOCAB_SIZE, data_overrides
from chattrain.config.compose import compose
from chattrain.data.passes import PassLimits
from chattrain.setup.plan import setup_run

ROWS, SEQ_LEN, STEPS = 8, 1024, 200


def measure(conversations: int = 32) -> None:
    with tempfile.TemporaryDirectory() as folder:
        typed = ["stage=sft", "init.from=scratch", "eval=none", "tracking=none", "model=tiny", f"run.root={folder}"]
        sizes = [f"train.seq_len={SEQ_LEN}", f"train.rows_per_step={conversations}", f"train.max_steps={STEPS}"]
        _, data = setup_run(compose([*typed, *sizes, *data_overrides(VOCAB_SIZE)]), world_size=1)
        for device in ("cpu", "cuda"):
            limits = PassLimits(ROWS, ROWS * SEQ_LEN, device)
            steps = [np.arange(step * conversations, (step + 1) * conversations) for step in range(STEPS)]
            passes = [[rows for (rows,) in data.train.split_micro_batches(step, limits, 1)] for step in steps]
            batches = [data.train.batch(rows) for step in passes for rows in step]
            padding = 1 - sum(b.num_tokens for b in batches) / sum(b.inputs.numel() for b in batches)
            shapes, widths = {b.inputs.shape for b in batches}, {b.inputs.size(1) for b in batches}
            fewest, most = (f(map(len, passes)) for f in (min, max))
            print(
                f"{device:5s} {len(batches) / STEPS:.2f} passes a step ({fewest} to {most}), {padding:.1%} padding, "
                f"{len(shapes)} shapes, {len(widths)} widths"
            )


if __name__ == "__main__":
    measure(*map(int, sys.argv[1:]))
