"""The collators that keep conversations whole: Padded gives each a row of its own, BestFit packs several into full rows."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from chattrain.data.batch import Batch, as_batch
from chattrain.data.collators.base import EMPTY, Collator, Counts, round_up
from chattrain.data.mixture import Mixture
from chattrain.data.packing import Rows, best_fit, shift
from chattrain.data.passes import PassLimits, micro_batch_sizes, padded_width
from chattrain.errors import UserError

PLAN_VERSION = 1  # raised when BestFit assigns documents to rows in another way; part of the cache key


class Conversations(Collator):
    """Base class of the collators that keep conversations whole. Only supervised tokens are targets.

    A conversation is truncated to seq_len + 1 tokens (seq_len inputs and their targets). One without a supervised token among
    these is left out. Both are counted in `counts`. Raises UserError if no conversation is left.
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
        excess = mixture.lengths[usable] - (seq_len + 1)
        self.counts = Counts(
            documents=self.mixture.epoch_size,
            truncated=int((excess > 0).sum()),
            truncated_tokens=int(excess[excess > 0].sum()),
            left_out=int((~usable).sum()),
        )

    def _pair(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets) of one conversation."""
        ids, loss_mask = self.mixture.document(document)
        return shift(ids[: self.seq_len + 1], loss_mask[: self.seq_len + 1])


class Padded(Conversations):
    """One conversation a row. The rows of a micro-batch are padded to the passes.padded_width of its longest."""

    def rows_in(self, epochs: float) -> int:
        return max(1, round_up(epochs * self.mixture.epoch_size))

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
        document = self._document(row)
        return "padding" if document is None else self.mixture.describe(document)

    def split_micro_batches(self, rows: np.ndarray, limits: PassLimits, world_size: int) -> list[np.ndarray]:
        """Rows of similar length share a micro-batch until limits.tokens are full, so that there are few of them with little
        padding, and all ranks have equal work. `rows`: a multiple of world_size.

        The set of rows in the step does not change; EMPTY ones are added where the device takes only some numbers of rows.
        """
        lengths = np.array(
            [min(self.mixture.lengths[self._document(int(r))] - 1, self.seq_len) if r != EMPTY else 0 for r in rows]
        )
        by_length = rows[np.argsort(lengths, kind="stable")].reshape(-1, world_size)  # row k of each rank: similar lengths
        longest = np.sort(lengths)[world_size - 1 :: world_size]  # of the k-th rows of all ranks
        counts = micro_batch_sizes(np.array([padded_width(int(n), self.seq_len) for n in longest]), limits)
        groups = np.split(by_length.T, np.cumsum(counts)[:-1], axis=1)
        return [np.pad(g, ((0, 0), (0, limits.filled(g.shape[1]) - g.shape[1])), constant_values=EMPTY) for g in groups]

    def _document(self, row: int) -> int | None:
        """The document of a row; None for padding: an EMPTY row, or one after the last epoch."""
        epoch, i = divmod(row, self.mixture.epoch_size)
        if row == EMPTY or (self.last_epoch is not None and epoch > self.last_epoch):
            return None
        return int(self.mixture.order(epoch)[i])


class BestFit(Conversations):
    """Several conversations a row, packed into rows of seq_len with little padding. None that fits in a row is truncated.

    Each epoch is packed separately and completely (packing.best_fit), then its rows are shuffled; both depend on (seed, epoch)
    only. With isolated documents (the default) the loss of a conversation is the same as in a row of its own.
    """

    def __init__(
        self, mixture: Mixture, seq_len: int, pad_id: int, last_epoch: int | None = None, isolate_documents: bool = True
    ):
        super().__init__(mixture, seq_len, pad_id, last_epoch)
        self.isolate_documents = isolate_documents
        self.epoch_rows = lru_cache(maxsize=3)(self._epoch_rows)
        self._starts = [0]  # first row of each epoch, for the epochs computed so far

    def rows_in(self, epochs: float) -> int:
        whole, part = divmod(epochs, 1)
        rows = self._start(int(whole))
        return max(1, rows + (round_up(part * len(self.epoch_rows(int(whole)))) if part else 0))

    def batch(self, rows: np.ndarray) -> Batch:
        pairs, sizes = [], []
        for row in rows:
            documents = [self._pair(i) for i in self._documents(int(row))]
            empty = np.empty(0, np.int64)
            inputs = np.concatenate([empty, *(x for x, _ in documents)])
            targets = np.concatenate([empty, *(y for _, y in documents)])
            pairs.append((inputs, targets))
            sizes.append([len(x) for x, _ in documents])
        return as_batch(pairs, self.seq_len, self.pad_id, sizes if self.isolate_documents else None)

    def describe(self, row: int) -> str:
        return " + ".join(self.mixture.describe(i) for i in self._documents(row))

    def _documents(self, row: int) -> list[int]:
        """The documents of a row; [] for padding: an EMPTY row, or one after the last epoch."""
        epoch = 0
        while row != EMPTY and self._start(epoch + 1) <= row:
            epoch += 1
        if row == EMPTY or (self.last_epoch is not None and epoch > self.last_epoch):
            return []
        return self.epoch_rows(epoch)[row - self._start(epoch)].tolist()

    def _start(self, epoch: int) -> int:
        while len(self._starts) <= epoch:
            self._starts.append(self._starts[-1] + len(self.epoch_rows(len(self._starts) - 1)))
        return self._starts[epoch]

    def _epoch_rows(self, epoch: int) -> Rows:
        key = [PLAN_VERSION, self.seq_len, epoch]
        return Rows(**self.mixture.load_or_compute(key, lambda: self._pack(epoch)))

    def _pack(self, epoch: int) -> dict[str, np.ndarray]:
        """The fields of `Rows` for one epoch. A million documents take about a second, so the result is cached for later runs."""
        order = self.mixture.order(epoch)
        row_of = best_fit(np.clip(self.mixture.lengths[order] - 1, 1, self.seq_len), self.seq_len)
        by_row = np.argsort(row_of, kind="stable")
        rows = np.split(order[by_row], np.flatnonzero(np.diff(row_of[by_row])) + 1)
        shuffled = np.random.default_rng([self.mixture.seed, epoch, len(rows)]).permutation(len(rows))
        rows = [rows[i] for i in shuffled]
        return {"documents": np.concatenate(rows), "ends": np.cumsum([0] + [len(row) for row in rows])}


def _has_targets(mixture: Mixture, length: int) -> np.ndarray:
    """(documents,) bool: is one of the first `length` tokens supervised?

    Only the masks of some documents are read: those whose supervised tokens could all be after the first `length` tokens.
    """
    num_supervised = np.concatenate([cache.num_supervised for cache in mixture.caches])
    beyond = mixture.lengths - length
    has_targets = num_supervised > 0
    for i in np.flatnonzero(has_targets & (beyond > 0) & (num_supervised <= beyond)):
        has_targets[i] = mixture.document(int(i))[1][:length].any()
    mixture.release()
    return has_targets
