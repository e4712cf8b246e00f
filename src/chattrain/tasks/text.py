"""Plain text documents: any data set with a `text` column."""

from chattrain.chat import Malformed


def text(row: dict) -> dict:
    """Row to `{"text": ...}`. Raises Malformed for a row without text.

    >>> text({"text": "Once upon a time", "url": "x"})
    {'text': 'Once upon a time'}
    """
    if not isinstance(row["text"], str) or not row["text"]:
        raise Malformed("`text` is empty or no string")
    return {"text": row["text"]}
