"""Documents to rows, as pure functions on arrays.

B rows, T tokens a row. Targets are shifted: targets[t] is the token after inputs[t], or IGNORE_INDEX if it carries no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

IGNORE_INDEX = -1


class Tokens(NamedTuple):
    """Consecutive tokens, shifted: each (T,)."""

    inputs: np.ndarray  # int64
    targets: np.ndarray  # int64; IGNORE_INDEX where the weight is 0
    weights: np.ndarray  # fp32: how much each target's loss counts
    sources: np.ndarray  # int16: index of each target's source in the mixture

    @classmethod
    def join(cls, parts: Sequence[Tokens]) -> Tokens:
        """The parts one after the other; none gives no tokens."""
        return cls(*(np.concatenate(arrays) for arrays in zip(NO_TOKENS, *parts, strict=True)))


def shift(ids: np.ndarray, weights: np.ndarray | None = None, sources: np.ndarray | None = None) -> Tokens:
    """Inputs and targets of consecutive tokens with their weights (None: 1) and sources (None: 0), all (T + 1,). Targets of
    weight 0 are IGNORE_INDEX.

    >>> tokens = shift(np.array([5, 6, 7, 8]), np.array([0, 0, 0.5, 1], dtype=np.float32))
    >>> tokens.inputs.tolist(), tokens.targets.tolist(), tokens.weights.tolist()
    ([5, 6, 7], [-1, 7, 8], [0.0, 0.5, 1.0])
    """
    ids = ids.astype(np.int64)
    weights = np.ones(len(ids), np.float32) if weights is None else weights
    sources = np.zeros(len(ids), np.int16) if sources is None else sources
    return Tokens(ids[:-1], np.where(weights[1:] > 0, ids[1:], IGNORE_INDEX), weights[1:], sources[1:])


NO_TOKENS = Tokens(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.int16))


def slice_stream(ends: np.ndarray, start: int, stop: int) -> list[tuple[int, int, int]]:
    """Tokens start to stop of a stream, as slices (document, begin, end) of the documents that it is made of.

    `ends` (documents,): cumulative lengths of the documents in the order of the stream.

    >>> slice_stream(np.array([3, 5, 9]), 2, 7)
    [(0, 2, 3), (1, 0, 2), (2, 0, 2)]
    """
    slices = []
    i = int(np.searchsorted(ends, start, side="right"))
    while start < stop and i < len(ends):
        offset = int(ends[i - 1]) if i else 0
        end = min(stop, int(ends[i]))
        slices.append((i, start - offset, end - offset))
        start, i = end, i + 1
    return slices


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """(items,) int64: the index of the row that each item is packed into. Sizes are from 1 to `capacity`.

    A row starts with the largest remaining item and keeps taking the largest item that fits. As soon as one or two items fill
    it exactly, it takes those: plain best-fit decreasing finds exact fits only by chance. A row is closed when no remaining
    item fits. Items of equal size are taken in their order.

    >>> best_fit(np.array([3, 5, 2, 4, 1]), 6)
    array([2, 0, 1, 1, 0])
    """
    by_size = np.argsort(sizes, kind="stable")
    counts = np.bincount(sizes, minlength=capacity + 1)
    ends = np.cumsum(counts)
    row_of = np.empty(len(sizes), dtype=np.int64)
    available = counts > 0  # (capacity + 1,) bool: does any remaining item have this size?
    row, free, remaining = 0, capacity, len(sizes)
    while remaining:
        chosen = _exact_fit(available, counts, free) or _largest_fit(available, free)
        if not chosen:
            row, free = row + 1, capacity
        for size in chosen:
            row_of[by_size[ends[size] - counts[size]]] = row
            counts[size] -= 1
            available[size] = counts[size] > 0
            free, remaining = free - size, remaining - 1
    return row_of


def _exact_fit(available: np.ndarray, counts: np.ndarray, free: int) -> list[int]:
    """One or two available sizes whose sum is exactly `free`, with the largest possible first; [] if there are none."""
    if not free or available[free]:
        return [free] if free else []
    pairs = np.flatnonzero(available[1:free] & available[free - 1 : 0 : -1]) + 1
    for size in pairs[::-1].tolist():  # each pair is found from both sides; reversed, the larger size comes first
        if 2 * size != free or counts[size] > 1:
            return [size, free - size]
    return []


def _largest_fit(available: np.ndarray, free: int) -> list[int]:
    """The largest available size up to `free`; [] if there is none."""
    size = free - int(available[free::-1].argmax())
    return [size] if available[size] else []


@dataclass(frozen=True)
class Rows:
    """The documents of each row of an epoch: row r has documents[ends[r] : ends[r + 1]]."""

    documents: np.ndarray  # (documents,) int64, indices in the mixture
    ends: np.ndarray  # (rows + 1,) int64, from 0

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.documents[self.ends[row] : self.ends[row + 1]]


def positions_of(sizes: list[int], width: int) -> np.ndarray:
    """(width,): the position of each token in its document, in a row of documents of these sizes. The padding after them is
    one more document.

    >>> positions_of([3, 2], 7)
    array([0, 1, 2, 0, 1, 0, 1])
    """
    return np.concatenate([np.arange(size) for size in [*sizes, width - sum(sizes)]])


def cu_seqlens_of(positions: np.ndarray, unit: int = 64) -> np.ndarray:
    """(documents + 1,) int32: where each document of positions (B, T) starts in the flattened rows, then B x T.

    Empty documents are appended until the length is 1 + a multiple of `unit`, so that torch.compile sees few sizes.

    >>> cu_seqlens_of(np.array([[0, 1, 0], [0, 1, 2]]), unit=4)
    array([0, 2, 3, 6, 6], dtype=int32)
    """
    starts = np.flatnonzero(positions.ravel() == 0)
    return np.append(starts, np.full(1 + -len(starts) % unit, positions.size)).astype(np.int32)


def pad_rows(rows: Sequence[Tokens], width: int, pad_id: int) -> Tokens:
    """Inputs, targets, weights and sources, each (B, width), padded with pad_id, IGNORE_INDEX, 0 and 0. Raises ValueError for a
    longer row.

    >>> rows = pad_rows([shift(np.array([1, 2, 3])), shift(np.array([4, 5]))], 3, pad_id=9)
    >>> rows.inputs.tolist(), rows.targets.tolist(), rows.weights.tolist()
    ([[1, 2, 9], [4, 9, 9]], [[2, 3, -1], [5, -1, -1]], [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    """
    inputs = np.full((len(rows), width), pad_id, dtype=np.int64)
    targets = np.full((len(rows), width), IGNORE_INDEX, dtype=np.int64)
    weights = np.zeros((len(rows), width), dtype=np.float32)
    sources = np.zeros((len(rows), width), dtype=np.int16)
    padded = Tokens(inputs, targets, weights, sources)
    for b, row in enumerate(rows):
        for whole, part in zip(padded, row, strict=True):
            whole[b, : len(part)] = part
    return padded
