"""Conversations to token ids and loss mask. The only place that decides what is supervised."""

from chattrain.chat.format import ChatFormat, Malformed, Rendered, Segment
from chattrain.chat.render import chat_format, render, render_choices, render_prompt

__all__ = ["ChatFormat", "Malformed", "Rendered", "Segment", "chat_format", "render", "render_choices", "render_prompt"]
