"""What is counted of each document while it is tokenised, and kept with the token cache."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from chattrain.chat import Encoded, Kind
from chattrain.data.loss_weights import last_turn

NAMED = 5  # records that a message names


@dataclass
class OpenTurns:
    """Assistant turns that are trained without the token that ends them: a model trained so does not learn to stop."""

    count: int = 0
    records: list[int] = field(default_factory=list)  # indices of the first few records that have one

    def add(self, record: int, count: int) -> None:
        self.count += count
        if count and len(self.records) < NAMED:
            self.records.append(record)

    def merge(self, other: OpenTurns) -> None:
        self.count += other.count
        self.records = (self.records + other.records)[:NAMED]


def count_tokens(document: Encoded) -> tuple[int, int, int, int]:
    """Of a document: assistant tokens, those of its last reply, tokens flagged off, the index of the first assistant token (its
    length if there is none)."""
    kinds, turns = np.array(document.kinds, dtype=np.uint8), np.array(document.turns, dtype=np.int64)
    replies = kinds == Kind.ASSISTANT
    of_last = replies & (turns == last_turn(kinds, turns))
    first = int(replies.argmax()) if replies.any() else len(kinds)
    return int(replies.sum()), int(of_last.sum()), int((kinds & Kind.OFF > 0).sum()), first


def count_open_turns(document: Encoded, stop_ids: Collection[int]) -> int:
    """How many turns of a conversation have assistant tokens, the last of which is not one of `stop_ids`.

    A turn whose last message is the result of a tool ends without such a token and is not counted, nor is one whose reply is
    flagged off.

    >>> user, reply, end = 1, 2, 9
    >>> ids, turns = [user, reply, end, user, reply, end], [0, 0, 0, 1, 1, 1]
    >>> [count_open_turns(Encoded(ids, kinds, turns), {end}) for kinds in ([0, 1, 1, 0, 1, 1], [0, 1, 1, 0, 1, 0])]
    [0, 1]
    >>> count_open_turns(Encoded(ids[:2], [0, 1], [0, 0]), {end})
    1
    """
    ids, kinds, turns = (np.array(values, dtype=np.int64) for values in document)
    of_reply = np.flatnonzero(kinds & Kind.ASSISTANT)
    if not len(of_reply):
        return 0
    lasts = of_reply[np.append(np.diff(turns[of_reply]) != 0, True)]  # the last token of each turn's replies
    count = 0
    for last in lasts[~np.isin(ids[lasts], list(stop_ids))]:
        turn = turns == turns[last]
        is_trained = bool((kinds[turn] == Kind.ASSISTANT).any())
        after = ids[last + 1 :][turn[last + 1 :]]
        count += is_trained and (not len(after) or bool(np.isin(after, list(stop_ids)).any()))
    return count
