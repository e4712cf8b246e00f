"""What every chat format gives: segments of a document, each supervised or not, and their token ids."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple


class Malformed(ValueError):
    """A conversation that cannot be rendered; the message says which message and why."""


class Rendered(NamedTuple):
    """`ids` and `loss_mask` have the same length; loss_mask[i] is 1 where token i is supervised (not yet shifted)."""

    ids: list[int]
    loss_mask: list[int]


class Segment(NamedTuple):
    """A stretch of a rendered document: text, or one special token by its name."""

    text: str
    special: bool
    supervised: bool


class ChatFormat(ABC):
    """Renders conversations for one tokenizer. It alone decides what of them is supervised."""

    version: int  # part of the token cache's key; raised when rendering changes

    @property
    @abstractmethod
    def stop_ids(self) -> set[int]:
        """Tokens that end a reply."""

    @abstractmethod
    def to_segments(self, document: dict[str, Any]) -> list[Segment]:
        """Segments in order of a conversation, or of a text `{"text": ...}`. Raises Malformed."""

    @abstractmethod
    def encode(self, documents: list[list[Segment]]) -> list[Rendered]:
        """Ids and mask of each document; the texts of all of them go through the tokenizer in one batch."""

    @abstractmethod
    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """Ids up to where the reply to the messages begins."""

    @abstractmethod
    def choices(self, messages: list[dict[str, Any]], replies: list[str]) -> tuple[list[int], list[int]]:
        """(ids up to where one-token replies to the messages differ, the token of each). Raises Malformed where a reply is
        not one token."""


def messages_of(conversation: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages, each with a role and content; raises Malformed."""
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not messages:
        raise Malformed("a conversation needs a non-empty list `messages`")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or message.get("content") is None:
            raise Malformed(f"message {i} needs `role` and `content`")
    return messages


def check_turns(turns: list[dict[str, Any]], first: int) -> None:
    """Raises Malformed where user and assistant do not take turns, the user first. `first`: number of the first message."""
    for i, message in enumerate(turns, first):
        expected = "user" if (i - first) % 2 == 0 else "assistant"
        if message["role"] != expected:
            raise Malformed(f"message {i} is from {message['role']!r} where {expected!r} must speak")


def is_text(document: Any) -> bool:
    """Is it `{"text": ...}` and not a conversation?"""
    return isinstance(document, dict) and document.keys() == {"text"}
