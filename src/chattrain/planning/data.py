"""Tokens and shapes of a run's steps, from the rows that it will train on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from chattrain.data.collators import Collator, Packed
from chattrain.data.packing import padded_width
from chattrain.planning.memory import MicroBatchSpec
from chattrain.setup.data import RunData

MAX_ROWS = 4096  # rows that are counted, at most


@dataclass(frozen=True)
class Counts:
    """Token counts of a whole run."""

    tokens: int  # without padding
    supervised: int
    padded: int  # with padding: what the device computes
    exact: bool  # counted on all rows; else extrapolated from some steps


def count(data: RunData, device_batch_size: int, world_size: int) -> Counts:
    """The counts of a run: exact if it has at most MAX_ROWS rows or every token is a target, else from evenly spread steps."""
    collator, rows = data.train, data.num_steps * data.rows_per_step
    assert collator is not None
    if isinstance(collator, Packed) and not collator.isolate_documents:
        size = rows * collator.seq_len
        return Counts(size, size, size, exact=True)
    sampled = min(data.num_steps, max(1, MAX_ROWS // data.rows_per_step))
    steps = np.linspace(0, data.num_steps - 1, sampled).round().astype(int)
    totals = np.zeros(3, dtype=np.int64)
    for step in steps.tolist():
        row_indices = np.arange(step * data.rows_per_step, (step + 1) * data.rows_per_step)
        for micro_batch in collator.split_micro_batches(row_indices, device_batch_size, world_size):
            for rank_rows in micro_batch:
                batch = collator.batch(rank_rows)
                totals += [batch.num_tokens, batch.num_supervised, batch.inputs.numel()]
    collator.mixture.release()
    tokens, supervised, padded = (round(total * data.num_steps / sampled) for total in totals.tolist())
    return Counts(tokens, supervised, padded, exact=sampled == data.num_steps)


def shape_of(collator: Collator, isolated: bool, varies: bool, rows: int, repeats: bool) -> MicroBatchSpec:
    """The largest micro-batch of this many rows that the data can give.

    With varies (collator=masked) its rows are as wide as the longest document, else seq_len wide.
    """
    all_supervised = isinstance(collator, Packed) and not isolated
    width = collator.seq_len
    if varies:
        longest = max(int(collator.mixture.lengths[kept].max()) for kept in collator.mixture.kept if len(kept))
        width = padded_width(min(longest - 1, width), width)
    return MicroBatchSpec(rows, width, partial=not all_supervised, isolated=isolated, repeats=repeats)
