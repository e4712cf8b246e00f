"""A conversation becomes token ids and a loss mask."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from chattrain.chat.format import ChatFormat, Rendered, messages_of
from chattrain.chat.native import NativeFormat
from chattrain.chat.template import ChatTemplate
from chattrain.tokenizer import Tokenizer
from chattrain.tokenizer.huggingface import HFTokenizer


@lru_cache(maxsize=4)
def chat_format(tokenizer: Tokenizer | HFTokenizer) -> ChatFormat:
    """How conversations are rendered for a tokenizer: by its own chat template, or in our format.

    Raises UserError for a template whose assistant turns have no end-of-turn token: a model trained on them would never stop.
    """
    return NativeFormat(tokenizer) if isinstance(tokenizer, Tokenizer) else ChatTemplate(tokenizer)


def render(conversation: dict[str, Any], tokenizer: Tokenizer | HFTokenizer, max_tokens: int | None = 2048) -> Rendered:
    """Token ids and loss mask of `{"messages": [{"role", "content"}, ...]}`, cut after `max_tokens` (None: never).

    A system message is merged into the first user turn. Content is a string or, for the assistant, a list of parts
    `{"type": "text" | "python" | "python_output", "text": ...}`. Raises Malformed where roles do not alternate
    from user, a turn is missing, or content has another shape. A conversation may end with a user turn.
    """
    form = chat_format(tokenizer)
    ids, mask = form.encode([form.to_segments(conversation)])[0]
    return Rendered(ids[:max_tokens], mask[:max_tokens])


def render_prompt(conversation: dict[str, Any], tokenizer: Tokenizer | HFTokenizer) -> list[int]:
    """Ids up to where the reply to come begins; a last assistant turn is left out. Raises Malformed."""
    messages = messages_of(conversation)
    return chat_format(tokenizer).prompt(messages[:-1] if messages[-1]["role"] == "assistant" else messages)


def render_choices(
    conversation: dict[str, Any], replies: list[str], tokenizer: Tokenizer | HFTokenizer
) -> tuple[list[int], list[int]]:
    """(ids up to where one-token replies differ, the token of each). The last turn is an assistant's, which is replaced.

    For our own tokenizers that is the prompt of the reply, and each reply's own token. By a template the turns are rendered as
    they are in training, with whatever it puts before a reply. Raises Malformed where a reply is not one token.
    """
    return chat_format(tokenizer).choices(messages_of(conversation)[:-1], replies)
