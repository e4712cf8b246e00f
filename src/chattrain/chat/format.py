"""The interface of a chat format: it splits a document into segments, each of one kind and turn, and encodes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from enum import IntFlag
from typing import Any, NamedTuple


class Malformed(ValueError):
    """A conversation that cannot be rendered; the message says which message and why."""


class Rendered(NamedTuple):
    """`ids` and `loss_mask` have the same length; loss_mask[i] is 1 where token i is supervised (not yet shifted)."""

    ids: list[int]
    loss_mask: list[int]


class Kind(IntFlag):
    """What a token is, apart from what a training makes of it (data/loss_weights.py)."""

    PROMPT = 0  # user turns, role tokens, tool output, BOS
    ASSISTANT = 1  # what the model must generate itself: replies with their end tokens, calls; a plain text
    OFF = 2  # of a message that is flagged off: never a target, whether it is ASSISTANT or not


DROPPED_THOUGHTS = "thoughts of earlier turns"  # what a chat template leaves out by design, where it is counted


class Encoded(NamedTuple):
    """The tokens of a document with what each of them is. All three have the same length."""

    ids: list[int]
    kinds: list[int]  # values of Kind
    turns: list[int]  # from 0: a user message begins the next turn, which its replies belong to

    @property
    def loss_mask(self) -> list[int]:
        return [int(kind == Kind.ASSISTANT) for kind in self.kinds]


class Segment(NamedTuple):
    """A part of a rendered document: ordinary text, or (if `special`) the name of one special token."""

    text: str
    special: bool
    kind: Kind
    turn: int = 0


class ChatFormat(ABC):
    """Renders conversations for one tokenizer, and decides which parts of them the model must generate."""

    version: int  # part of the token cache's key; raised when the rendering changes

    @property
    @abstractmethod
    def stop_ids(self) -> set[int]:
        """Tokens that end a reply."""

    @abstractmethod
    def to_segments(self, document: dict[str, Any], left_out: Counter[str] | None = None) -> list[Segment]:
        """The segments of a conversation `{"messages": [...], "tools": [...]}` or a text `{"text": ...}`, in order.

        What is left out by design is counted in `left_out`. Raises Malformed, also for content that would be left out otherwise.
        """

    @abstractmethod
    def encode(self, documents: list[list[Segment]]) -> list[Encoded]:
        """The tokens of each document. All texts are tokenised in one batch."""

    @abstractmethod
    def prompt(self, asked: dict[str, Any]) -> list[int]:
        """Token ids of a conversation, up to where the model's reply begins."""

    @abstractmethod
    def choices(self, asked: dict[str, Any], replies: list[str]) -> tuple[list[int], list[int]]:
        """(token ids that all replies to the conversation share, the one token in which each reply differs).

        Raises Malformed if a reply is not a single token.
        """


def messages_of(conversation: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a conversation. Raises Malformed if there are none, or one has no role."""
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not messages:
        raise Malformed("a conversation needs a non-empty list `messages`")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message:
            raise Malformed(f"message {i} needs `role` and `content`")
    return messages


def is_text(document: Any) -> bool:
    """Whether the document is `{"text": ...}` and not a conversation."""
    return isinstance(document, dict) and document.keys() == {"text"}
