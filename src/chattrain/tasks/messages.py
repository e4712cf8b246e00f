"""Conversations as they are: smol-smoltalk, identity conversations, any data set with a `messages` column."""


def conversation(row: dict) -> dict:
    """Row `{"messages": [...]}` to a conversation; parts of other columns are left behind.

    >>> conversation({"messages": [{"role": "user", "content": "hi"}], "source": "x"})
    {'messages': [{'role': 'user', 'content': 'hi'}]}
    """
    return {"messages": row["messages"]}
