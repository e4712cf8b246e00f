"""Malformed records: refused with their place, their reason and a way out, or left out and counted by reason."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

SHOWN = 5  # reasons that a message lists
WIDTH = 120  # characters of a reason that are shown


@dataclass
class MalformedRows:
    """Records that were left out, by reason.

    >>> malformed = MalformedRows()
    >>> malformed.add("line 4", "not JSON: Expecting value (column 1)")
    >>> malformed.add("line 9", "not JSON: Extra data (column 7)")
    >>> malformed.add("line 12", "message 0 is from 'assistant' where 'user' must speak")
    >>> malformed.count, str(malformed)
    (3, "2 not JSON (first: line 4), 1 message 0 is from 'assistant' where 'user' must speak (line 12)")
    """

    reasons: dict[str, list] = field(default_factory=dict)  # reason without its numbers -> [records, first place, first reason]

    @property
    def count(self) -> int:
        return sum(count for count, _, _ in self.reasons.values())

    def add(self, place: str, reason: str, count: int = 1) -> None:
        group = self.reasons.setdefault(kind(reason), [0, place, reason])
        group[0] += count

    def merge(self, other: MalformedRows) -> None:
        for count, place, reason in other.reasons.values():
            self.add(place, reason, count)

    def by_reason(self) -> dict[str, int]:
        """The most frequent reasons and how many records each left out."""
        ordered = sorted(self.reasons.items(), key=lambda item: -item[1][0])
        return {name: group[0] for name, group in ordered[:SHOWN]} | (
            {"other reasons": sum(group[0] for _, group in ordered[SHOWN:])} if len(ordered) > SHOWN else {}
        )

    def first(self) -> str:
        """The first place and the whole reason of each kind."""
        return "; ".join(f"{place}: {reason[: 2 * WIDTH]}" for _, place, reason in list(self.reasons.values())[:SHOWN])

    def __str__(self) -> str:
        said = []
        for name, count in self.by_reason().items():
            _, place, reason = self.reasons.get(name, (count, "", name))
            shown = head(reason) if count == 1 else name
            said.append(f"{count} {shown}" + (f" ({'first: ' if count > 1 else ''}{place})" if place else ""))
        return ", ".join(said)


def head(reason: str) -> str:
    """A reason without its details.

    >>> head("not JSON: Extra data (column 7)"), head("message 3: an unknown part; known are text")
    ('not JSON', 'message 3: an unknown part')
    """
    found = re.match(r"((?:message|turn) \d+: )?[^:;]*", reason)
    return (found.group() if found else reason)[:WIDTH].strip()


def kind(reason: str) -> str:
    """What reasons that are counted together have in common.

    >>> kind("message 3 is from 'user' where 'assistant' must speak")
    "message N is from 'user' where 'assistant' must speak"
    """
    return re.sub(r"(?<![-\w])\d+", "N", head(reason))
