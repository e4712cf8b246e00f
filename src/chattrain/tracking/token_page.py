"""Rows of tokens as one page of HTML, which loads nothing: a token's colour is its loss weight, and hovering tells the rest."""

from __future__ import annotations

from html import escape

from chattrain.tracking import page
from chattrain.tracking.tokens import NEWLINE, Row, Token

CSS = """
.tokens { font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; padding: .6em 0; }
.tokens bdi { direction: ltr; border-radius: 2px; padding: .1em 0; } .tokens bdi:hover { outline: 1px solid currentColor; }
.w1 { background: #2f9e6e40; border-bottom: 2px solid #2f9e6e; }
.wp { background: #d9a40030; border-bottom: 2px dotted #b7791f; }
.sp { font-weight: 700; color: #7048c8; } .part { opacity: .45; } .pad { opacity: .6; }
.border { display: inline-block; border-left: 3px solid #d1453b; margin: 0 .35em; height: 1.1em; vertical-align: middle; }
.note { opacity: .75; font-size: .9em; margin: 0; } .ids td { padding-right: 1.2em; font-family: monospace; }
.bar { background: #3b82c4; height: .8em; display: inline-block; min-width: 1px; }
@media (prefers-color-scheme: dark) { .sp { color: #b79cf5; } .w1 { background: #2f9e6e55; } .wp { background: #d9a40045; } }
@media print { .sp { color: #7048c8; } }
"""


def write(
    title: str,
    facts: dict[str, object],
    rows: list[Row],
    with_ids: bool,
    mixture: list[list[str]],
    lengths: dict[str, int],
    found: list[str],
) -> str:
    """The page: the rows, then the table of the mixture (its first line is a header), the histogram of lengths, the audit's
    findings."""
    shown = [part for row in rows for part in (_row(row), _ids(row) if with_ids else "")]
    audit = "".join(f"<li>{escape(line)}</li>" for line in found)
    parts = [
        f"<style>{CSS}</style>",
        page.facts(facts),
        f'<p class="note">{LEGEND}</p>',
        *shown,
        "<h2>An epoch</h2>",
        page.grid(mixture[0], mixture[1:]),
        _bars("Tokens of a document", lengths),
        f"<h2>Audit</h2><ul>{audit}</ul>",
    ]
    return page.page(title, escape(title), parts)


LEGEND = (
    '<span class="w1">Loss weight 1</span>, <span class="wp">a weight between 0 and 1</span>, and context, without a loss. '
    '<span class="sp">Special tokens</span> are bold; text that only looks like one is not. <span class="border"></span> stands '
    "between documents. Hover over a token for its id, position, document, source and weight."
)


def _row(row: Row) -> str:
    borders, out = row.borders(), []
    for i, token in enumerate(row.tokens):
        if i in borders:
            out.append('<span class="border"></span>')
        out.append(_token(row, token))
    end = f'<span class="pad">\n… then {row.padding:,} of padding ({escape(row.padding_text)})</span>' if row.padding else ""
    heading = f"<h2>row {row.number}: {escape(row.name)}</h2>"
    return f'{heading}\n<p class="note">{escape(row.batch)}</p>\n<div class="tokens" dir="ltr">{"".join(out)}{end}</div>'


def _token(row: Row, token: Token) -> str:
    kinds = ["w1" if token.weight == 1 else "wp" if token.weight else "", "sp" * token.special, "part" * (not token.text)]
    names = " ".join(kind for kind in kinds if kind)
    attributes = f' class="{names}"' if names else ""
    return f'<bdi{attributes} title="{escape(_about(row, token))}">{escape(token.text) or "◌"}</bdi>'


def _about(row: Row, token: Token) -> str:
    """What is said of a token where the pointer is on it."""
    lines = [
        f"id {token.id}"
        + (", a special token" if token.special else "")
        + ("" if token.text else ", rest of the character before"),
        f"index {token.index} of the row" + ("" if token.is_input else ", a target only"),
    ]
    if token.position is not None:
        lines.append(f"position {token.position} of its document")
    if token.document is not None:
        document = row.documents[token.document]
        lines += [f"document {token.document}: {document.name}", f"source {document.source}"]
    lines.append(f"weight {token.weight:g}")
    return "\n".join(lines)


def _ids(row: Row) -> str:
    header = ["index", "document", "position", "id", "weight", "token"]
    rows = [
        [
            f"{token.index}{'' if token.is_input else '+'}",
            "?" if token.document is None else str(token.document),
            "?" if token.position is None else str(token.position),
            str(token.id),
            f"{token.weight:g}",
            token.text.replace(f"{NEWLINE}\n", NEWLINE),
        ]
        for token in row.tokens
    ]
    return f'<details><summary>ids</summary><div class="ids">{page.grid(header, rows)}</div></details>'


def _bars(title: str, counts: dict[str, int]) -> str:
    """A histogram as a table with bars."""
    most, cells = max(counts.values()), ""
    for name, count in counts.items():
        bar = f'<span class="bar" style="width:{20 * count / most:.2f}em"></span>'
        cells += f"<tr><th>{escape(name)}</th><td>{count:,}</td><td>{bar}</td></tr>"
    return f"<h2>{escape(title)}</h2><table>{cells}</table>"
