"""The micro-batches of a step for one rank. While a step trains, a thread collates the next one and copies it to the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from chattrain.data.batch import Batch
from chattrain.data.collators import EMPTY, Collator
from chattrain.data.passes import PassLimits


class Loader:
    """Returns the micro-batches of any step. Step s has the rows s * rows_per_step to (s + 1) * rows_per_step - 1.

    The collator splits these rows over ranks and micro-batches, so a step has the same rows whatever the limits of a pass, and
    on any number of ranks. `waited_s`: seconds that `step` has waited for batches in total, the first step included.
    """

    def __init__(
        self,
        collator: Collator,
        rows_per_step: int,
        limits: PassLimits,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.collator, self.rows_per_step, self.limits = collator, rows_per_step, limits
        self.device, self.rank, self.world_size = device, rank, world_size
        self.waited_s = 0.0
        cuda = device.type == "cuda"
        # A new thread uses GPU 0 by default; every rank would allocate a CUDA context there.
        on_device: dict[str, Any] = {"initializer": torch.cuda.set_device, "initargs": (device,)} if cuda else {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader", **on_device)
        self._prefetched: tuple[int, Future] | None = None  # (step, its micro-batches)
        self._stream = torch.cuda.Stream(device) if cuda else None

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step, on the device. Starts collating the next step in the background."""
        begun = time.perf_counter()
        if self._prefetched is None or self._prefetched[0] != step:
            self._prefetched = (step, self._thread.submit(self._collate, step))
        batches, copied = self._prefetched[1].result()
        self.waited_s += time.perf_counter() - begun
        self._prefetched = (step + 1, self._thread.submit(self._collate, step + 1))
        if copied is not None:
            self._wait_for_copies(batches, copied)
        return batches

    def rows(self, step: int) -> np.ndarray:
        """(rows_per_step,): the row indices of a step, over all ranks."""
        return np.arange(step * self.rows_per_step, (step + 1) * self.rows_per_step)

    def describe(self, step: int) -> str:
        """The documents of a step for messages: those of its first 8 different rows, and how many more there are."""
        names = list(dict.fromkeys(self.collator.describe(int(row)) for row in self.rows(step)))
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _collate(self, step: int) -> tuple[list[Batch], torch.Event | None]:
        """A step's batches on the device, and on CUDA the event after which their copies are complete. Runs in the thread."""
        groups = self.collator.split_micro_batches(self.rows(step), self.limits, self.world_size)
        batches = [self.collator.batch(rows[self.rank]) for rows in groups]
        self.collator.mixture.release()
        if self._stream is None:
            return [batch.to(self.device) for batch in batches], None
        with torch.cuda.stream(self._stream):  # a stream of their own, so that the copies overlap with the previous step
            batches = [batch.map_tensors(torch.Tensor.pin_memory).to(self.device) for batch in batches]
            return batches, self._stream.record_event()

    def _wait_for_copies(self, batches: list[Batch], copied: torch.Event) -> None:
        """Make the caller's stream wait for the copies. Their memory is not reused before that stream has finished with it."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(copied)
        for batch in batches:
            for value in batch:
                if isinstance(value, torch.Tensor):
                    value.record_stream(stream)


def evaluation_batches(
    collator: Collator, num_rows: int, limits: PassLimits, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """This rank's batches of rows 0 to num_rows - 1. The batches do not depend on world_size; rank r of w takes every w-th,
    starting with batch r.

    Batches of EMPTY rows give all ranks the same number.
    """
    groups = [group[0] for group in collator.split_micro_batches(np.arange(num_rows), limits, 1)]
    groups += [np.full(len(groups[-1]), EMPTY)] * (-len(groups) % world_size)
    for group in groups[rank::world_size]:
        yield collator.batch(group)
    collator.mixture.release()
