"""Text that every tokenizer can encode."""

from __future__ import annotations


def well_formed(text: str) -> str:
    """The text with halves of characters (lone surrogates, which JSON escapes can hold) replaced by U+FFFD, as tiktoken does.

    >>> well_formed("a \\ud83d b"), well_formed("\\ud83d\\ude42")
    ('a � b', '🙂')
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
