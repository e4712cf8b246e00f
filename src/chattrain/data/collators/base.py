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

EMPTY = -1


@dataclass
class Counts:
    """Documents of an epoch, and what their rows leave out. For the log and summary.json."""

    documents: int = 0
    truncated: int = 0  # documents cut at seq_len
    truncated_tokens: int = 0
    left_out: int = 0  # documents without a token that carries loss within seq_len, which have no row


class Collator(ABC):
    """The interface that the loader uses."""

    supervises = Supervise.assistant  # what loss.supervise=auto means with it
    mixture: Mixture
    seq_len: int  # tokens a row, at most
    counts: Counts

    @abstractmethod
    def rows_in(self, epochs: float) -> int:
        """The number of rows that this many epochs fill. The last row is completed with documents of the next epoch."""

    @abstractmethod
    def batch(self, rows: np.ndarray) -> Batch:
        """The micro-batch of these row indices (B,)."""

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


def round_up(count: float) -> int:
    """Round up, ignoring floating-point error.

    >>> round_up(1.1 * 10), round_up(10.2)
    (11, 11)
    """
    return math.ceil(round(count, 6))
