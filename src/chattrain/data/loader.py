"""The micro-batches of a step for this rank, made while the device works on the step before."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from chattrain.data.collators import EMPTY, Batch, Collator


class Loader:
    """Step -> micro-batches. Step s holds rows s x rows_per_step and following, whatever the number of ranks.

    Rows are dealt in turns of (world_size x device_batch_size), so 1 x 8 rows, 8 x 1 rows and 2 ranks see the same step.
    """

    def __init__(self, collator: Collator, rows_per_step: int, device_batch_size: int, device: torch.device,
                 rank: int = 0, world_size: int = 1):
        self.collator, self.rows_per_step, self.device_batch_size = collator, rows_per_step, device_batch_size
        self.device, self.rank, self.world_size = device, rank, world_size
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: tuple[int, Future] | None = None

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step, on the device. The next step's are begun in the background."""
        if self._ahead is not None and self._ahead[0] == step:
            batches = self._ahead[1].result()
        else:
            batches = self._make(step)
        self._ahead = (step + 1, self._thread.submit(self._make, step + 1))
        return [batch.to(self.device) for batch in batches]

    def rows(self, step: int) -> np.ndarray:
        """Row numbers of a step, over all ranks, in the order in which they are dealt."""
        return self.collator.arrange(np.arange(step * self.rows_per_step, (step + 1) * self.rows_per_step))

    def describe(self, step: int) -> str:
        named = [self.collator.describe(int(row)) for row in self.rows(step)]
        return ", ".join(named[:8]) + (f" and {len(named) - 8} more" if len(named) > 8 else "")

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _make(self, step: int) -> list[Batch]:
        groups = self.rows(step).reshape(-1, self.device_batch_size)
        batches = [self.collator.batch(rows) for rows in groups[self.rank :: self.world_size]]
        if self.device.type == "cuda":
            batches = [batch.each(torch.Tensor.pin_memory) for batch in batches]
        return batches


def evaluation_batches(collator: Collator, num_rows: int, device_batch_size: int, rank: int = 0, world_size: int = 1):
    """Every row once, in batches for this rank; all ranks get the same number of batches, the last filled up with EMPTY."""
    turn = device_batch_size * world_size
    rows = np.arange(num_rows)
    rows = collator.arrange(np.concatenate([rows, np.full(-num_rows % turn, EMPTY)]))
    for group in rows.reshape(-1, world_size, device_batch_size)[:, rank]:
        yield collator.batch(group)
