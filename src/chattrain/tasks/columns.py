"""What several schemas share: columns that hold messages, and characters that no tokenizer takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from chattrain.chat import Malformed

OF_MESSAGES = ("messages", "conversations", "conversation", "prompt", "completion")  # columns that may hold a list of messages


def with_lists(record: dict) -> dict:
    """The record with each struct of lists as the list of messages that it was. `datasets` writes `Sequence({...})` as a struct.

    >>> with_lists({"id": 7, "messages": {"role": ["user", "assistant"], "content": ["Hi", "Yo"]}})
    {'id': 7, 'messages': [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Yo'}]}
    """
    found = {name: _as_list(record[name]) for name in OF_MESSAGES if isinstance(record.get(name), dict)}
    return {**record, **found} if found else record


def _as_list(value: dict) -> Any:
    columns = list(value.values())
    if not {"role", "from"} & value.keys() or not all(isinstance(c, list) for c in columns) or len({len(c) for c in columns}) > 1:
        return value
    return [dict(zip(value, fields, strict=True)) for fields in zip(*columns, strict=True)]


def conversation(messages: list[dict], record: dict) -> dict:
    """A conversation of the messages, with the record's column `system` before them and its `tools` beside them.

    >>> conversation([{"role": "user", "content": "Hi"}], {"system": "Be brief."})
    {'messages': [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hi'}]}
    """
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise Malformed("`tools` is a text that is not JSON") from None
    return {"messages": with_system(messages, record), **({"tools": tools} if tools else {})}


def with_system(messages: list[dict], record: dict) -> list[dict]:
    """The messages behind the record's column `system`, if it has one."""
    system, first = record.get("system"), messages[0]
    if not system:
        return messages
    if not isinstance(system, str):
        raise Malformed(f"`system` is {kind_of(system)}, not a text")
    if not isinstance(first, dict) or first.get("role") not in ("system", "developer"):
        return [{"role": "system", "content": system}, *messages]
    if first.get("content") != system:
        raise Malformed("the column `system` and the first turn are two system messages")
    return messages


def text_of(record: dict, column: str) -> str:
    """The text of a column. Raises KeyError if there is none, Malformed if it is empty or no text."""
    value = record[column]
    if not isinstance(value, str) or not value.strip():
        raise Malformed(f"`{column}` is {kind_of(value)}, not a text")
    return value


def kind_of(value: Any) -> str:
    """
    >>> kind_of(None), kind_of(""), kind_of([]), kind_of({"role": [], "content": []}), kind_of(2)
    ('null', 'empty', 'empty', 'an object of role, content', 'a number')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, dict) and value:
        return f"an object of {', '.join(map(str, list(value)[:6]))}"
    if not value or (isinstance(value, str) and not value.strip()):
        return "empty"
    return {str: "a text", list: "a list"}.get(type(value), type(value).__name__)


def check_characters(document: dict) -> None:
    """Raises Malformed for a text that holds half of a surrogate pair, which UTF-8 cannot write, or NUL."""
    messages = document.get("messages")
    parts = [(f"message {i}", m) for i, m in enumerate(messages)] if isinstance(messages, list) else [("the text", document)]
    for place, part in [*parts, *([("`tools`", document["tools"])] if "tools" in document else [])]:
        for text in _texts(part):
            if "\0" in text:
                raise Malformed(f"{place} holds a NUL character")
            if not text.isascii() and (half := _surrogate(text)):
                raise Malformed(f"{place} holds {half}, half of a surrogate pair and no character")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _surrogate(text: str) -> str | None:
    """The first surrogate of a text as JSON escapes it.

    >>> _surrogate("cut \\ud83d"), _surrogate("ä 🙂")
    ('\\\\ud83d', None)
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(text[error.start]):04x}"
    return None
