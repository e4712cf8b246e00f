"""Rows out of documents, as pure functions on arrays.

T tokens a row. Targets are shifted: targets[t] is the token after inputs[t], or IGNORE_INDEX where it carries no loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IGNORE_INDEX = -1
WIDTH_UNIT = 8  # tokens; widths of padded rows are multiples of it


def shift(ids: np.ndarray, loss_mask: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of one stretch of tokens; with a loss mask, unsupervised targets are ignored.

    >>> shift(np.array([5, 6, 7, 8]), np.array([0, 0, 1, 1]))
    (array([5, 6, 7]), array([-1,  7,  8]))
    """
    ids = ids.astype(np.int64)
    targets = ids[1:].copy()
    if loss_mask is not None:
        targets[loss_mask[1:] == 0] = IGNORE_INDEX
    return ids[:-1], targets


def stretch(ends: np.ndarray, start: int, stop: int) -> list[tuple[int, int, int]]:
    """Which documents tokens start to stop of a stream come from, as (document, from, to) within each.

    `ends` (documents,) are the cumulative lengths of the documents in the order of the stream.

    >>> stretch(np.array([3, 5, 9]), 2, 7)
    [(0, 2, 3), (1, 0, 2), (2, 0, 2)]
    """
    out = []
    i = int(np.searchsorted(ends, start, side="right"))
    while start < stop and i < len(ends):
        begin = int(ends[i - 1]) if i else 0
        upto = min(stop, int(ends[i]))
        out.append((i, start - begin, upto - begin))
        start, i = upto, i + 1
    return out


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """(items,) the row that each item goes to. Sizes are from 1 to the capacity.

    A row begins with the largest item that is left and takes the largest that fits, until one or two items fill it exactly,
    which best-fit decreasing would find by chance only. It is closed when nothing that is left fits. Of equal sizes the
    first item comes first; rows are numbered from 0.

    >>> best_fit(np.array([3, 5, 2, 4, 1]), 6)
    array([2, 0, 1, 1, 0])
    """
    by_size = np.argsort(sizes, kind="stable")
    counts = np.bincount(sizes, minlength=capacity + 1)
    ends = np.cumsum(counts)
    rows = np.empty(len(sizes), dtype=np.int64)
    there = counts > 0  # (capacity + 1,) sizes that are left
    row, free, left = 0, capacity, len(sizes)
    while left:
        taken = _fill(there, counts, free) or _largest(there, free)
        if not taken:
            row, free = row + 1, capacity
        for size in taken:
            rows[by_size[ends[size] - counts[size]]] = row
            counts[size] -= 1
            there[size] = counts[size] > 0
            free, left = free - size, left - 1
    return rows


def _fill(there: np.ndarray, counts: np.ndarray, free: int) -> list[int]:
    """One or two sizes that are left and fill what is free exactly, the largest possible; [] where there are none."""
    if not free or there[free]:
        return [free] if free else []
    pairs = np.flatnonzero(there[1:free] & there[free - 1 : 0 : -1]) + 1
    for size in pairs[::-1].tolist():  # of a size and its partner, the larger comes first
        if 2 * size != free or counts[size] > 1:
            return [size, free - size]
    return []


def _largest(there: np.ndarray, free: int) -> list[int]:
    """The largest size that is left and fits; [] where there is none."""
    size = free - int(there[free::-1].argmax())
    return [size] if there[size] else []


@dataclass(frozen=True)
class Rows:
    """TokenizedSource of each row of an epoch: row r has documents[ends[r] : ends[r + 1]]."""

    documents: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.documents[self.ends[row] : self.ends[row + 1]]


def positions_of(sizes: list[int], width: int) -> np.ndarray:
    """(width,) each token's place in its document, for documents of these sizes in a row; what is left over is one more.

    >>> positions_of([3, 2], 7)
    array([0, 1, 2, 0, 1, 0, 1])
    """
    return np.concatenate([np.arange(size) for size in [*sizes, width - sum(sizes)]])


def cu_seqlens_of(positions: np.ndarray, unit: int = 64) -> np.ndarray:
    """(documents + 1,) int32: where the documents of these positions (B, T) begin in the flattened rows, and their end.

    Filled up with empty documents to a multiple of `unit`, so that torch.compile meets few sizes.

    >>> cu_seqlens_of(np.array([[0, 1, 0], [0, 1, 2]]), unit=4)
    array([0, 2, 3, 6, 6], dtype=int32)
    """
    starts = np.flatnonzero(positions.ravel() == 0)
    return np.append(starts, np.full(1 + -len(starts) % unit, positions.size)).astype(np.int32)


def padded_width(length: int, seq_len: int) -> int:
    """The width that rows of up to `length` tokens are padded to: a multiple of 8, which the products of a GPU want, or seq_len.

    >>> [padded_width(n, 200) for n in (1, 33, 64, 197)]
    [8, 40, 64, 200]
    """
    return min(-(-max(length, 1) // WIDTH_UNIT) * WIDTH_UNIT, seq_len)


def split(widths: np.ndarray, most_rows: int, pass_cost: float) -> list[int]:
    """How many rows each micro-batch gets of rows in ascending order of their widths, at most `most_rows`.

    The split with the fewest tokens, padding included, where a micro-batch itself costs as much as `pass_cost` tokens. A row is
    alone only where it must be: torch.compile compiles anew for a size of 1.

    >>> split(np.array([8, 8, 8, 64, 72]), most_rows=4, pass_cost=20)
    [3, 2]
    """
    least, begin = np.zeros(len(widths) + 1), np.zeros(len(widths) + 1, dtype=np.int64)
    alone = float(widths.sum()) + pass_cost * len(widths) if most_rows > 1 else 0.0
    for end in range(1, len(widths) + 1):
        begins = np.arange(max(0, end - most_rows), end)
        costs = least[begins] + (end - begins) * float(widths[end - 1]) + pass_cost + alone * (end - begins == 1)
        begin[end] = begins[costs.argmin()]
        least[end] = costs.min()
    counts, end = [], len(widths)
    while end:
        counts.append(int(end - begin[end]))
        end = begin[end]
    return counts[::-1]


def pad_rows(rows: list[tuple[np.ndarray, np.ndarray]], width: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(B, width) inputs filled up with pad_id and targets filled up with IGNORE_INDEX.

    >>> inputs, targets = pad_rows([(np.array([1, 2]), np.array([2, 3])), (np.array([4]), np.array([5]))], 3, pad_id=9)
    >>> inputs.tolist(), targets.tolist()
    ([[1, 2, 9], [4, 9, 9]], [[2, 3, -1], [5, -1, -1]])
    """
    inputs = np.full((len(rows), width), pad_id, dtype=np.int64)
    targets = np.full((len(rows), width), IGNORE_INDEX, dtype=np.int64)
    for b, (x, y) in enumerate(rows):
        inputs[b, : len(x)] = x
        targets[b, : len(y)] = y
    return inputs, targets
