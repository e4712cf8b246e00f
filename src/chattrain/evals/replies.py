"""Replies, written on all ranks together, and what is asked of any: whether it ends or repeats itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from chattrain.chat.tools import Tool
from chattrain.model.causal_lm import CausalLM
from chattrain.model.engine import Request
from chattrain.model.generate import answer, room_for
from chattrain.parallel.ranks import Ranks

TIMES, LEAST = 3, 12  # a loop is one piece this many times in a row, of this many tokens together at least


class Reply(NamedTuple):
    ids: list[int]  # without the token that ended it
    ended: bool  # by such a token, before it was as long as it may be


@dataclass(frozen=True)
class Writer:
    """Writes replies with the likeliest token at each place, up to `rows` of them at once. `tool` answers their calls."""

    model: CausalLM
    max_tokens: int  # of a reply
    stop_ids: set[int]
    tool: Tool | None
    rows: int
    ranks: Ranks

    def __call__(self, prompts: list[list[int]]) -> list[Reply]:
        """The reply to each prompt, on every rank. Each rank writes its share, for which it must hold all weights.

        Replies to prompts of similar length are written together, and ranks get the same mix of lengths.
        """
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        mine = [self._request(prompts[i]) for i in order[self.ranks.rank :: self.ranks.world_size]]
        answer(self.model, mine, self.rows)
        written = gather([[int(request.ended == "stop"), *request.reply] for request in mine], len(prompts), self.ranks)
        by_prompt = dict(zip(order, written, strict=True))
        return [Reply(by_prompt[i][1:], bool(by_prompt[i][0])) for i in range(len(prompts))]

    def _request(self, prompt: list[int]) -> Request:
        return Request(prompt, room_for(self.model, prompt, self.max_tokens), self.stop_ids, tool=self.tool)


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
