"""Render a conversation as token ids and a loss mask."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from chattrain.chat.format import ChatFormat, Rendered, messages_of
from chattrain.chat.native import NativeFormat
from chattrain.chat.template import ChatTemplate
from chattrain.tokenizer import AnyTokenizer, Tokenizer


@lru_cache(maxsize=4)
def chat_format(tokenizer: AnyTokenizer) -> ChatFormat:
    """The chat format of a tokenizer: chattrain's own, or the chat template of a Hugging Face tokenizer.

    Raises UserError for a template without an end-of-turn token: a model trained with it would never stop.
    """
    return NativeFormat(tokenizer) if isinstance(tokenizer, Tokenizer) else ChatTemplate(tokenizer)


def render(conversation: dict[str, Any], tokenizer: AnyTokenizer, max_tokens: int | None = 2048) -> Rendered:
    """Token ids and loss mask of `{"messages": [{"role", "content"}, ...]}`, cut after `max_tokens` (None: not cut).

    docs/data.md lists the roles and fields of a message; `tools` may stand beside `messages`. Content is a string or a list of
    parts `{"type": "text", "text": ...}`; those of the assistant may also be `python` and `python_output`. A conversation may end
    with a user turn. Raises Malformed if the roles do not take turns, and for content that has another type or would be left out.
    """
    form = chat_format(tokenizer)
    encoded = form.encode([form.to_segments(conversation)])[0]
    return Rendered(encoded.ids[:max_tokens], encoded.loss_mask[:max_tokens])


def render_prompt(conversation: dict[str, Any], tokenizer: AnyTokenizer) -> list[int]:
    """Token ids up to where the model's next reply begins. A final assistant turn is left out. Raises Malformed."""
    messages = messages_of(conversation)
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    return chat_format(tokenizer).prompt({**conversation, "messages": asked})


def render_choices(conversation: dict[str, Any], replies: list[str], tokenizer: AnyTokenizer) -> tuple[list[int], list[int]]:
    """(token ids that all replies share, the one token in which each reply differs). The replies replace the last turn.

    In chattrain's own format that is the prompt, and the token of each reply. A chat template renders the turns as in training,
    with everything that it puts before a reply. Raises Malformed if a reply is not a single token.
    """
    return chat_format(tokenizer).choices({**conversation, "messages": messages_of(conversation)[:-1]}, replies)
