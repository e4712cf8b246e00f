"""The interface of collators, which turn row indices into a `Batch`. All return the same type, so the loop does not know which
collator it uses.

B rows, T tokens. Row indices count over all epochs, and any process can build any row. So the data of a step depends on
(seed, step) only, and resuming needs no replay. Row index EMPTY gives a row of padding without targets.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from chattrain.config.words import Supervise
from chattrain.data.batch import Batch
from chattrain.data.mixture import Mixture
from chattrain.data.passes import PassLimits
from chattrain.errors import UserError

EMPTY = -1


@dataclass
class Counts:
    """Documents of the first epoch, and what their rows leave out. For the log and summary.json."""

    documents: int = 0
    truncated: int = 0  # documents cut at seq_len
    truncated_tokens: int = 0
    left_out: int = 0  # documents of the sources without a token that carries loss within seq_len, which have no row


@dataclass(frozen=True)
class SourceCounts:
    """What the first epoch holds of a source, after what is cut and left out."""

    documents: int
    tokens: int
    supervised_tokens: int  # of weight 1


class Collator(ABC):
    """The interface that the loader uses."""

    supervises = Supervise.assistant  # what loss.supervise=auto means with it
    follows_loss_keys = True  # False: it weighs tokens in another way than the keys loss.* say, so the audit compares none
    mixture: Mixture
    seq_len: int  # tokens a row, at most
    counts: Counts

    @abstractmethod
    def rows_in(self, epochs: float) -> int:
        """The number of rows that this many epochs fill. The last row is completed with documents of the next epoch."""

    @abstractmethod
    def batch(self, rows: np.ndarray) -> Batch:
        """The micro-batch of these row indices (B,)."""

    def count(self, rows: np.ndarray) -> tuple[int, int]:
        """(tokens without padding, targets of weight 1) of these row indices (B,)."""
        batch = self.batch(rows)
        return batch.num_tokens, batch.num_supervised

    def by_source(self) -> dict[str, SourceCounts]:
        """What the first epoch holds of each source, by its name; rows may cut it where they begin and end."""
        return self._sum_by_source(self.mixture.order(0), self.mixture.lengths, self.mixture.num_supervised)

    def _sum_by_source(self, drawn: np.ndarray, tokens: np.ndarray, supervised: np.ndarray) -> dict[str, SourceCounts]:
        """From the documents of an epoch (drawn,), and tokens and supervised tokens of each document (documents,)."""
        sources, found = np.searchsorted(self.mixture.starts, drawn, side="right") - 1, {}
        for i, cache in enumerate(self.mixture.caches):
            here = drawn[sources == i]
            found[cache.name] = SourceCounts(len(here), int(tokens[here].sum()), int(supervised[here].sum()))
        return found

    def pieces(self, row: int) -> list[tuple[int, int, int]] | None:
        """The documents that a row is made of, in order: (document, begin, end) for its tokens begin to end. The last token of a
        row, or of each document where they are joined without it, is a target only. None: the collator does not say."""
        return None

    @abstractmethod
    def describe(self, row: int) -> str:
        """The documents that a row is made of, for messages."""

    def split_micro_batches(self, rows: np.ndarray, limits: PassLimits, world_size: int) -> list[np.ndarray]:
        """Split row indices into micro-batches, the forward passes of a step: (world_size, rows) indices each.

        All ranks get the same number of micro-batches, with the same number of rows in each. Here rows are full, so each has
        limits.rows of them, the last one filled with EMPTY rows.
        """
        rows = np.concatenate([rows, np.full(-len(rows) % (limits.rows * world_size), EMPTY)])
        return list(rows.reshape(-1, world_size, limits.rows))

    def steps_in(self, epochs: float, rows_per_step: int) -> int:
        return math.ceil(self.rows_in(epochs) / rows_per_step)

    def steps_within(self, rows_per_step: int, tokens: int | None = None, supervised: int | None = None) -> int:
        """The number of the first step, counted from 1, with which all steps so far have this many tokens, or supervised tokens.
        Raises UserError where an epoch has none."""
        index, wanted = (0, tokens) if supervised is None else (1, supervised)
        assert wanted is not None
        reached, step, steps_per_epoch = 0, 0, self.steps_in(1, rows_per_step)
        while reached < wanted:
            reached += self.count(np.arange(step * rows_per_step, (step + 1) * rows_per_step))[index]
            step += 1
            if step == steps_per_epoch and not reached:
                raise UserError(f"an epoch has no {'supervised ' * index}token: no number of steps reaches {wanted}")
        self.mixture.release()
        return step


def round_up(count: float) -> int:
    """Round up, ignoring floating-point error.

    >>> round_up(1.1 * 10), round_up(10.2)
    (11, 11)
    """
    return math.ceil(round(count, 6))
