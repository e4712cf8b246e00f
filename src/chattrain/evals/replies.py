"""Replies, written on all ranks together, and what is asked of any: its text, and whether it ends, repeats itself or is empty."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from chattrain.parallel.ranks import Ranks
from chattrain.tokenizer import AnyTokenizer, HFTokenizer

Write = Callable[[list[list[int]]], list[list[int]]]  # token ids of prompts -> those of the replies
TIMES, LEAST = 3, 12  # a loop is one piece this many times in a row, of this many tokens together at least


def write_on_all_ranks(write: Write, prompts: list[list[int]], ranks: Ranks) -> list[list[int]]:
    """The reply to each prompt, on every rank. Each rank writes its share, so it must hold all weights.

    Replies to prompts of similar length are written together, and ranks get the same mix of lengths.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    mine = order[ranks.rank :: ranks.world_size]
    replies = write([prompts[i] for i in mine]) if mine else []
    gathered = gather(replies, len(prompts), ranks)
    return [reply for _, reply in sorted(zip(order, gathered, strict=True))]


def gather(rows: list[list[int]], total: int, ranks: Ranks) -> list[list[int]]:
    """The rows of all ranks, of any lengths, interleaved: `total` together."""
    if ranks.world_size == 1:
        return rows
    longest = [0.0] * ranks.world_size
    longest[ranks.rank] = float(max(map(len, rows), default=0))
    width = 1 + int(max(ranks.sum(longest)))
    rows = [*rows, *([[]] * (-(-total // ranks.world_size) - len(rows)))]
    padded = [[float(len(row)), *map(float, row), *[0.0] * (width - 1 - len(row))] for row in rows]
    table = ranks.all_gather_interleaved(padded)[:total]
    return [list(map(int, row[1 : 1 + int(row[0])])) for row in table]


def text_of(ids: list[int], tokenizer: AnyTokenizer) -> str:
    """A reply as text. Special tokens of a Hugging Face tokenizer are left out; those of our own are calls and their results."""
    if isinstance(tokenizer, HFTokenizer):
        special = {tokenizer.special(text) for text in tokenizer.special_texts}
        ids = [i for i in ids if i not in special]
    return tokenizer.decode(ids)


def repeats(ids: Sequence[int]) -> bool:
    """Does it end in a loop: the same piece three times or more, twelve tokens together at least?

    >>> repeats([5, 6, 7] * 4), repeats([5] * 12), repeats([1, 2, 3, 4, 5, 6, 7] * 2), repeats([5, 6, 7, 8] * 2 + [5, 6, 7])
    (True, True, False, False)
    """
    n = len(ids)
    for period in range(1, n // TIMES + 1):
        length = max(TIMES * period, LEAST)
        if length <= n and all(ids[i] == ids[i - period] for i in range(n - length + period, n)):
            return True
    return False
