"""chattrain's own chat format, the same as nanochat's.

    <|bos|> <|user_start|> ... <|user_end|> <|assistant_start|> ... <|assistant_end|> <|user_start|> ...

A call of a tool is `<|python_start|>name({"argument": ...})<|python_end|>`, and its result stands behind it, as
`<|output_start|>...<|output_end|>`; all calls of a reply are in one assistant turn. Tools are JSON, one a line, behind the system
text, which begins the first user turn.

Supervised are the tokens that the model must generate itself: the assistant's text, its calls with their start and end tokens,
and `<|assistant_end|>`. BOS, user turns, role tokens and tool output are context, so they carry no loss.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import zip_longest
from typing import Any

from chattrain.chat.fields import refused_field
from chattrain.chat.format import ChatFormat, Encoded, Kind, Malformed, Segment, is_text
from chattrain.chat.messages import Conversation, Message, Part, conversation
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
from chattrain.tokenizer.unicode import well_formed

CONTEXT_TOKENS = {name: Segment(name, special=True, kind=Kind.PROMPT) for name in SPECIAL_TOKENS}
TARGET_TOKENS = {name: Segment(name, special=True, kind=Kind.ASSISTANT) for name in SPECIAL_TOKENS}  # the model generates them
PLACE = "the format of this tokenizer"


class NativeFormat(ChatFormat):
    """Renders conversations with the special tokens of `Tokenizer`."""

    version = 1

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    @property
    def stop_ids(self) -> set[int]:
        return {self.tokenizer.special(ASSISTANT_END)}

    def to_segments(self, document: dict[str, Any], left_out: Counter[str] | None = None) -> list[Segment]:
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

    def prompt(self, asked: dict[str, Any]) -> list[int]:
        segments = to_segments(asked)
        if segments[-1].text == PYTHON_END:
            raise Malformed("the last call has no result yet, so no reply to it can be asked for")
        ids = self.encode([segments])[0].ids
        return [*ids, self.tokenizer.special(ASSISTANT_START)] if segments[-1].text == USER_END else ids

    def choices(self, asked: dict[str, Any], replies: list[str]) -> tuple[list[int], list[int]]:
        tokens = self.tokenizer.encode_batch(replies)
        if any(len(ids) != 1 for ids in tokens) or len({ids[0] for ids in tokens}) != len(replies):
            raise Malformed(f"each of {replies} must be one token of the tokenizer")
        return self.prompt(asked), [ids[0] for ids in tokens]


def to_segments(document: dict[str, Any]) -> list[Segment]:
    """The segments of a conversation, or of a text `{"text": ...}`, of which all but BOS is supervised. Raises Malformed.

    A conversation that ends with the result of a call ends within the assistant's turn.
    """
    if is_text(document):
        return [CONTEXT_TOKENS[BOS], Segment(well_formed(document["text"]), special=False, kind=Kind.ASSISTANT)]
    talk = conversation(document)
    for message in talk.messages:
        _check(message)
    segments = [CONTEXT_TOKENS[BOS]]
    for turn, messages in enumerate(_turns(talk)):
        user = [message for message in messages if message.role in ("system", "user")]
        new = _user_segments(user, talk.tools if turn == 0 else []) + _reply_segments(messages[len(user) :])
        segments += [segment._replace(turn=turn) for segment in new]
    return segments


def _check(message: Message) -> None:
    """Raises Malformed for content that the format has no place for."""
    if message.thought:
        raise refused_field(str(message), message.thought_field, message.thought, PLACE)
    for field, value in message.rest.items():
        raise refused_field(str(message), field, value, PLACE)


def _turns(talk: Conversation) -> list[list[Message]]:
    """The messages of each turn: a user's, the first with the system's before it, and the replies to it."""
    turns: list[list[Message]] = []
    for message in talk.messages:
        if not turns or (message.role == "user" and turns[-1][-1].role != "system"):
            turns.append([])
        turns[-1].append(message)
    if turns[-1][-1].role == "system":
        raise Malformed("a system message must be followed by a user message")
    return turns


def _user_segments(messages: list[Message], tools: list[dict[str, Any]]) -> list[Segment]:
    """A user turn; `messages`: the user's, or the system's and the user's."""
    texts = [message.text for message in messages]
    if tools:
        texts.insert(-1, "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    system, user, off = "".join(text + "\n\n" for text in texts[:-1]), texts[-1], messages[-1].off
    if messages[0].off == off:
        content = _flagged([Segment(system + user, False, Kind.PROMPT)], off)
    else:
        system_segments = _flagged([Segment(system, False, Kind.PROMPT)], messages[0].off)
        content = [*system_segments, *_flagged([Segment(user, False, Kind.PROMPT)], off)]
    return [*_flagged([CONTEXT_TOKENS[USER_START]], off), *content, *_flagged([CONTEXT_TOKENS[USER_END]], off)]


def _reply_segments(messages: list[Message]) -> list[Segment]:
    """An assistant turn: one message, or several with the results of tools between them. [] for no message.

    Each result stands right behind its call, as in a chat, where a tool is run as soon as it is called.
    """
    if not messages:
        return []
    segments: list[Segment] = []
    for message, results in _with_results(messages):
        segments += _flagged(_parts_segments(message.parts), message.off)
        calls = [Part("python", f"{call.name}({call.as_text})") for call in message.calls]
        waiting = len(calls) or sum({"python": 1, "python_output": -1}.get(part.kind, 0) for part in message.parts)
        if len(results) > max(waiting, 0):
            raise Malformed(f"message {results[0].index} is from 'tool', but no call before it waits for a result")
        for call, result in zip_longest(calls, results):
            segments += _flagged(_parts_segments([call]), message.off) if call else []
            segments += _flagged(_parts_segments([Part("python_output", result.text)]), result.off) if result else []
    all_off = all(message.off for message in messages if message.role == "assistant")
    end = _flagged([TARGET_TOKENS[ASSISTANT_END]], messages[-1].off) if messages[-1].role == "assistant" else []
    return [*_flagged([CONTEXT_TOKENS[ASSISTANT_START]], all_off), *segments, *end]


def _with_results(messages: list[Message]) -> list[tuple[Message, list[Message]]]:
    """Each message of the assistant with the results of tools behind it."""
    grouped: list[tuple[Message, list[Message]]] = []
    for message in messages:
        if message.role == "assistant":
            grouped.append((message, []))
        else:
            grouped[-1][1].append(message)
    return grouped


def _parts_segments(parts: list[Part]) -> list[Segment]:
    segments = []
    for kind, text in parts:
        if kind == "text":
            segments.append(Segment(text, False, Kind.ASSISTANT))
        elif kind == "python":
            segments += [TARGET_TOKENS[PYTHON_START], Segment(text, False, Kind.ASSISTANT), TARGET_TOKENS[PYTHON_END]]
        else:
            segments += [CONTEXT_TOKENS[OUTPUT_START], Segment(text, False, Kind.PROMPT), CONTEXT_TOKENS[OUTPUT_END]]
    return segments


def _flagged(segments: list[Segment], off: bool) -> list[Segment]:
    return [segment._replace(kind=segment.kind | Kind.OFF) for segment in segments] if off else segments
