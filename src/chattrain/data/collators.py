"""Rows of tokens to batches. Every collator yields the same `Batch`; the loop does not know which one it runs.

B rows, T tokens. A row is asked for by its number, counted over all epochs: any process can make any row, so order
follows from (seed, step) alone and resuming is a look-up. Row number EMPTY gives a row of padding without targets.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from chattrain.data.mixture import Mixture
from chattrain.data.packing import bucket, pad_rows, shift, stretch
from chattrain.errors import UserError

EMPTY = -1


class Batch(NamedTuple):
    """One micro-batch. inputs and targets are (B, T) int64, already shifted; IGNORE_INDEX where there is no target."""

    inputs: torch.Tensor
    targets: torch.Tensor
    num_tokens: int  # inputs that are no padding
    num_targets: int  # targets that are not ignored

    def to(self, device: torch.device) -> Batch:
        pinned = device.type == "cuda"  # elsewhere an asynchronous copy may read memory that is gone
        return self._replace(inputs=self.inputs.to(device, non_blocking=pinned),
                             targets=self.targets.to(device, non_blocking=pinned))


@dataclass
class Counts:
    """What the rows leave out, for the log and the summary."""

    documents: int = 0
    truncated: int = 0  # documents cut at seq_len
    truncated_tokens: int = 0
    left_out: int = 0  # documents without a supervised token within seq_len


class Collator(ABC):
    """What loader and loop ask of a collator."""

    counts: Counts

    @abstractmethod
    def rows_in(self, epochs: float) -> int:
        """Rows that hold this many epochs; what does not fill the last row is filled from the epoch after."""

    @abstractmethod
    def batch(self, rows: np.ndarray) -> Batch:
        """The micro-batch of these row numbers."""

    @abstractmethod
    def describe(self, row: int) -> str:
        """Which documents a row is made of, for messages."""

    def arrange(self, rows: np.ndarray) -> np.ndarray:
        """The rows of a step in the order in which they are dealt to micro-batches and ranks."""
        return rows

    def steps_in(self, epochs: float, rows_per_step: int) -> int:
        return math.ceil(self.rows_in(epochs) / rows_per_step)


class Packed(Collator):
    """The documents of all epochs as one token stream, cut into full rows; every token is a target.

    Row r has inputs stream[rT : rT + T] and targets one further, so each token is an input once and a target once.
    With `last_epoch` the stream ends there (for evaluation): what lies behind is padding without targets.
    """

    def __init__(self, documents: Mixture, seq_len: int, pad_id: int, last_epoch: int | None = None):
        self.documents, self.seq_len, self.pad_id, self.last_epoch = documents, seq_len, pad_id, last_epoch
        self.counts = Counts(documents=documents.epoch_size)
        self._starts = [0]  # of each epoch known so far, in tokens of the stream
        self._ends: dict[int, np.ndarray] = {}

    def rows_in(self, epochs: float) -> int:
        whole, part = divmod(epochs, 1)
        tokens = self._start(int(whole))
        if part:
            ends = self._epoch_ends(int(whole))
            tokens += int(ends[max(0, _up(part * len(ends)) - 1)])
        return max(1, math.ceil((tokens - 1) / self.seq_len))

    def batch(self, rows: np.ndarray) -> Batch:
        pairs = []
        for row in rows:
            start = int(row) * self.seq_len
            ids = self._tokens(start, start + self.seq_len + 1) if row != EMPTY else np.empty(0, np.int64)
            pairs.append(shift(ids) if len(ids) > 1 else (ids[:0], ids[:0]))
        return _as_batch(pairs, self.seq_len, self.pad_id)

    def describe(self, row: int) -> str:
        parts = self._parts(row * self.seq_len, (row + 1) * self.seq_len + 1)
        return " + ".join(self.documents.describe(document) for document, _, _ in parts)

    def _tokens(self, start: int, stop: int) -> np.ndarray:
        pieces = [self.documents.document(i)[0][a:b] for i, a, b in self._parts(start, stop)]
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def _parts(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(document, from, to) of a stretch of the stream, which may run over the end of epochs."""
        epoch = 0
        while self._start(epoch + 1) <= start:
            epoch += 1
        out: list[tuple[int, int, int]] = []
        while start < stop and (self.last_epoch is None or epoch <= self.last_epoch):
            offset, end = self._start(epoch), min(stop, self._start(epoch + 1))
            order = self.documents.order(epoch)
            found = stretch(self._epoch_ends(epoch), start - offset, end - offset)
            out += [(int(order[i]), a, b) for i, a, b in found]
            start, epoch = end, epoch + 1
        return out

    def _start(self, epoch: int) -> int:
        while len(self._starts) <= epoch:
            self._starts.append(self._starts[-1] + int(self._epoch_ends(len(self._starts) - 1)[-1]))
        return self._starts[epoch]

    def _epoch_ends(self, epoch: int) -> np.ndarray:
        if epoch not in self._ends:
            if len(self._ends) > 3:
                self._ends.pop(min(self._ends))
            self._ends[epoch] = np.cumsum(self.documents.lengths[self.documents.order(epoch)])
        return self._ends[epoch]


class Masked(Collator):
    """One conversation a row, padded; only supervised tokens are targets.

    A conversation is cut after seq_len + 1 tokens (seq_len inputs and their targets), which is counted; one without a
    supervised token before the cut is left out, counted too. Raises UserError where that leaves none.
    """

    def __init__(self, documents: Mixture, seq_len: int, pad_id: int, last_epoch: int | None = None):
        self.seq_len, self.pad_id, self.last_epoch = seq_len, pad_id, last_epoch
        usable = _has_targets(documents, seq_len + 1)
        if not usable.any():
            raise UserError(f"no conversation has a supervised token within train.seq_len={seq_len} tokens; "
                            f"the shortest has {int(documents.lengths.min())} tokens in all. Raise train.seq_len")
        self.documents = documents.restricted(usable)
        long = documents.lengths[usable] > seq_len + 1
        self.counts = Counts(documents=self.documents.epoch_size, truncated=int(long.sum()),
                             truncated_tokens=int((documents.lengths[usable][long] - seq_len - 1).sum()),
                             left_out=int((~usable).sum()))

    def rows_in(self, epochs: float) -> int:
        return max(1, _up(epochs * self.documents.epoch_size))

    def batch(self, rows: np.ndarray) -> Batch:
        pairs = []
        for row in rows:
            document = self._document(int(row))
            if document is None:
                pairs.append((np.empty(0, np.int64), np.empty(0, np.int64)))
                continue
            ids, loss_mask = self.documents.document(document)
            pairs.append(shift(ids[: self.seq_len + 1], loss_mask[: self.seq_len + 1]))
        width = bucket(max(len(x) for x, _ in pairs), self.seq_len)
        return _as_batch(pairs, width, self.pad_id)

    def describe(self, row: int) -> str:
        return self.documents.describe(self._document(row))

    def arrange(self, rows: np.ndarray) -> np.ndarray:
        """By length: rows of a micro-batch are alike and pad little. The rows of the step stay the same set."""
        lengths = [min(self.documents.lengths[self._document(int(r))], self.seq_len + 1) if r != EMPTY else 0
                   for r in rows]
        return rows[np.argsort(lengths, kind="stable")]

    def _document(self, row: int) -> int | None:
        epoch, i = divmod(row, self.documents.epoch_size)
        if row == EMPTY or (self.last_epoch is not None and epoch > self.last_epoch):
            return None
        return int(self.documents.order(epoch)[i])


def _has_targets(documents: Mixture, length: int) -> np.ndarray:
    """(documents,) bool: is one of the first `length` tokens supervised? Only the masks of longer documents are read."""
    has = np.concatenate([cache.supervised > 0 for cache in documents.caches])
    for i in np.flatnonzero(has & (documents.lengths > length)):
        has[i] = documents.document(int(i))[1][:length].any()
    return has


def _up(count: float) -> int:
    """Rounded up, but not for what floating point added.

    >>> _up(1.1 * 10), _up(10.2)
    (11, 11)
    """
    return math.ceil(round(count, 6))


def _as_batch(pairs: list[tuple[np.ndarray, np.ndarray]], width: int, pad_id: int) -> Batch:
    inputs, targets = pad_rows(pairs, width, pad_id)
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), num_tokens=sum(len(x) for x, _ in pairs),
                 num_targets=int((targets >= 0).sum()))
