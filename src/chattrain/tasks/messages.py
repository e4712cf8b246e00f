"""Data sets that hold conversations in a column `messages`, such as smol-smoltalk."""

from chattrain.chat import Malformed
from chattrain.tasks import columns


def conversation(record: dict) -> dict:
    """The conversation of a record, with its `tools` and behind its `system` if it has any; other columns are dropped.

    >>> conversation({"messages": [{"role": "user", "content": "hi"}], "source": "x"})
    {'messages': [{'role': 'user', 'content': 'hi'}]}
    """
    tools = {"tools": record["tools"]} if record.get("tools") is not None else {}
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise Malformed(f"`messages` is {columns.kind_of(messages)}, not a non-empty list of messages")
    return {"messages": columns.with_system(messages, record), **tools}
