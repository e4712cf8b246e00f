"""Columns `prompt` and `completion`, each a text or a list of messages: the prompt-completion form of TRL."""

from __future__ import annotations

from typing import Any

from chattrain.chat import Malformed
from chattrain.tasks import columns


def conversation(record: dict) -> dict:
    """A text as prompt is the user's turn, a text as completion the reply. Lists of messages follow each other.

    Only the completion is trained on, as in TRL: replies within the prompt weigh 0.

    >>> conversation({"prompt": "2 + 2?", "completion": "4"})["messages"]
    [{'role': 'user', 'content': '2 + 2?'}, {'role': 'assistant', 'content': '4'}]
    >>> conversation({"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Yo"}]})
    {'messages': [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Yo'}]}
    """
    prompt, completion = (_messages(record, *part) for part in (("prompt", "user"), ("completion", "assistant")))
    context = [{**m, "weight": 0} if m.get("role") == "assistant" else m for m in prompt]
    return columns.conversation([*context, *completion], record)


def _messages(record: dict, column: str, role: str) -> list[dict[str, Any]]:
    value = record[column]
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list):
        return [{"role": role, "content": columns.text_of(record, column)}]
    if not value or not all(isinstance(message, dict) for message in value):
        raise Malformed(f"`{column}` is {columns.kind_of(record[column])}, not a text or a list of messages")
    return value
