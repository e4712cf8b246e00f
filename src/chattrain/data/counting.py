"""What is counted of each document while it is tokenised, and kept with the token cache."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from chattrain.chat import ChatFormat, Encoded, Kind, Malformed
from chattrain.data.loss_weights import last_turn

NAMED = 5  # records that a message names
SAMPLED = 8  # records of each chunk whose mask is compared with the prompt that a chat would give
OPEN_TURNS, UNTRAINED_REPLIES, TRAINED_PROMPTS = "open_turns", "untrained_replies", "trained_prompts"
EMPTY_REPLIES = "empty_replies"


@dataclass
class Fault:
    """A kind of fault in the marks of what the model must generate: how often it is there, and in which records first."""

    count: int = 0
    records: list[int] = field(default_factory=list)


class Faults(dict[str, Fault]):
    """Faults by kind.

    open_turns: turns that are trained without the token that ends them: a model trained so does not learn to stop.
    empty_replies: turns of which nothing but the end is trained: a model trained so learns to say nothing.
    untrained_replies, trained_prompts: of a sample of conversations, those whose last reply is not marked, or whose prompt is.
    """

    def add(self, kind: str, record: int, count: int = 1) -> None:
        if count:
            self._merge(kind, Fault(count, [record]))

    def merge(self, other: Faults) -> None:
        for kind, fault in other.items():
            self._merge(kind, fault)

    def _merge(self, kind: str, fault: Fault) -> None:
        held = self.setdefault(kind, Fault())
        held.count += fault.count
        held.records = (held.records + fault.records)[:NAMED]


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


def count_empty_replies(document: Encoded, stop_ids: Collection[int]) -> int:
    """How many turns of a conversation are trained to say nothing: all their trained tokens are of `stop_ids`.

    >>> count_empty_replies(Encoded([1, 9, 1, 2, 9], [0, 1, 0, 1, 1], [0, 0, 1, 1, 1]), {9})
    1
    """
    ids, kinds, turns = (np.array(values, dtype=np.int64) for values in document)
    trained = kinds == Kind.ASSISTANT
    said = trained & ~np.isin(ids, list(stop_ids))
    return len(np.setdiff1d(turns[trained], turns[said]))


def misplaced_mask(document: dict[str, Any], encoded: Encoded, form: ChatFormat) -> list[str]:
    """The kinds of fault of a conversation that ends with a reply, found without what marked it: by the prompts that a chat with
    the model would give for its first and its last reply. [] for other documents, and where those prompts do not begin it."""
    messages = document.get("messages") or []
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), len(messages))
    if any(kind & Kind.OFF for kind in encoded.kinds) or len(messages) < 2 or messages[-1]["role"] != "assistant":
        return []
    try:
        shared = form.prompt({**document, "messages": messages[: first + 1]})
        prompt = form.prompt({**document, "messages": messages[:-1]})
    except Malformed:
        return []
    if encoded.ids[: len(prompt)] != prompt or encoded.ids[: len(shared)] != shared or len(encoded.ids) == len(prompt):
        return []
    marked = [kind == Kind.ASSISTANT for kind in encoded.kinds]
    end = next((i for i in range(len(prompt), len(marked)) if encoded.ids[i] in form.stop_ids), None)
    is_trained = marked[len(prompt)] and end is not None and marked[end]
    trains_prompt = any(marked[: len(shared)]) or marked[len(prompt) - 1]
    return [UNTRAINED_REPLIES] * (not is_trained) + [TRAINED_PROMPTS] * trains_prompt
