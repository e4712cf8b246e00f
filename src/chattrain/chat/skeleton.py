"""Where the texts of a conversation stand in what a chat template renders of it.

The template is rendered twice: with the conversation, and with a placeholder for each of its texts. The second rendering, the
skeleton, shows which text comes from the template and which from a message. Filling the texts into it must give the first, or the
conversation is refused. So texts are found wherever a template puts them, also where it moves or repeats them or leaves them out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, NamedTuple, Protocol

from chattrain.chat.format import Malformed
from chattrain.chat.messages import Call, Conversation, Message

TAG = r"</?[a-zA-Z_]\w*>"  # such as <think>


class Piece(NamedTuple):
    """A text that has a placeholder: of a message, without the space around it."""

    text: str
    message: int  # index in the conversation
    field: str
    verbatim: bool = False  # is a JSON text itself, so that JSON may not quote it
    supervised: bool = True  # False: the output of a tool within the assistant's content
    is_thought: bool = False


class Form(NamedTuple):
    """One of the ways in which templates want the same conversation."""

    empty_content: str  # beside calls: given, "" or null
    arguments: str  # of calls: given, text, object


FORMS = [Form(empty, arguments) for arguments in ("given", "object", "text") for empty in ("given", "", "null")]


class Write(Protocol):
    """Writes a text of a message into what the template is given."""

    def __call__(self, text: str, message: int, field: str, verbatim: bool = False) -> str: ...


def as_given(text: str, message: int, field: str, verbatim: bool = False) -> str:
    return text


@dataclass
class Placeholders:
    """Writes placeholders for texts, and collects what they stand for.

    Space at the ends of a text stays, so that a template strips it as in the text itself. So do tags that the template names,
    such as `<think>`: it may look for them.
    """

    mark: str  # a word that is in no text of the conversation
    tags: re.Pattern[str]
    pieces: list[Piece] = field(default_factory=list)

    def write(self, text: str, message: int, field: str, verbatim: bool = False) -> str:
        pieces = [Piece(text, message, field, verbatim)]
        return text if not text.strip() else self._cut(pieces, tags=field != "tool_calls")

    def content(self, message: Message, i: int, must_be_found: bool) -> str:
        """The content of message i. `must_be_found`: with a placeholder even if it is empty."""
        pieces = [Piece(text, i, "content", False, supervised) for text, supervised in content_parts(message)]
        joined = "".join(piece.text for piece in pieces)
        if not joined.strip():
            return joined + (self._placeholder(Piece("", i, "content")) if must_be_found else "")
        return self._cut(pieces, tags=True, end_of_thought=joined.rfind("</think>") if message.role == "assistant" else -1)

    def _cut(self, pieces: list[Piece], tags: bool, end_of_thought: int = -1) -> str:
        """Placeholders of pieces that follow each other."""
        chunks = []  # (piece, text, does a tag or an end stand before it, behind it)
        for piece in pieces:
            chunks += [(piece, chunk) for chunk in (self.tags.split(piece.text) if tags else [piece.text]) if chunk]
        written, at = [], 0
        for k, (piece, chunk) in enumerate(chunks):
            begins = k == 0 or self._is_tag(chunks[k - 1][1], tags)
            ends = k == len(chunks) - 1 or self._is_tag(chunks[k + 1][1], tags)
            if self._is_tag(chunk, tags) or not chunk.strip():
                written.append(chunk)
            else:
                core = chunk.lstrip() if begins else chunk
                lead = chunk[: len(chunk) - len(core)]
                core = core.rstrip() if ends else core
                trail = chunk[len(lead) + len(core) :]
                written += [lead, self._placeholder(piece._replace(text=core, is_thought=at < end_of_thought)), trail]
            at += len(chunk)
        return "".join(written)

    def _is_tag(self, chunk: str, tags: bool) -> bool:
        return tags and self.tags.fullmatch(chunk) is not None

    def _placeholder(self, piece: Piece) -> str:
        self.pieces.append(piece)
        return f"{self.mark}{len(self.pieces) - 1}x"


def tags_of(template: str) -> re.Pattern[str]:
    """A pattern, with one group, for the tags that a template names."""
    named = sorted(set(re.findall(TAG, template)) | {"<think>", "</think>"})
    return re.compile("(" + "|".join(map(re.escape, named)) + ")")


def mark_for(texts: str) -> str:
    """A word that is not in the texts. It is of letters, so that JSON and quoting keep it."""
    mark = "Zqxj"
    while mark in texts:
        mark += "qz"
    return mark


def content_parts(message: Message) -> list[tuple[str, bool]]:
    """The content as (text, supervised) parts. Python calls are written as in GSM8K: `<<12/60=0.2>>`."""
    parts: list[tuple[str, bool]] = []
    for part, following in zip_longest(message.parts, message.parts[1:]):
        if part.kind == "text":
            parts.append((part.text, True))
        elif part.kind == "python":
            answered = following is not None and following.kind == "python_output"
            parts.append((f"<<{part.text}=" if answered else f"<<{part.text}>>", True))
        else:
            parts += [(part.text, False), (">>", True)]
    return parts


def as_dicts(
    talk: Conversation, form: Form, thought_field: str | None, placeholders: Placeholders | None
) -> list[dict[str, Any]]:
    """The messages as templates want them, with placeholders for their texts, or without. `thought_field`: None: as given."""
    write: Write = placeholders.write if placeholders else as_given
    dicts = []
    for i, message in enumerate(talk.messages):
        content: str | None = "".join(text for text, _ in content_parts(message))
        if not content and message.calls:
            content = None if form.empty_content == "null" or (form.empty_content == "given" and message.content_is_null) else ""
        elif placeholders:
            content = placeholders.content(message, i, must_be_found=not message.calls and not message.thought)
        given: dict[str, Any] = {"role": message.role, "content": content}
        if message.thought:
            name = thought_field or message.thought_field
            given[name] = write(message.thought, i, message.thought_field)
        if message.calls:
            given["tool_calls"] = [_call(call, i, form, write) for call in message.calls]
        dicts.append({**given, **message.links, **message.rest})
    return dicts


def _call(call: Call, i: int, form: Form, write: Write) -> dict[str, Any]:
    arguments: Any = {"given": call.arguments, "text": call.as_text, "object": call.as_object}[form.arguments]

    def written(value: Any) -> Any:
        if isinstance(value, str):
            return write(value, i, "tool_calls")
        if isinstance(value, dict):
            return {write(key, i, "tool_calls"): written(member) for key, member in value.items()}
        return [written(item) for item in value] if isinstance(value, list) else value

    arguments = write(arguments, i, "tool_calls", verbatim=True) if isinstance(arguments, str) else written(arguments)
    function = {"name": write(call.name, i, "tool_calls"), "arguments": arguments}
    return {**({"id": call.id} if call.id is not None else {}), "type": "function", "function": function}


def locate(skeleton: str, placeholders: Placeholders, whole: str, talk: Conversation) -> list[tuple[int, int] | None]:
    """Begin and end, in the whole rendering, of the first place of each piece; None: the template leaves it out.

    Raises Malformed, which names the message, if the pieces do not give the whole rendering, filled into the skeleton.
    """
    found = re.split(re.escape(placeholders.mark) + r"(\d+)x", skeleton)
    literals, numbers = found[::2], [int(number) for number in found[1::2]]
    pieces = [placeholders.pieces[number] for number in numbers]
    spans: list[tuple[int, int] | None] = [None] * len(placeholders.pieces)
    at = len(literals[0])
    if not whole.startswith(literals[0]):
        raise _changed(talk, pieces[0] if pieces else placeholders.pieces[0])
    for k, (number, piece) in enumerate(zip(numbers, pieces, strict=True)):
        literal, spelled = literals[k + 1], list(spellings(piece.text, piece.verbatim))
        text = next((t for t in spelled if whole.startswith(t, at) and whole.startswith(literal, at + len(t))), None)
        if text is None:  # the text differs, or what the template writes behind it, which may depend on the next one
            only_behind = any(whole.startswith(t, at) for t in spelled) and k + 1 < len(pieces)
            raise _changed(talk, pieces[k + 1] if only_behind else piece)
        if spans[number] is None:
            spans[number] = (at, at + len(text))
        at += len(text) + len(literal)
    if at != len(whole):
        raise Malformed(f"the chat template adds text after the last turn: {whole[at:]!r:.200}")
    return spans


def spellings(text: str, verbatim: bool = False) -> Iterator[str]:
    """The ways in which a template may write a text: as it is, or as JSON."""
    yield text
    if not verbatim:
        yield json.dumps(text, ensure_ascii=False)[1:-1]
        yield json.dumps(text)[1:-1]


def _changed(talk: Conversation, piece: Piece) -> Malformed:
    return Malformed(f"the chat template changes {talk.messages[piece.message]}, so it cannot be located: {piece.text!r:.200}")
