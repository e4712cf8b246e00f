"""Data sets that hold conversations in a column `messages`, such as smol-smoltalk."""


def conversation(record: dict) -> dict:
    """The conversation of a record, with its `tools` if it has any; other columns are dropped.

    >>> conversation({"messages": [{"role": "user", "content": "hi"}], "source": "x"})
    {'messages': [{'role': 'user', 'content': 'hi'}]}
    """
    tools = {"tools": record["tools"]} if record.get("tools") is not None else {}
    return {"messages": record["messages"], **tools}
