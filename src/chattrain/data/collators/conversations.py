"""The collators that keep conversations whole: Padded gives each a row of its own, BestFit packs several into full rows."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from chattrain.data.batch import Batch, as_batch
from chattrain.data.collators.base import EMPTY, Collator, Counts, SourceCounts, round_up
from chattrain.data.loss_weights import LossWeights
from chattrain.data.mixture import Mixture
from chattrain.data.packing import NO_TOKENS, Rows, Tokens, best_fit, shift
from chattrain.data.passes import PassLimits, micro_batch_sizes, padded_width
from chattrain.data.recent import Recent
from chattrain.errors import UserError

PLAN_VERSION = 1  # raised when BestFit assigns documents to rows in another way; part of the cache key


class Conversations(Collator):
    """Base class of the collators that keep conversations whole. Only the assistant's tokens are targets, unless loss.* says
    more.

    A conversation is truncated to seq_len + 1 tokens (seq_len inputs and their targets). One without a token that carries loss
    among these is left out. Both are counted in `counts`. Raises UserError if no conversation is left.
    """

    def __init__(self, mixture: Mixture, seq_len: int, pad_id: int, last_epoch: int | None = None):
        self.seq_len, self.pad_id, self.last_epoch = seq_len, pad_id, last_epoch
        mixture = mixture.weighed(self.supervises)
        usable = _has_targets(mixture, seq_len + 1)
        if not usable.any():
            supervised = f"that carries loss (loss.supervise={mixture.weights.supervise.name})"
            if not mixture.worth_a_row.any():
                raise UserError(
                    f"no conversation has a token {supervised}: none has such a reply, or all are flagged off; choose another "
                    "loss.supervise, or look at the data with command=inspect loss=all"
                )
            raise UserError(
                f"no conversation has a token {supervised} within train.seq_len={seq_len} tokens; the shortest has "
                f"{int(mixture.lengths.min())} tokens in all. Raise train.seq_len"
            )
        self.mixture = mixture.restricted(usable, seq_len + 1)
        excess = mixture.lengths[self.mixture.order(0)] - (seq_len + 1)
        self.counts = Counts(
            documents=self.mixture.epoch_size,
            truncated=int((excess > 0).sum()),
            truncated_tokens=int(excess[excess > 0].sum()),
            left_out=int((~usable).sum()),
        )

    def _tokens(self, document: int | None) -> Tokens:
        """Of one conversation; none for padding."""
        if document is None:
            return NO_TOKENS
        ids, weights = (array[: self.seq_len + 1] for array in self.mixture.document(document))
        return shift(ids, weights, np.full(len(ids), self.mixture.source_of(document), dtype=np.int16))

    def _piece(self, document: int) -> tuple[int, int, int]:
        """(document, begin, end) of its tokens in a row."""
        return document, 0, min(int(self.mixture.lengths[document]), self.seq_len + 1)

    def _count(self, documents: np.ndarray) -> tuple[int, int]:
        """(tokens, targets of weight 1) of the rows that these documents are in."""
        return int(self._tokens_in_row[documents].sum()), int(self._supervised_in_row[documents].sum())

    @cached_property
    def _tokens_in_row(self) -> np.ndarray:
        """(documents,) int64: inputs of each document."""
        return np.minimum(self.mixture.lengths - 1, self.seq_len)

    @cached_property
    def _supervised_in_row(self) -> np.ndarray:
        """(documents,) int64: targets of weight 1 of each document. Those that are cut are read."""
        mixture = self.mixture
        supervised = mixture.num_supervised - mixture.starts_supervised
        for i in np.flatnonzero(mixture.keep & (mixture.lengths > self.seq_len + 1)):
            supervised[i] = int((self._tokens(int(i)).weights == 1).sum())
        mixture.release()
        return supervised

    def by_source(self) -> dict[str, SourceCounts]:
        return self._sum_by_source(self.mixture.order(0), self._tokens_in_row, self._supervised_in_row)


class Padded(Conversations):
    """One conversation a row. The rows of a micro-batch are padded to the passes.padded_width of its longest."""

    def rows_in(self, epochs: float) -> int:
        return max(1, round_up(epochs * self.mixture.epoch_size))

    def batch(self, rows: np.ndarray) -> Batch:
        tokens = [self._tokens(self._document(int(row))) for row in rows]
        width = padded_width(max(len(row.inputs) for row in tokens), self.seq_len)
        return as_batch(tokens, width, self.pad_id)

    def count(self, rows: np.ndarray) -> tuple[int, int]:
        documents = [self._document(int(row)) for row in rows]
        return self._count(np.array([i for i in documents if i is not None], dtype=np.int64))

    def pieces(self, row: int) -> list[tuple[int, int, int]]:
        document = self._document(row)
        return [] if document is None else [self._piece(document)]

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
        self._rows: Recent[Rows] = Recent(3)
        self._starts = [0]  # first row of each epoch, for the epochs computed so far

    def rows_in(self, epochs: float) -> int:
        whole, part = divmod(epochs, 1)
        rows = self._start(int(whole))
        return max(1, rows + (round_up(part * len(self.epoch_rows(int(whole)))) if part else 0))

    def batch(self, rows: np.ndarray) -> Batch:
        by_row = [[self._tokens(i) for i in self._documents(int(row))] for row in rows]
        sizes = [[len(document.inputs) for document in documents] for documents in by_row]
        tokens = [Tokens.join(documents) for documents in by_row]
        return as_batch(tokens, self.seq_len, self.pad_id, sizes if self.isolate_documents else None)

    def count(self, rows: np.ndarray) -> tuple[int, int]:
        return self._count(np.array([i for row in rows for i in self._documents(int(row))], dtype=np.int64))

    def pieces(self, row: int) -> list[tuple[int, int, int]]:
        return [self._piece(i) for i in self._documents(row)]

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

    def epoch_rows(self, epoch: int) -> Rows:
        return self._rows.get(epoch, self._epoch_rows)

    def _epoch_rows(self, epoch: int) -> Rows:
        key: list = [PLAN_VERSION, self.seq_len, epoch]
        if (weights := self.mixture.weights) != LossWeights(self.supervises):  # which decides what is left out
            key += [weights.supervise.name, weights.prompts_count]
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
    """(documents,) bool: does one of the first `length` tokens carry loss?

    Only some documents are read: those whose tokens with loss could all be after the first `length` tokens.
    """
    beyond, least = mixture.lengths - length, 1 if mixture.weights.rows_need_replies else np.finfo(np.float32).tiny
    has_targets = mixture.worth_a_row > 0
    for i in np.flatnonzero(has_targets & (beyond > 0) & (mixture.worth_a_row <= beyond)):
        has_targets[i] = (mixture.document(int(i))[1][:length] >= least).any()
    mixture.release()
    return has_targets
