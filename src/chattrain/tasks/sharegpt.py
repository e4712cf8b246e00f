"""ShareGPT's conversations: a column `conversations` of turns with `from` and `value`, as LLaMA-Factory has them."""

from __future__ import annotations

import json
from typing import Any

from chattrain.chat import Malformed
from chattrain.tasks import columns

COLUMNS = ("conversations", "conversation", "messages")  # that may hold the turns; the first with a value does
ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response"), "tool"),
    **{role: role for role in ("system", "developer")},
}


def conversation(record: dict) -> dict:
    """The conversation of a record; a column `system` comes first, `tools` beside it. Other fields of a turn are kept.

    A turn may be named by `role` and `content` as well, and the column `conversation` or `messages`.

    >>> conversation({"system": "Be brief.", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]})
    {'messages': [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hi'}, \
{'role': 'assistant', 'content': 'Yo'}]}
    >>> _message({"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'}, 0)["tool_calls"]
    [{'type': 'function', 'function': {'name': 'add', 'arguments': {'a': 1}}}]
    """
    present = [name for name in COLUMNS if name in record] or list(COLUMNS)
    column = next((name for name in present if record.get(name) is not None), present[0])
    turns = record[column]
    if not isinstance(turns, list) or not turns:
        raise Malformed(f"`{column}` is {columns.kind_of(turns)}, not a list of turns")
    return columns.conversation([_message(turn, i) for i, turn in enumerate(turns)], record)


def _message(turn: Any, i: int) -> dict:
    if not isinstance(turn, dict):
        raise Malformed(f"turn {i} is {columns.kind_of(turn)}, not an object of from and value")
    fields = dict(turn)
    names, contents = ([fields.pop(key, None) for key in keys] for keys in (("from", "role"), ("value", "content")))
    name = names[0] or names[1]
    content = contents[1] if contents[0] is None else contents[0]
    if contents[1] not in (None, content):
        raise Malformed(f"turn {i} has two texts, in `value` and in `content`; keep one")
    if name is None:
        raise Malformed(f"turn {i} is {columns.kind_of(turn)}, without `from`")
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise Malformed(f"turn {i} is from {name!r}; known are {', '.join(ROLES)}")
    if name.lower() == "function_call":
        return {**fields, "role": role, "content": None, "tool_calls": _calls(content, i)}
    if content is None and not fields.get("tool_calls"):
        raise Malformed(f"turn {i} (from {name}) has no `value`")
    return {**fields, "role": role, "content": content}


def _calls(value: Any, i: int) -> list[dict]:
    """The calls of a turn from `function_call`: an object of name and arguments, or several in a list, mostly as JSON text."""
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise Malformed(f"turn {i} (from function_call) is not JSON") from None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise Malformed(f"turn {i} (from function_call) needs `name` and `arguments`")
    return [{"type": "function", "function": call} for call in calls]
