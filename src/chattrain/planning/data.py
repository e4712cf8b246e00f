"""Tokens and shapes of a run's steps, from the rows that it will train on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from chattrain.config.words import Supervise
from chattrain.data.collators import Collator, Packed
from chattrain.data.passes import PassLimits, largest_pass
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
    rows_a_pass: int  # as many as limits allow, so those of a rank that has the whole step; on average, rounded up


def count(data: RunData, limits: PassLimits, world_size: int) -> Counts:
    """The counts of a run: exact if it has at most MAX_ROWS rows or every token is a target, else from evenly spread steps."""
    collator, rows = data.train, data.num_steps * data.rows_per_step
    if _every_token_is_a_target(collator):
        size = rows * collator.seq_len
        return Counts(size, size, size, exact=True, rows_a_pass=limits.rows)
    sampled = min(data.num_steps, max(1, MAX_ROWS // data.rows_per_step))
    steps = np.linspace(0, data.num_steps - 1, sampled).round().astype(int)
    totals, passes = np.zeros(3, dtype=np.int64), 0
    for step in steps.tolist():
        row_indices = np.arange(step * data.rows_per_step, (step + 1) * data.rows_per_step)
        passes += len(collator.split_micro_batches(row_indices, limits, 1))
        for micro_batch in collator.split_micro_batches(row_indices, limits, world_size):
            for rank_rows in micro_batch:
                batch = collator.batch(rank_rows)
                totals += [batch.num_tokens, batch.num_supervised, batch.inputs.numel()]
    collator.mixture.release()
    tokens, supervised, padded = (round(total * data.num_steps / sampled) for total in totals.tolist())
    rows_a_pass = math.ceil(sampled * data.rows_per_step / passes)
    return Counts(tokens, supervised, padded, exact=sampled == data.num_steps, rows_a_pass=rows_a_pass)


def shape_of(collator: Collator, isolated: bool, padded: bool, limits: PassLimits, rank_rows: int) -> MicroBatchSpec:
    """The largest micro-batch that the data can give within these limits, for a rank with rank_rows rows a step.

    Padded rows (collator=masked): the one with the most tokens. All that a pass takes grows with its tokens, whatever its shape:
    no kernel of attention keeps anything of T x T.
    """
    all_supervised = _every_token_is_a_target(collator)
    rows, width = limits.rows, collator.seq_len
    if padded:
        longest = max(int(collator.mixture.lengths[kept].max()) for kept in collator.mixture.kept if len(kept))
        rows, width = largest_pass(min(longest - 1, width), rank_rows, width, limits)
    return MicroBatchSpec(rows, width, partial=not all_supervised, isolated=isolated, repeats=rows < rank_rows)


def _every_token_is_a_target(collator: Collator) -> bool:
    """Are rows full, and does each of their tokens weigh 1?"""
    whole = isinstance(collator, Packed) and not collator.isolate_documents
    return (
        whole
        and collator.mixture.weights.supervise == Supervise.all
        and not any(c.num_off.any() for c in collator.mixture.caches)
    )
