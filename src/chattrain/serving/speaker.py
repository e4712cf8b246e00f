"""A model that is ready to talk: what renders its prompts, how long they may be, and what reads its replies."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from chattrain import device
from chattrain.chat import chat_format, render_prompt
from chattrain.chat.reply import ReplyReader, reply_reader
from chattrain.chat.tools import tool_of
from chattrain.model.causal_lm import CausalLM
from chattrain.model.engine import Request
from chattrain.model.sampling import Sampling
from chattrain.tokenizer import AnyTokenizer

LEAST_ROOM = 4  # a reply has room for a part of the context at least: one in so many tokens, or its own limit


class TooLong(ValueError):
    """A prompt that leaves no room for a reply; the message says how long it is and how long it may be."""


@dataclass(frozen=True)
class Speaker:
    name: str
    model: CausalLM
    tokenizer: AnyTokenizer
    context: int  # tokens of prompt and reply together, as the model has learnt them
    bf16: bool  # are its passes computed in bf16?

    def autocast(self) -> AbstractContextManager:
        """What its passes are computed in."""
        return device.autocast(self.bf16, self.model.lm_head.weight.device)

    def prompt(self, conversation: dict[str, Any], max_tokens: int = 1) -> list[int]:
        """The tokens up to where the reply begins. Raises Malformed, and TooLong where a reply of max_tokens has too little room:
        less than it may need and than a quarter of the context."""
        ids = render_prompt(conversation, self.tokenizer)
        most = self.context - min(max_tokens, max(self.context // LEAST_ROOM, 1))
        if len(ids) > most:
            raise TooLong(f"the conversation has {len(ids)} tokens; with a context of {self.context} it may have {most}")
        return ids

    def request(self, prompt: list[int], max_tokens: int, sampling: Sampling, seed: int) -> Request:
        """A reply to the prompt, which ends where the context does, if not before."""
        room = min(max_tokens, self.context - len(prompt))
        return Request(prompt, room, chat_format(self.tokenizer).stop_ids, sampling, seed, tool_of(self.tokenizer))

    def reader(self) -> ReplyReader:
        return reply_reader(self.tokenizer)
