"""chattrain's own chat format, the same as nanochat's.

    <|bos|> <|user_start|> ... <|user_end|> <|assistant_start|> ... <|assistant_end|> <|user_start|> ...

Supervised are the tokens that the model must generate itself: the assistant's text, its Python calls with their start and end
tokens, and `<|assistant_end|>`. BOS, user turns, role tokens and tool output are context, so they carry no loss.
"""

from __future__ import annotations

from typing import Any

from chattrain.chat.format import ChatFormat, Encoded, Kind, Malformed, Segment, check_turns, is_text, messages_of
from chattrain.tokenizer import Tokenizer
from chattrain.tokenizer.special_tokens import (
    ASSISTANT_END,
    ASSISTANT_START,
    BOS,
    OUTPUT_END,
    OUTPUT_START,
    PYTHON_END,
    PYTHON_START,
    SPECIAL_TOKENS,
    USER_END,
    USER_START,
)

CONTEXT_TOKENS = {name: Segment(name, special=True, kind=Kind.PROMPT) for name in SPECIAL_TOKENS}
TARGET_TOKENS = {name: Segment(name, special=True, kind=Kind.ASSISTANT) for name in SPECIAL_TOKENS}  # the model generates them


class NativeFormat(ChatFormat):
    """Renders conversations with the special tokens of `Tokenizer`."""

    version = 1

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    @property
    def stop_ids(self) -> set[int]:
        return {self.tokenizer.special(ASSISTANT_END)}

    def to_segments(self, document: dict[str, Any]) -> list[Segment]:
        return to_segments(document)

    def encode(self, documents: list[list[Segment]]) -> list[Encoded]:
        texts = [segment.text for document in documents for segment in document if not segment.special]
        encoded = iter(self.tokenizer.encode_batch(texts))
        rendered = []
        for document in documents:
            ids: list[int] = []
            kinds: list[int] = []
            turns: list[int] = []
            for text, special, kind, turn in document:
                new = (self.tokenizer.special(text),) if special else next(encoded)
                ids += new
                kinds += [int(kind)] * len(new)
                turns += [turn] * len(new)
            rendered.append(Encoded(ids, kinds, turns))
        return rendered

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        ids = self.encode([to_segments({"messages": messages})])[0].ids
        return [*ids, self.tokenizer.special(ASSISTANT_START)]

    def choices(self, messages: list[dict[str, Any]], replies: list[str]) -> tuple[list[int], list[int]]:
        tokens = self.tokenizer.encode_batch(replies)
        if any(len(ids) != 1 for ids in tokens) or len({ids[0] for ids in tokens}) != len(replies):
            raise Malformed(f"each of {replies} must be one token of the tokenizer")
        return self.prompt(messages), [ids[0] for ids in tokens]


def to_segments(document: dict[str, Any]) -> list[Segment]:
    """The segments of a conversation, or of a text `{"text": ...}`, of which all but BOS is supervised. Raises Malformed."""
    if is_text(document):
        return [CONTEXT_TOKENS[BOS], Segment(document["text"], special=False, kind=Kind.ASSISTANT)]
    segments = [CONTEXT_TOKENS[BOS]]
    messages = messages_of(document)
    turns = _merge_system(messages)
    first = len(messages) - len(turns)  # so that errors count messages as they were given, the system message included
    check_turns(turns, first)
    for i, message in enumerate(turns, first):
        role, content = message["role"], message["content"]
        if role == "user":
            if not isinstance(content, str):
                raise Malformed(f"message {i}: a user's content must be a string, not {type(content).__name__}")
            new = [CONTEXT_TOKENS[USER_START], Segment(content, False, Kind.PROMPT), CONTEXT_TOKENS[USER_END]]
        else:
            new = [CONTEXT_TOKENS[ASSISTANT_START], *_assistant_segments(content, i), TARGET_TOKENS[ASSISTANT_END]]
        segments += [segment._replace(turn=(i - first) // 2) for segment in new]
    return segments


def _assistant_segments(content: Any, i: int) -> list[Segment]:
    if isinstance(content, str):
        return [Segment(content, False, Kind.ASSISTANT)]
    if not isinstance(content, list) or not content:
        raise Malformed(f"message {i}: an assistant's content must be a string or a list of parts")
    segments = []
    for part in content:
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
        if not isinstance(text, str):
            raise Malformed(f"message {i}: a part must be {{'type': ..., 'text': str}}, not {part!r:.80}")
        if kind == "text":
            segments.append(Segment(text, False, Kind.ASSISTANT))
        elif kind == "python":
            segments += [TARGET_TOKENS[PYTHON_START], Segment(text, False, Kind.ASSISTANT), TARGET_TOKENS[PYTHON_END]]
        elif kind == "python_output":
            segments += [CONTEXT_TOKENS[OUTPUT_START], Segment(text, False, Kind.PROMPT), CONTEXT_TOKENS[OUTPUT_END]]
        else:
            raise Malformed(f"message {i}: unknown part type {kind!r}; known are text, python, python_output")
    return segments


def _merge_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with a leading system message merged into the first user turn. The argument is not modified."""
    if messages[0]["role"] != "system":
        return messages
    if len(messages) < 2 or messages[1]["role"] != "user":
        raise Malformed("a system message must be followed by a user message")
    texts = [messages[0]["content"], messages[1]["content"]]
    if not all(isinstance(text, str) for text in texts):
        raise Malformed("system and first user message must be strings")
    return [{"role": "user", "content": "\n\n".join(texts)}, *messages[2:]]
