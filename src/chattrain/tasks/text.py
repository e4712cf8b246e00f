"""Plain text documents: any data set with a `text` column."""

from chattrain.chat import Malformed, Piece, render_document


def document(row: dict) -> list[Piece]:
    """BOS and the text. Raises Malformed for a row without text.

    >>> [piece.text for piece in document({"text": "Once upon a time"})]
    ['<|bos|>', 'Once upon a time']
    """
    if not isinstance(row["text"], str) or not row["text"]:
        raise Malformed("`text` is empty or no string")
    return render_document(row["text"])
