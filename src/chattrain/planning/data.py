"""What the steps of a run hold, from the rows that it will see."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from chattrain.data.collators import Collator, Packed
from chattrain.data.packing import padded_width
from chattrain.planning.memory import MicroBatchSpec
from chattrain.setup.data import RunData

MOST_ROWS = 4096  # rows that are looked at, at most


@dataclass(frozen=True)
class Counts:
    """Of a whole run. places: tokens and padding, what the device computes."""

    tokens: int
    supervised: int
    places: int
    exact: bool  # counted row by row; else scaled up from the steps that were looked at


def count(data: RunData, device_batch_size: int, world_size: int) -> Counts:
    """Exact where all rows of the run are a few thousand or every token is a target; else from steps spread evenly over it."""
    rows = data.num_steps * data.rows_per_step
    if isinstance(data.train, Packed) and not data.train.isolate_documents:
        places = rows * data.train.seq_len
        return Counts(places, places, places, exact=True)
    looked_at = min(data.num_steps, max(1, MOST_ROWS // data.rows_per_step))
    steps = np.linspace(0, data.num_steps - 1, looked_at).round().astype(int)
    found = np.zeros(3, dtype=np.int64)
    for step in steps.tolist():
        numbers = np.arange(step * data.rows_per_step, (step + 1) * data.rows_per_step)
        for micro_batch in data.train.split_micro_batches(numbers, device_batch_size, world_size):
            for rank in micro_batch:
                batch = data.train.batch(rank)
                found += [batch.num_tokens, batch.num_supervised, batch.inputs.numel()]
    data.train.mixture.release()
    tokens, supervised, places = (round(total * data.num_steps / looked_at) for total in found.tolist())
    return Counts(tokens, supervised, places, exact=looked_at == data.num_steps)


def shape_of(collator: Collator, isolated: bool, varies: bool, rows: int, repeats: bool) -> MicroBatchSpec:
    """The largest micro-batch of this many rows that the data can give: rows as long as its longest document where they follow
    their documents (masked), else full."""
    every = isinstance(collator, Packed) and not isolated
    width = collator.seq_len
    if varies:
        longest = max(int(collator.mixture.lengths[kept].max()) for kept in collator.mixture.kept if len(kept))
        width = padded_width(min(longest - 1, width), width)
    return MicroBatchSpec(rows, width, partial=not every, isolated=isolated, repeats=repeats)
