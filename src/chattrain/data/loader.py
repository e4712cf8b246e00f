"""The micro-batches of a step for this rank, made and moved to the device while it works on the step before."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from chattrain.data.batch import Batch
from chattrain.data.collators import EMPTY, Collator


class Loader:
    """Step -> micro-batches. Step s holds rows s x rows_per_step and following, whatever the number of ranks.

    The collator deals them to ranks and micro-batches, so that 1 x 8 rows, 8 x 1 rows and 2 ranks see the same step.
    `waited_s` counts the seconds that `step` has waited for batches, the first of a process with them.
    """

    def __init__(
        self,
        collator: Collator,
        rows_per_step: int,
        device_batch_size: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.collator, self.rows_per_step, self.device_batch_size = collator, rows_per_step, device_batch_size
        self.device, self.rank, self.world_size = device, rank, world_size
        self.waited_s = 0.0
        cuda = device.type == "cuda"
        # A thread begins on GPU 0, where every rank would take memory for a context.
        on_device = {"initializer": torch.cuda.set_device, "initargs": (device,)} if cuda else {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader", **on_device)
        self._ahead: tuple[int, Future] | None = None
        self._stream = torch.cuda.Stream(device) if cuda else None

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step, on the device. The next step's are begun in the background."""
        begun = time.perf_counter()
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = (step, self._thread.submit(self._make, step))
        batches, moved = self._ahead[1].result()
        self.waited_s += time.perf_counter() - begun
        self._ahead = (step + 1, self._thread.submit(self._make, step + 1))
        if moved is not None:
            self._take_over(batches, moved)
        return batches

    def rows(self, step: int) -> np.ndarray:
        """Row numbers of a step, over all ranks."""
        return np.arange(step * self.rows_per_step, (step + 1) * self.rows_per_step)

    def describe(self, step: int) -> str:
        named = list(dict.fromkeys(self.collator.describe(int(row)) for row in self.rows(step)))
        return ", ".join(named[:8]) + (f" and {len(named) - 8} more" if len(named) > 8 else "")

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _make(self, step: int) -> tuple[list[Batch], torch.cuda.Event | None]:
        """A step's batches on the device; on CUDA they are there when the event is. Runs in the thread."""
        groups = self.collator.split_micro_batches(self.rows(step), self.device_batch_size, self.world_size)
        batches = [self.collator.batch(rows[self.rank]) for rows in groups]
        self.collator.mixture.release()
        if self._stream is None:
            return [batch.to(self.device) for batch in batches], None
        with torch.cuda.stream(self._stream):  # the copies run beside the step before
            batches = [batch.each(torch.Tensor.pin_memory).to(self.device) for batch in batches]
            return batches, self._stream.record_event()

    def _take_over(self, batches: list[Batch], moved: torch.cuda.Event) -> None:
        """The caller's stream waits for the copies, and their memory is not used anew before that stream is done with it."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(moved)
        for batch in batches:
            for value in batch:
                if isinstance(value, torch.Tensor):
                    value.record_stream(stream)


def evaluation_batches(collator: Collator, num_rows: int, device_batch_size: int, rank: int = 0, world_size: int = 1):
    """Every row once, in batches for this rank, which follow from the rows alone: rank r of w gets numbers r, r + w, ... of them.

    Rows of EMPTY fill up the last batch, and give all ranks the same number of batches.
    """
    rows = np.concatenate([np.arange(num_rows), np.full(-num_rows % device_batch_size, EMPTY)])
    groups = [group[0] for group in collator.split_micro_batches(rows, device_batch_size, 1)]
    groups += [np.full(len(groups[-1]), EMPTY)] * (-len(groups) % world_size)
    for group in groups[rank::world_size]:
        yield collator.batch(group)
    collator.mixture.release()
