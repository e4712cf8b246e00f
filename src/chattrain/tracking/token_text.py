"""Rows of tokens as text: with colours on a terminal, with marks elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rich.text import Text

from chattrain.tracking.tokens import Row, Token

BORDER = " ║ "
STYLES = {
    "supervised": "bold green",
    "between": "yellow",
    "context": "",
    "special": "reverse",
    "border": "bold magenta",
    "note": "dim",
}


def legend(prompt_weight: float, coloured: bool) -> str:
    """What the marks of the rows mean."""
    supervised, weighed = ("green", "yellow") if coloured else ("in [brackets]", "in (parentheses)")
    between = f" Those of loss weight {prompt_weight:g} are {weighed}." if prompt_weight else ""
    special = "Special tokens are reversed" if coloured else "Text that only looks like a special token has a backslash before it"
    return f"Supervised tokens, of loss weight 1, are {supervised}.{between} {special}; ║ stands between documents."


def plain(row: Row, special_names: list[str]) -> str:
    """The row's tokens, each with a loss in brackets, or in parentheses where it weighs less than 1."""
    parts: list[str] = []
    for weight, special, tokens in _runs(row):
        if weight is None:
            parts.append(BORDER)
        elif not weight:
            text = "".join(token.text for token in tokens)
            parts.append(text if special else _escaped(text, special_names))
        else:
            opening, closing = "[]" if weight == 1 else "()"
            texts = [token.text if special else _escaped(token.text, special_names) for token in tokens if token.text]
            bare = [text.rstrip("\n") for text in texts]  # a line break stands behind the closing mark
            parts += [f"{opening}{a}{closing}{text[len(a) :]}" for a, text in zip(bare, texts, strict=True)]
    return "".join(parts) + padding(row)


def coloured(row: Row) -> Text:
    """The same for a terminal."""
    text = Text()
    for weight, special, tokens in _runs(row):
        if weight is None:
            text.append(BORDER, STYLES["border"])
            continue
        style = STYLES["supervised" if weight == 1 else "between" if weight else "context"]
        text.append("".join(token.text for token in tokens), f"{style} {STYLES['special']}" if special else style)
    return text.append(padding(row), STYLES["note"])


def padding(row: Row) -> str:
    return f"\n… then {row.padding:,} of padding ({row.padding_text})" if row.padding else ""


def table(row: Row) -> list[str]:
    """A line a token: index in the row, document, position in it, id, weight, text. A `+` marks one that is a target only."""
    lines = [f"{'index':>6s} {'document':>8s} {'position':>8s} {'id':>7s} {'weight':>6s}  token"]
    for token in row.tokens:
        document, position = ("?" if value is None else str(value) for value in (token.document, token.position))
        index = f"{token.index}{'' if token.is_input else '+'}"
        kind = " (special)" if token.special else ""
        text = token.text.replace("\n", "") or "(of the character before)"
        lines.append(f"{index:>6s} {document:>8s} {position:>8s} {token.id:>7d} {token.weight:>6.3g}  {text}{kind}")
    return lines


def _runs(row: Row) -> Iterator[tuple[float | None, bool, list[Token]]]:
    """(weight, are they special, tokens) of tokens in a row that look alike; weight None: a border, and no token."""
    borders = row.borders()
    document = 0
    keyed = []
    for i, token in enumerate(row.tokens):
        document += i in borders
        weight = keyed[-1][0][1] if not token.text and keyed else token.weight  # a character has one colour
        keyed.append(((document, weight, token.special), token))
    last = 0
    for (document, weight, special), run in groupby(keyed, key=lambda pair: pair[0]):
        if document != last:
            yield None, False, []
        last = document
        yield weight, special, [token for _, token in run]


def _escaped(text: str, special_names: list[str]) -> str:
    """Ordinary text with a backslash before what looks like a special token."""
    for name in special_names:
        text = text.replace(name, f"\\{name}")
    return text
