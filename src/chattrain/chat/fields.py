"""The fields of messages as data sets have them: null padding, flags that take a message out of the loss, fields to ignore."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from chattrain.chat.format import Malformed
from chattrain.tokenizer.unicode import well_formed

FLAGS = ("weight", "train", "training", "trainable")  # 0 or false: no loss on this message
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # names of the field that holds a thought


def clean(value: Any) -> Any:
    """The value without null padding, as Parquet adds it where other rows have a field: a member of an object that is null is
    absent, and an object whose members are all null is null. Halves of characters are replaced.

    >>> clean({"city": "Oslo", "unit": None, "near": {"lat": None}, "rows": [1, None], "more": {}})
    {'city': 'Oslo', 'rows': [1, None], 'more': {}}
    """
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, dict):
        members = {key: clean(member) for key, member in value.items()}
        kept = {clean(key): member for key, member in members.items() if member is not None}
        return kept if kept or not value else None
    return [clean(item) for item in value] if isinstance(value, list) else value


def has_content(value: Any) -> bool:
    """Whether a cleaned value says anything. False and 0 do."""
    return value is not None and value not in ("", [], {})


def is_off(i: int, message: dict[str, Any]) -> bool:
    """Whether a flag takes message i out of the loss. Raises Malformed for a flag that is neither 0 nor 1."""
    given = {flag: message[flag] for flag in FLAGS if message.get(flag) is not None}
    for flag, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise Malformed(
                f"message {i}: {flag}={value!r} must be 0 or 1 (false or true): no loss on the message, or loss as usual; "
                f"data.ignore=[{flag}] leaves the flag out"
            )
    return not all(given.values())


def without_fields(document: dict[str, Any], fields: Sequence[str], left_out: Counter[str]) -> dict[str, Any]:
    """The conversation without these fields of its messages, or its `tools`. Those that had content are counted in `left_out`.

    >>> left_out = Counter()
    >>> without_fields({"messages": [{"role": "user", "content": "Hi", "name": "Ann"}]}, ["name"], left_out), dict(left_out)
    ({'messages': [{'role': 'user', 'content': 'Hi'}]}, {'name': 1})
    """
    if not fields or not isinstance(document.get("messages"), list):
        return document

    def kept(given: dict[str, Any]) -> dict[str, Any]:
        left_out.update(field for field in fields if has_content(clean(given.get(field))))
        return {key: value for key, value in given.items() if key not in fields}

    messages = [kept(message) if isinstance(message, dict) else message for message in document["messages"]]
    return {**kept({key: value for key, value in document.items() if key != "messages"}), "messages": messages}


def refused_field(message: str, field: str, value: Any, where: str) -> Malformed:
    """That a field would be lost. `where`: what has no place for it."""
    return Malformed(
        f"{message}: {where} has no place for `{field}` ({value!r:.80}), so it would not be trained on; take it out of the data, "
        f"or let it be left out with data.ignore=[{field}]"
    )
