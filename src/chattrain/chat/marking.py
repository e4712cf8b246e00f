"""What the characters of a rendered conversation are: which of them the model must generate, which turn each belongs to."""

from __future__ import annotations

import re
from itertools import pairwise, zip_longest
from typing import NamedTuple

import numpy as np

from chattrain.chat.format import Kind, Malformed, Segment
from chattrain.chat.messages import Message
from chattrain.chat.skeleton import Piece

OPENED_THOUGHT = re.compile(r"<think>\s*(</think>\s*)?$")


class Ends(NamedTuple):
    """What a template writes around the messages of an assistant, as text."""

    generation_prompt: str  # what it adds for a reply; "": nothing
    before_reply: dict[str, str]  # role of the message before -> all that stands between that message's text and the reply
    reply_prefix: str  # between the prompt for a reply and the reply, where a rendered reply begins with the prompt
    stops: tuple[str, ...]  # tokens that end a turn; the first is the usual one

    def context_length(self, between: str, role_before: str) -> int:
        """How many characters of `between`, the text before a reply, belong to its prompt. The model must generate the rest."""
        before = self.before_reply.get(role_before)
        # Where a rendered reply does not begin with the prompt for it, this is often for the thought that the prompt opens.
        for prompt in (before, self.generation_prompt, OPENED_THOUGHT.sub("", self.generation_prompt)):
            if prompt and prompt in between:
                return between.rindex(prompt) + len(prompt)
        return len(between) - (len(self.reply_prefix) if between.endswith(self.reply_prefix) else 0)

    def end_of_turn(self, text: str) -> int | None:
        """Index behind the first token in the text that ends a turn; None: there is none."""
        found = [(text.index(stop), -len(stop)) for stop in self.stops if stop in text]
        return min(found)[0] - min(found)[1] if found else None


class Block(NamedTuple):
    """What the template wrote of one message, with the marks of its role. Begin and end are indices of characters."""

    message: int
    begin: int
    reply: int  # where an assistant's reply begins
    end: int


def find_blocks(whole: str, messages: list[Message], pieces: list[Piece], spans: list[tuple[int, int] | None], ends: Ends):
    """The block of each message, in the order in which they are rendered.

    Raises Malformed where the texts of two messages are mixed, and for an assistant's message without an end-of-turn token.
    """
    texts = _texts_of_messages(messages, pieces, spans)
    blocks: list[Block] = []
    for k, (i, first, last) in enumerate(texts):
        begin = blocks[-1].end if blocks else 0
        following = texts[k + 1][1] if k + 1 < len(texts) else len(whole)
        end = ends.end_of_turn(whole[last:following])
        reply = begin
        if messages[i].role == "assistant":
            between = texts[k - 1][2] if k else 0
            before = messages[texts[k - 1][0]].role if k else ""
            reply = between + ends.context_length(whole[between:first], before)
            if end is None:
                what = " behind its calls" if messages[i].calls else ""
                raise Malformed(
                    f"assistant turn {messages[i].index} has no end-of-turn token {ends.stops[0]!r}{what}, so the model would "
                    f"not learn to stop: {whole[begin:following]!r:.300}"
                )
        blocks.append(Block(i, begin, max(reply, begin), last + (end or 0)))
    return blocks


def _texts_of_messages(
    messages: list[Message], pieces: list[Piece], spans: list[tuple[int, int] | None]
) -> list[tuple[int, int, int]]:
    """(message, begin of its first text, end of its last one), in the order in which they are rendered."""
    found: dict[int, list[tuple[int, int]]] = {}
    for piece, span in zip(pieces, spans, strict=True):
        if span is not None:
            found.setdefault(piece.message, []).append(span)
    texts = sorted((min(spans)[0], max(end for _, end in spans), i) for i, spans in found.items())
    for (_, last, i), (first, _, j) in pairwise(texts):
        if first < last:
            raise Malformed(f"the chat template mixes {messages[i]} and {messages[j]}, so they cannot be told apart")
    return [(i, first, last) for first, last, i in texts]


def to_segments(
    whole: str, messages: list[Message], pieces: list[Piece], spans: list[tuple[int, int] | None], blocks: list[Block]
) -> list[Segment]:
    """The rendered conversation, split where the kind or the turn of its characters changes."""
    kinds, turns = np.zeros(len(whole), dtype=np.uint8), np.zeros(len(whole), dtype=np.int64)
    turn_of, turn = [], -1
    for message in messages:
        turn += message.role == "user"
        turn_of.append(max(turn, 0))
    for block, following in zip_longest(blocks, blocks[1:]):
        turns[block.begin : following.begin if following else None] = turn_of[block.message]
        if messages[block.message].role == "assistant":
            kinds[block.reply : block.end] = Kind.ASSISTANT
    for piece, span in zip(pieces, spans, strict=True):
        if span is not None and not piece.supervised:
            kinds[span[0] : span[1]] = Kind.PROMPT
    for block in blocks:
        if messages[block.message].off:
            kinds[block.begin : block.end] |= int(Kind.OFF)
    return split(whole, kinds, turns)


def split(whole: str, kinds: np.ndarray, turns: np.ndarray) -> list[Segment]:
    """Segments of the text, cut where its kind or its turn, each (characters,), changes.

    >>> [(s.text, s.kind, s.turn) for s in split("abcd", np.array([0, 1, 1, 0]), np.array([0, 0, 0, 1]))]
    [('a', <Kind.PROMPT: 0>, 0), ('bc', <Kind.ASSISTANT: 1>, 0), ('d', <Kind.PROMPT: 0>, 1)]
    """
    changes = (np.diff(kinds) != 0) | (np.diff(turns) != 0)
    cuts = [0, *(np.flatnonzero(changes) + 1).tolist(), len(whole)]
    return [Segment(whole[a:b], False, Kind(int(kinds[a])), int(turns[a])) for a, b in pairwise(cuts)]
