"""Packed: the documents of all epochs as one token stream, cut into full rows."""

from __future__ import annotations

import math

import numpy as np

from chattrain.config.words import Supervise
from chattrain.data.batch import Batch, as_batch
from chattrain.data.collators.base import EMPTY, Collator, Counts, SourceCounts, round_up
from chattrain.data.mixture import Mixture
from chattrain.data.packing import NO_TOKENS, Tokens, shift, slice_stream


class Packed(Collator):
    """The documents of all epochs, concatenated to one token stream and cut into full rows. Every token is a target, unless
    loss.supervise says which.

    Row r has inputs stream[rT : rT + T] and targets stream[rT + 1 : rT + T + 1], so each token is an input once and a target
    once. `last_epoch`: the stream ends after this epoch (for evaluation), and rows are padded beyond it.
    `isolate_documents`: attention stays within a document, and the first token of a document is not a target.
    """

    supervises = Supervise.all

    def __init__(
        self, mixture: Mixture, seq_len: int, pad_id: int, last_epoch: int | None = None, isolate_documents: bool = False
    ):
        self.mixture = mixture.weighed(self.supervises)
        self.seq_len, self.pad_id, self.last_epoch = seq_len, pad_id, last_epoch
        self.isolate_documents = isolate_documents
        self.counts = Counts(documents=mixture.epoch_size)
        self._starts = [0]  # offset of each epoch in the stream, for the epochs computed so far
        self._ends: dict[int, np.ndarray] = {}  # epoch -> cumulative lengths of its documents

    def rows_in(self, epochs: float) -> int:
        whole, part = divmod(epochs, 1)
        tokens = self._start(int(whole))
        if part:
            ends = self._epoch_ends(int(whole))
            tokens += int(ends[max(0, round_up(part * len(ends)) - 1)])
        return max(1, math.ceil((tokens - 1) / self.seq_len))

    def batch(self, rows: np.ndarray) -> Batch:
        tokens, sizes = [], []
        for row in rows:
            slices = self._slices_of(int(row))
            tokens.append(self._tokens(slices))
            sizes.append(_cut_to_total([b - a for _, a, b in slices], len(tokens[-1].inputs)))
        return as_batch(tokens, self.seq_len, self.pad_id, sizes if self.isolate_documents else None)

    def count(self, rows: np.ndarray) -> tuple[int, int]:
        """Of consecutive rows, or of any rows one by one."""
        if len(rows) and (np.diff(rows) == 1).all() and rows[0] != EMPTY:
            start = int(rows[0]) * self.seq_len
            slices = self._slices(start, start + len(rows) * self.seq_len + 1)
            size = sum(b - a for _, a, b in slices)
            return max(0, size - 1), self._num_targets(slices) if size > 1 else 0
        return super().count(rows)

    def by_source(self) -> dict[str, SourceCounts]:
        supervised = self.mixture.num_supervised
        if self.isolate_documents:  # the first token of a document is no target
            supervised = supervised - self.mixture.starts_supervised
        return self._sum_by_source(self.mixture.order(0), self.mixture.lengths, supervised)

    def _num_targets(self, slices: list[tuple[int, int, int]]) -> int:
        """Targets of weight 1 in consecutive slices, whose first token is no target."""
        mixture, found = self.mixture, 0
        for number, (i, a, b) in enumerate(slices):
            whole = (a, b) == (0, int(mixture.lengths[i]))
            found += int(mixture.num_supervised[i]) if whole else int((mixture.document(i)[1][a:b] == 1).sum())
            if number and self.isolate_documents:
                found -= int(mixture.starts_supervised[i])
        i, a, _ = slices[0]
        return found - int(mixture.document(i)[1][a] == 1)

    def _tokens(self, slices: list[tuple[int, int, int]]) -> Tokens:
        """Of consecutive slices; none for fewer than two tokens, of which none is the target of another."""
        if sum(b - a for _, a, b in slices) < 2:
            return NO_TOKENS
        documents = [(*self.mixture.document(i), np.full(b, self.mixture.source_of(i), dtype=np.int16)) for i, _, b in slices]
        ids, weights, sources = (
            np.concatenate([document[part][a:b] for document, (_, a, b) in zip(documents, slices, strict=True)])
            for part in range(3)
        )
        if self.isolate_documents:
            weights[np.cumsum([b - a for _, a, b in slices])[:-1]] = 0  # first token of each following document
        return shift(ids, weights, sources)

    def pieces(self, row: int) -> list[tuple[int, int, int]]:
        return self._slices_of(row)

    def describe(self, row: int) -> str:
        return " + ".join(self.mixture.describe(document) for document, _, _ in self._slices_of(row))

    def _slices_of(self, row: int) -> list[tuple[int, int, int]]:
        return self._slices(row * self.seq_len, (row + 1) * self.seq_len + 1) if row != EMPTY else []

    def _slices(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Tokens start to stop of the stream as (document, begin, end). They may span several epochs."""
        epoch = 0
        while self._start(epoch + 1) <= start:
            epoch += 1
        slices: list[tuple[int, int, int]] = []
        while start < stop and (self.last_epoch is None or epoch <= self.last_epoch):
            offset, end = self._start(epoch), min(stop, self._start(epoch + 1))
            order = self.mixture.order(epoch)
            in_epoch = slice_stream(self._epoch_ends(epoch), start - offset, end - offset)
            slices += [(int(order[i]), a, b) for i, a, b in in_epoch]
            start, epoch = end, epoch + 1
        return slices

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


def _cut_to_total(sizes: list[int], total: int) -> list[int]:
    """Sizes cut at the end so that their sum is at most `total`.

    >>> _cut_to_total([3, 3, 1], 5)
    [3, 2]
    """
    ends = np.minimum(np.cumsum([0, *sizes]), total)
    return [size for size in np.diff(ends).tolist() if size]
