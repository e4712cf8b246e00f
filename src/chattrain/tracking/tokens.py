"""Rows of tokens as they are shown: what stands in them, and how text of strangers is made harmless."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import NamedTuple

NEWLINE, TAB = "⏎", "⇥"
SYMBOLS = {10: f"{NEWLINE}\n", 9: TAB, 127: "␡"} | {code: chr(0x2400 + code) for code in range(32) if code not in (9, 10)}


class Token(NamedTuple):
    """One token of a row, in reading order."""

    text: str  # made visible; "" where it completes a character that began in a token before
    id: int
    special: bool  # a special token, such as <|bos|>; text that only looks like one is not
    weight: float  # of it as a target; 0: it carries no loss
    index: int  # in the row's inputs; of a token that is a target only, that of the input before it, plus 1
    position: int | None  # in its document; None: not known
    document: int | None  # index in the row's documents; None: not known
    is_input: bool = True  # False: the last token of a document or a row, which is a target only


@dataclass(frozen=True)
class Document:
    """A document that a row holds, or a part of it."""

    name: str  # source and place, as `talk.jsonl line 7`
    source: str


@dataclass(frozen=True)
class Row:
    """A row of a batch. `batch`: which batch it is in, in words; `padding`: tokens of padding behind it."""

    number: int  # in its step, from 0
    name: str  # the places of its documents
    batch: str
    documents: list[Document]
    tokens: list[Token]
    padding: int
    padding_text: str

    @property
    def supervised(self) -> int:
        return sum(token.weight == 1 for token in self.tokens)

    def borders(self) -> set[int]:
        """Indices of the tokens that begin a document after another."""
        pairs = zip(self.tokens, self.tokens[1:], strict=False)
        return {i for i, (a, b) in enumerate(pairs, start=1) if a.document != b.document or _begins_again(a, b)}


def _begins_again(a: Token, b: Token) -> bool:
    return a.position is not None and b.position is not None and b.position < a.position


def visible(text: str) -> str:
    """The text with a sign for each character that a terminal or a page would act on or hide: controls, marks of direction,
    blanks of no width. A line break keeps its effect, after its sign.

    >>> visible("a\\tb\\x00\\x1b[31m\\u202ec")
    'a⇥b␀␛[31m\\\\u202ec'
    """
    return "".join(SYMBOLS.get(ord(c)) or (c if _is_harmless(c) else c.encode("unicode_escape").decode()) for c in text)


def _is_harmless(c: str) -> bool:
    """Is it no control, format, surrogate or break of lines and paragraphs? Joiners of letters and signs stay."""
    return unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") or c in "\u200c\u200d"
