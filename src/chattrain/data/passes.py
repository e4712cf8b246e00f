"""How many padded rows share a forward pass, and how wide it is, as pure functions.

Widths, and on CUDA numbers of rows, come from short ladders, so that kernels, plans and freed memory serve again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WIDTH_UNIT = 8  # tokens; padded rows are multiples of 8 wide, which suits the matrix products of a GPU
WIDTH_RUNGS = 16  # widths an octave, at most: every multiple of 8 up to 256, of 16 up to 512, of 32 up to 1,024

# What a pass takes whatever is in it (casting weights, starting kernels, adding gradients), in tokens computed in the same time.
# CUDA: on an H100 a pass of a 0.6B model took 110 ms for 8 rows of 256 tokens and for any fewer, 222 ms for 8 of 1,024.
# CPU: 1/48 of 8 rows of 512, from runs of d6 on 2 cores. MPS: not measured.
START_COST = {"cpu": 80, "mps": 512, "cuda": 4096}
ROW_RUNGS = {"cuda": 4}  # numbers of rows an octave: 1 to 8, 10, 12, 14, 16, 20, ... Other devices take every number


@dataclass(frozen=True)
class PassLimits:
    """What a forward pass of one process holds at most, and on which type of device it runs."""

    rows: int  # where rows are full: seq_len tokens each
    tokens: int  # where rows are padded, padding counted; a row that is wider than this is alone
    device: str  # cpu, cuda, mps

    @property
    def start_cost(self) -> int:
        return START_COST[self.device]

    def filled(self, rows: int) -> int:
        """The number of rows of a pass that holds `rows` rows of data; the others are empty.

        >>> [PassLimits(8, 8192, device).filled(21) for device in ("cpu", "cuda")]
        [21, 24]
        """
        return next_rung(rows, 1, ROW_RUNGS[self.device]) if self.device in ROW_RUNGS else rows

    def most_rows(self, width: int) -> int:
        """The most rows of this width that fit into a pass; at least 1.

        >>> [PassLimits(8, 8192, device).most_rows(384) for device in ("cpu", "cuda")]
        [21, 20]
        """
        most = max(1, self.tokens // width)
        while most > 1 and self.filled(most) * width > self.tokens:
            most -= 1
        return most


def next_rung(n: int, unit: int, rungs: int) -> int:
    """The least rung of a ladder that is n or more. Rungs are multiples of `unit`, at most `rungs` of them from any power of 2
    to the next one.

    >>> [next_rung(n, 8, 4) for n in (1, 8, 33, 64, 65, 130)]
    [8, 8, 40, 64, 80, 160]
    """
    below = 1 << (max(n - 1, 1).bit_length() - 1)  # the power of 2 below n
    spacing = max(unit, below // rungs)
    return max(-(-n // spacing), 1) * spacing


def padded_width(length: int, seq_len: int) -> int:
    """The width that rows of up to `length` tokens are padded to: the next rung of the ladder of widths, at most seq_len.

    >>> [padded_width(n, 1000) for n in (1, 33, 250, 260, 530, 990)]
    [8, 40, 256, 272, 544, 992]
    """
    return min(next_rung(length, WIDTH_UNIT, WIDTH_RUNGS), seq_len)


def micro_batch_sizes(widths: np.ndarray, limits: PassLimits) -> list[int]:
    """Split rows, sorted by ascending width, into passes of at most `limits.tokens`. Returns the rows of each.

    Dynamic programming finds the split with the least cost: tokens, padding included, and `limits.start_cost` tokens for each
    pass. A pass of a single row is avoided where possible, because torch.compile recompiles for a size of 1.

    >>> widths = np.array([80, 80, 88, 240, 320, 328])
    >>> [micro_batch_sizes(widths, PassLimits(4, 2048, device)) for device in ("cpu", "cuda")]
    [[3, 3], [6]]
    """
    filled = np.array([limits.filled(rows) for rows in range(min(len(widths), limits.most_rows(int(widths[0]))) + 1)])
    single_row_cost = len(widths) * (2.0 * float(widths[-1]) + limits.start_cost)  # more than any split costs
    # Of the first n rows: the least cost, and the rows of the last pass.
    least_cost, last_pass = np.zeros(len(widths) + 1), np.zeros(len(widths) + 1, dtype=np.int64)
    for n in range(1, len(widths) + 1):
        width = int(widths[n - 1])
        most = max(1, int(np.searchsorted(filled, limits.tokens // width, side="right")) - 1)
        rows = np.arange(min(n, most), 0, -1)
        costs = least_cost[n - rows] + filled[rows] * float(width) + limits.start_cost + single_row_cost * (rows == 1)
        last_pass[n] = rows[costs.argmin()]
        least_cost[n] = costs.min()
    counts, n = [], len(widths)
    while n:
        counts.append(int(last_pass[n]))
        n -= counts[-1]
    return counts[::-1]


def largest_pass(longest: int, rows: int, seq_len: int, limits: PassLimits) -> tuple[int, int]:
    """(rows, width) of the largest pass that `rows` rows of up to `longest` tokens can give: the most tokens, padding and empty
    rows counted, and of equal ones the widest.

    A pass of few wide rows may leave more of the limit free than one of many narrow ones:

    >>> [largest_pass(600, rows, 1024, PassLimits(2, 2048, "cpu")) for rows in (2, 3, 32)]
    [(2, 608), (3, 608), (4, 512)]
    """
    widths = sorted({padded_width(length, seq_len) for length in range(1, longest + 1)}, reverse=True)
    shapes = [(limits.filled(min(rows, limits.most_rows(width))), width) for width in widths]
    return max(shapes, key=lambda shape: shape[0] * shape[1])
