"""Data sets that hold plain text in a column `text`."""

from chattrain.chat import Malformed


def text(record: dict) -> dict:
    """The text of a record as `{"text": ...}`. Raises Malformed if it is empty or not a string.

    >>> text({"text": "Once upon a time", "url": "x"})
    {'text': 'Once upon a time'}
    """
    if not isinstance(record["text"], str) or not record["text"]:
        raise Malformed("`text` is empty or no string")
    return {"text": record["text"]}
