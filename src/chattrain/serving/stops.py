"""Ends a text at the first of some stop texts, while it arrives."""

from __future__ import annotations


class StopTexts:
    """Holds back what may be the beginning of a stop text until it is known.

    >>> texts = StopTexts(("END", "\\n\\n"))
    >>> [texts.add(text) for text in ("a E", "N", "o", "b\\n", "\\nc")], texts.found
    (['a ', '', 'ENo', 'b', ''], True)
    """

    def __init__(self, stops: tuple[str, ...]):
        self.stops, self.found = stops, False
        self._held = ""

    def add(self, text: str, final: bool = False) -> str:
        """What may be shown now that `text` has arrived; final: nothing follows. '' once a stop text is found."""
        if self.found:
            return ""
        text, self._held = self._held + text, ""
        ends = [end for stop in self.stops if (end := text.find(stop)) >= 0]
        if ends:
            self.found = True
            return text[: min(ends)]
        held = 0 if final else max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text that are the beginning of the stop text."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
