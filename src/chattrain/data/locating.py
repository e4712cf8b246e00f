"""Where the tokens of a batch's rows come from: by what the collator says, checked against the tokens, else by the tokens alone.

T tokens a row, as in a `Batch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from chattrain.data.mixture import Mixture

Pieces = Sequence[tuple[int, int, int]]  # (document, begin, end), as Collator.pieces gives them
UNKNOWN = -1
OPENING = 8  # first tokens of a document by which it is found
BLOCK = 1 << 16  # documents whose openings are hashed at a time
P = np.uint64(0x9E3779B97F4A7C15)
INVERSE = np.uint64(pow(int(P), -1, 1 << 64))


@dataclass
class Located:
    """The inputs of a row: the document of each, and its index in that document, both (T,) int64; UNKNOWN where not known."""

    documents: np.ndarray
    positions: np.ndarray
    size: int | None = None  # inputs, behind which all is padding; None: not known

    @classmethod
    def nowhere(cls, length: int) -> Located:
        return cls(np.full(length, UNKNOWN), np.full(length, UNKNOWN))

    def place(self, at: int, document: int, begin: int, end: int) -> None:
        """Inputs `at` and following are tokens begin to end of the document."""
        self.documents[at : at + end - begin] = document
        self.positions[at : at + end - begin] = np.arange(begin, end)

    def spans(self) -> list[tuple[int, int, int, int]]:
        """(index in the row, document, begin, end) of each run of tokens of one document, in order."""
        known = np.flatnonzero(self.documents != UNKNOWN)
        if not len(known):
            return []
        same = (np.diff(self.documents[known]) == 0) & (np.diff(self.positions[known]) == 1) & (np.diff(known) == 1)
        runs = np.split(known, np.flatnonzero(~same) + 1)
        begins = [(int(run[0]), int(self.documents[run[0]]), int(self.positions[run[0]])) for run in runs]
        return [(at, document, begin, begin + len(run)) for (at, document, begin), run in zip(begins, runs, strict=True)]


def locate(inputs: np.ndarray, pieces: Pieces | None, mixture: Mixture) -> Located | None:
    """The row (T,) by the pieces that its collator names; inputs behind them are padding. None where these are other tokens, or
    none are named.

    Pieces stand one after the other as a stream, or each without its last token, which is a target only.
    """
    if pieces is None:
        return None
    for apart in (False, True):  # in this order: a stream whose last token begins a document also looks like the other
        found, at = Located.nowhere(len(inputs)), 0
        for number, (document, begin, end) in enumerate(pieces, start=1):
            end = min(end - (apart or number == len(pieces)), begin + len(inputs) - at)
            found.place(at, document, begin, end)
            at += end - begin
        if np.array_equal(_tokens(found, mixture), inputs[:at]):
            found.size = at
            return found
    return None


def _tokens(found: Located, mixture: Mixture) -> np.ndarray:
    """The tokens of the places that are known."""
    parts = [mixture.read(document)[0][begin:end] for _, document, begin, end in found.spans()]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


class Search:
    """Finds documents in rows by their tokens alone, those that a row holds whole.

    A window of tokens has the hash sum(token[j] * P**j), modulo 2**64, which the differences of its running sums give for any
    window of a row. `lengths`: hash of the first OPENING tokens -> how many tokens documents that begin so have, less the last
    one; `whole`: hash of these -> document.
    """

    def __init__(self, mixture: Mixture, rows: Sequence[np.ndarray]):
        self.mixture, self.lengths, self.whole = mixture, {}, {}
        longest = max(map(len, rows))
        self.powers = np.cumprod(np.append(np.uint64(1), np.full(longest, P)), dtype=np.uint64)
        self.inverses = np.cumprod(np.append(np.uint64(1), np.full(longest, INVERSE)), dtype=np.uint64)
        windows = np.unique(np.concatenate([self._openings(row) for row in rows]))
        lengths: dict[int, set[int]] = {}
        for start, cache in zip(mixture.starts.tolist(), mixture.caches, strict=False):
            for a in range(0, len(cache), BLOCK):
                offsets = cache.offsets[a : a + BLOCK + 1]
                sizes = np.diff(offsets) - 1
                fitting = np.flatnonzero((sizes >= OPENING) & (sizes <= longest))
                opening = self._hash(cache.tokens[offsets[fitting][:, None] + np.arange(OPENING)])
                for i in np.flatnonzero(np.isin(opening, windows)).tolist():
                    document, begin, size = fitting[i], offsets[fitting[i]], sizes[fitting[i]]
                    lengths.setdefault(int(opening[i]), set()).add(int(size))
                    self.whole[int(self._hash(cache.tokens[begin : begin + size]))] = start + a + int(document)
                cache.release()
        self.lengths = {opening: np.array(sorted(sizes, reverse=True)) for opening, sizes in lengths.items()}

    def locate(self, inputs: np.ndarray) -> Located:
        """The row (T,): the documents that it holds."""
        found, at = Located.nowhere(len(inputs)), 0
        sums = np.append(np.uint64(0), np.cumsum(inputs.astype(np.uint64) * self.powers[: len(inputs)], dtype=np.uint64))
        openings = self._openings(inputs).tolist()
        while at < len(openings):
            sizes = self.lengths.get(openings[at], np.empty(0, np.int64))
            sizes = sizes[sizes <= len(inputs) - at]
            hashes = (sums[at + sizes] - sums[at]) * self.inverses[at]
            fitting = [i for i, window in enumerate(hashes.tolist()) if window in self.whole]
            if fitting:  # the longest one
                found.place(at, self.whole[int(hashes[fitting[0]])], 0, int(sizes[fitting[0]]))
            at += int(sizes[fitting[0]]) if fitting else 1
        return found

    def _openings(self, row: np.ndarray) -> np.ndarray:
        """The hash of each OPENING tokens in a row, uint64."""
        if len(row) < OPENING:
            return np.empty(0, np.uint64)
        return self._hash(np.lib.stride_tricks.sliding_window_view(row, OPENING))

    def _hash(self, tokens: np.ndarray) -> np.ndarray:
        """Of the last dimension of tokens."""
        return tokens.astype(np.uint64) @ self.powers[: tokens.shape[-1]]
