"""Rows of tokens to batches. Every collator yields the same `Batch`; the loop does not know which one it runs.

B rows, T tokens. A row is asked for by its number, counted over all epochs: any process can make any row, so order
follows from (seed, step) alone and resuming is a look-up. Row number EMPTY gives a row of padding without targets.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from chattrain.data.batch import Batch, as_batch
from chattrain.data.mixture import Mixture
from chattrain.data.packing import IGNORE_INDEX, Rows, best_fit, padded_width, shift, split, stretch
from chattrain.errors import UserError

EMPTY = -1
PLAN_VERSION = 1  # of BestFit's rows
PASS_COST = 1 / 48  # what a micro-batch costs beside its tokens, as a share of the largest one's: weights cast, kernels launched


@dataclass
class Counts:
    """What the rows leave out, for the log and the summary."""

    documents: int = 0
    truncated: int = 0  # documents cut at seq_len
    truncated_tokens: int = 0
    left_out: int = 0  # documents without a supervised token within seq_len


class Collator(ABC):
    """What loader and loop ask of a collator."""

    mixture: Mixture
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

    def split_micro_batches(self, rows: np.ndarray, device_batch_size: int, world_size: int) -> list[np.ndarray]:
        """Rows, in whole turns of all ranks, as micro-batches: (world_size, up to device_batch_size) row numbers each.

        All ranks get equally many micro-batches, of equally many rows.
        """
        return list(rows.reshape(-1, world_size, device_batch_size))

    def steps_in(self, epochs: float, rows_per_step: int) -> int:
        return math.ceil(self.rows_in(epochs) / rows_per_step)


class Packed(Collator):
    """The documents of all epochs as one token stream, cut into full rows; every token is a target.

    Row r has inputs stream[rT : rT + T] and targets one further, so each token is an input once and a target once.
    With `last_epoch` the stream ends there (for evaluation): what lies behind is padding without targets.
    `isolate_documents`: attention stays within a document, and the first token of one is no target.
    """

    def __init__(
        self, mixture: Mixture, seq_len: int, pad_id: int, last_epoch: int | None = None, isolate_documents: bool = False
    ):
        self.mixture, self.seq_len, self.pad_id, self.last_epoch = mixture, seq_len, pad_id, last_epoch
        self.isolate_documents = isolate_documents
        self.counts = Counts(documents=mixture.epoch_size)
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
        pairs, sizes = [], []
        for row in rows:
            start = int(row) * self.seq_len
            parts = self._parts(start, start + self.seq_len + 1) if row != EMPTY else []
            ids = np.concatenate([self.mixture.document(i)[0][a:b] for i, a, b in parts]) if parts else np.empty(0, np.int64)
            inputs, targets = shift(ids) if len(ids) > 1 else (ids[:0], ids[:0])
            lengths = [b - a for _, a, b in parts]
            sizes.append(_within(lengths, len(inputs)))
            if self.isolate_documents:
                targets[np.cumsum(lengths, dtype=np.int64)[:-1] - 1] = IGNORE_INDEX  # the next document's first token
            pairs.append((inputs, targets))
        return as_batch(pairs, self.seq_len, self.pad_id, sizes if self.isolate_documents else None)

    def describe(self, row: int) -> str:
        parts = self._parts(row * self.seq_len, (row + 1) * self.seq_len + 1)
        return " + ".join(self.mixture.describe(document) for document, _, _ in parts)

    def _parts(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(document, from, to) of a stretch of the stream, which may run over the end of epochs."""
        epoch = 0
        while self._start(epoch + 1) <= start:
            epoch += 1
        out: list[tuple[int, int, int]] = []
        while start < stop and (self.last_epoch is None or epoch <= self.last_epoch):
            offset, end = self._start(epoch), min(stop, self._start(epoch + 1))
            order = self.mixture.order(epoch)
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
            self._ends[epoch] = np.cumsum(self.mixture.lengths[self.mixture.order(epoch)])
        return self._ends[epoch]


class Conversations(Collator):
    """Whole conversations in rows; only supervised tokens are targets.

    A conversation is cut after seq_len + 1 tokens (seq_len inputs and their targets), which is counted; one without a
    supervised token before the cut is left out, counted too. Raises UserError where that leaves none.
    """

    def __init__(self, mixture: Mixture, seq_len: int, pad_id: int, last_epoch: int | None = None):
        self.seq_len, self.pad_id, self.last_epoch = seq_len, pad_id, last_epoch
        usable = _has_targets(mixture, seq_len + 1)
        if not usable.any():
            raise UserError(
                f"no conversation has a supervised token within train.seq_len={seq_len} tokens; "
                f"the shortest has {int(mixture.lengths.min())} tokens in all. Raise train.seq_len"
            )
        self.mixture = mixture.restricted(usable)
        long = mixture.lengths[usable] > seq_len + 1
        self.counts = Counts(
            documents=self.mixture.epoch_size,
            truncated=int(long.sum()),
            truncated_tokens=int((mixture.lengths[usable][long] - seq_len - 1).sum()),
            left_out=int((~usable).sum()),
        )

    def _pair(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets) of one conversation."""
        ids, loss_mask = self.mixture.document(document)
        return shift(ids[: self.seq_len + 1], loss_mask[: self.seq_len + 1])


class Padded(Conversations):
    """One conversation a row, padded to a multiple of 8 tokens that the longest of up to device_batch_size rows fits in."""

    def rows_in(self, epochs: float) -> int:
        return max(1, _up(epochs * self.mixture.epoch_size))

    def batch(self, rows: np.ndarray) -> Batch:
        pairs = []
        for row in rows:
            document = self._document(int(row))
            if document is None:
                pairs.append((np.empty(0, np.int64), np.empty(0, np.int64)))
                continue
            pairs.append(self._pair(document))
        width = padded_width(max(len(x) for x, _ in pairs), self.seq_len)
        return as_batch(pairs, width, self.pad_id)

    def describe(self, row: int) -> str:
        return self.mixture.describe(self._document(row))

    def split_micro_batches(self, rows: np.ndarray, device_batch_size: int, world_size: int) -> list[np.ndarray]:
        """By length, so that rows of a micro-batch are alike and pad little, and all ranks have as much to do.

        The rows of the step stay the same set: only their split follows their lengths.
        """
        lengths = np.array(
            [min(self.mixture.lengths[self._document(int(r))] - 1, self.seq_len) if r != EMPTY else 0 for r in rows]
        )
        turns = rows[np.argsort(lengths, kind="stable")].reshape(-1, world_size)
        widths = np.array([padded_width(int(n), self.seq_len) for n in np.sort(lengths)[world_size - 1 :: world_size]])
        counts = split(widths, device_batch_size, device_batch_size * self.seq_len * PASS_COST)
        return [turns[end - count : end].T for count, end in zip(counts, np.cumsum(counts), strict=True)]

    def _document(self, row: int) -> int | None:
        epoch, i = divmod(row, self.mixture.epoch_size)
        if row == EMPTY or (self.last_epoch is not None and epoch > self.last_epoch):
            return None
        return int(self.mixture.order(epoch)[i])


class BestFit(Conversations):
    """Conversations side by side in rows of seq_len, packed so that little is left free; none that fits a row is cut.

    Each epoch is packed anew, whole (packing.best_fit), and its rows are shuffled: a function of (seed, epoch) alone.
    With isolated documents (the default) a conversation's loss is what it is in a row of its own.
    """

    def __init__(
        self, mixture: Mixture, seq_len: int, pad_id: int, last_epoch: int | None = None, isolate_documents: bool = True
    ):
        super().__init__(mixture, seq_len, pad_id, last_epoch)
        self.isolate_documents = isolate_documents
        self.plan = lru_cache(maxsize=3)(self._plan)
        self._starts = [0]  # first row of each epoch known so far

    def rows_in(self, epochs: float) -> int:
        whole, part = divmod(epochs, 1)
        rows = self._start(int(whole))
        return max(1, rows + (_up(part * len(self.plan(int(whole)))) if part else 0))

    def batch(self, rows: np.ndarray) -> Batch:
        pairs, sizes = [], []
        for row in rows:
            found = [self._pair(i) for i in self._documents(int(row))]
            empty = np.empty(0, np.int64)
            pairs.append(tuple(np.concatenate([empty, *(pair[side] for pair in found)]) for side in (0, 1)))
            sizes.append([len(inputs) for inputs, _ in found])
        return as_batch(pairs, self.seq_len, self.pad_id, sizes if self.isolate_documents else None)

    def describe(self, row: int) -> str:
        return " + ".join(self.mixture.describe(i) for i in self._documents(row))

    def _documents(self, row: int) -> list[int]:
        epoch = 0
        while row != EMPTY and self._start(epoch + 1) <= row:
            epoch += 1
        if row == EMPTY or (self.last_epoch is not None and epoch > self.last_epoch):
            return []
        return self.plan(epoch)[row - self._start(epoch)].tolist()

    def _start(self, epoch: int) -> int:
        while len(self._starts) <= epoch:
            self._starts.append(self._starts[-1] + len(self.plan(len(self._starts) - 1)))
        return self._starts[epoch]

    def _plan(self, epoch: int) -> Rows:
        return Rows(**self.mixture.worked_out([PLAN_VERSION, self.seq_len, epoch], lambda: self._packed(epoch)))

    def _packed(self, epoch: int) -> dict[str, np.ndarray]:
        """The fields of `Rows`. Packing a million documents takes a second; that is done once, and not in every run."""
        order = self.mixture.order(epoch)
        row_of = best_fit(np.clip(self.mixture.lengths[order] - 1, 1, self.seq_len), self.seq_len)
        by_row = np.argsort(row_of, kind="stable")
        rows = np.split(order[by_row], np.flatnonzero(np.diff(row_of[by_row])) + 1)
        shuffled = np.random.default_rng([self.mixture.seed, epoch, len(rows)]).permutation(len(rows))
        rows = [rows[i] for i in shuffled]
        return {"documents": np.concatenate(rows), "ends": np.cumsum([0] + [len(row) for row in rows])}


def _within(sizes: list[int], total: int) -> list[int]:
    """Sizes cut so that they add up to the total at most.

    >>> _within([3, 3, 1], 5)
    [3, 2]
    """
    ends = np.minimum(np.cumsum([0, *sizes]), total)
    return [size for size in np.diff(ends).tolist() if size]


def _has_targets(mixture: Mixture, length: int) -> np.ndarray:
    """(documents,) bool: is one of the first `length` tokens supervised?

    Read are only the masks of longer documents that have no more supervised tokens than tokens beyond that length.
    """
    has = np.concatenate([cache.supervised > 0 for cache in mixture.caches])
    beyond = mixture.lengths - length
    unsure = has & (beyond > 0) & (np.concatenate([cache.supervised for cache in mixture.caches]) <= beyond)
    for i in np.flatnonzero(unsure):
        has[i] = mixture.document(int(i))[1][:length].any()
    mixture.release()
    return has


def _up(count: float) -> int:
    """Rounded up, but not for what floating point added.

    >>> _up(1.1 * 10), _up(10.2)
    (11, 11)
    """
    return math.ceil(round(count, 6))
