"""Conversations to token ids and loss masks. Only this package decides which tokens are supervised."""

from chattrain.chat.format import ChatFormat, Encoded, Kind, Malformed, Rendered, Segment
from chattrain.chat.rendering import chat_format, render, render_choices, render_prompt

__all__ = [
    "ChatFormat",
    "Encoded",
    "Kind",
    "Malformed",
    "Rendered",
    "Segment",
    "chat_format",
    "render",
    "render_choices",
    "render_prompt",
]
