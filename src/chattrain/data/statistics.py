"""What a mixture holds, by source and by length, and how full the rows of its batches are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from chattrain.data.collators import Collator
from chattrain.data.passes import PassLimits

SAMPLED_STEPS = 4  # of a training, whose rows are measured


@dataclass(frozen=True)
class SourceStatistics:
    """One source. Its epoch is the first one of the training; the other counts are over all its documents."""

    records: int  # that were read
    skipped: dict[str, int]  # of these, malformed ones that were left out, by reason
    documents: int  # of an epoch, as the three below
    tokens: int
    supervised_tokens: int
    share: float  # of the supervised among the tokens
    truncated: int  # longer than a row
    cut_before_reply: int  # whose first reply is beyond the end of a row
    left_out: int  # without a token that carries loss in a row
    longest: int  # tokens


@dataclass(frozen=True)
class Cuts:
    """Documents that a row cannot hold whole, each (documents,) bool. All False where rows are cut from a stream."""

    truncated: np.ndarray
    before_reply: np.ndarray  # the first reply is beyond the end of the row
    left_out: np.ndarray


def find_cuts(collator: Collator) -> Cuts:
    mixture = collator.mixture
    if not (collator.counts.truncated or collator.counts.left_out):
        return Cuts(*np.zeros((3, len(mixture)), dtype=bool))
    row = collator.seq_len + 1  # the last token is a target only
    first_reply = np.concatenate([cache.first_reply for cache in mixture.caches])
    before_reply = (first_reply >= row) & (first_reply < mixture.lengths)
    return Cuts(mixture.keep & (mixture.lengths > row), before_reply, ~mixture.keep)


def by_source(collator: Collator) -> dict[str, SourceStatistics]:
    """The statistics of each source, by its name."""
    mixture, cuts, epoch, found = collator.mixture, find_cuts(collator), collator.by_source(), {}
    for cache, a, b in zip(mixture.caches, mixture.starts, mixture.starts[1:], strict=False):
        counts = epoch[cache.name]
        found[cache.name] = SourceStatistics(
            records=len(cache) + cache.skipped,
            skipped=cache.malformed.by_reason(),
            documents=counts.documents,
            tokens=counts.tokens,
            supervised_tokens=counts.supervised_tokens,
            share=counts.supervised_tokens / max(1, counts.tokens),
            truncated=int(cuts.truncated[a:b].sum()),
            cut_before_reply=int(cuts.before_reply[a:b].sum()),
            left_out=int(cuts.left_out[a:b].sum()),
            longest=int(mixture.lengths[a:b].max()),
        )
    return found


def histogram(lengths: np.ndarray) -> dict[int, int]:
    """How many documents have at least so many tokens and fewer than twice as many, by powers of 2.

    >>> histogram(np.array([3, 4, 5, 20]))
    {2: 1, 4: 2, 8: 0, 16: 1}
    """
    counts = np.bincount(np.log2(np.maximum(lengths, 1)).astype(np.int64))
    first = int(np.flatnonzero(counts)[0])
    return {1 << power: int(counts[power]) for power in range(first, len(counts))}


@dataclass(frozen=True)
class Filling:
    """How full the rows of some steps are."""

    steps: int
    rows: int
    tokens: int  # padding not counted
    places: int  # padding counted
    micro_batches: int

    @property
    def share(self) -> float:
        return self.tokens / max(1, self.places)


def steps_to_sample(collator: Collator, rows_per_step: int, num_steps: int, count: int = SAMPLED_STEPS) -> list[int]:
    """Steps of the first epoch, evenly spaced, from 0."""
    steps = max(1, min(num_steps, collator.rows_in(1) // rows_per_step))
    return sorted({int(step) for step in np.linspace(0, steps - 1, min(count, steps))})


def measure_filling(collator: Collator, rows_per_step: int, num_steps: int, limits: PassLimits, world_size: int) -> Filling:
    """Of the micro-batches of all ranks in a few steps."""
    rows = tokens = places = groups = 0
    steps = steps_to_sample(collator, rows_per_step, num_steps)
    for step in steps:
        for group in collator.split_micro_batches(np.arange(rows_per_step) + step * rows_per_step, limits, world_size):
            for of_rank in group:
                batch = collator.batch(of_rank)
                rows, tokens, places = rows + len(of_rank), tokens + batch.num_tokens, places + batch.inputs.numel()
            groups += 1
    collator.mixture.release()
    return Filling(len(steps), rows, tokens, places, groups)
