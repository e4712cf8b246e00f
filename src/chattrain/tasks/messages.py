"""Data sets that hold conversations in a column `messages`, such as smol-smoltalk."""


def conversation(record: dict) -> dict:
    """The conversation of a record; other columns are dropped.

    >>> conversation({"messages": [{"role": "user", "content": "hi"}], "source": "x"})
    {'messages': [{'role': 'user', 'content': 'hi'}]}
    """
    return {"messages": record["messages"]}
