"""Where records are, as messages name them: a line of JSON Lines, from 1 as an editor counts, else a row, counted from 0."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Places:
    """The places of all records of a source.

    >>> places = Places(["data/a.jsonl", "data/b.jsonl"], [0, 2], np.array([1, 3, 1, 2]))
    >>> places.full(1), places.short(3), Places(["t.parquet"], [0]).short(3), Places().full(7)
    ('data/a.jsonl line 3', 'b.jsonl line 2', 'row 3', 'row 7 (counted from 0)')
    """

    files: list[str] | None = None  # paths, in the order of the records; None: the records are in no file
    starts: list[int] | None = None  # index of the first record of each file
    lines: np.ndarray | None = None  # (records,) int64, the line of each; None: they are counted as rows

    def full(self, i: int) -> str:
        """With the path of the file."""
        place = f"{self.files[self._file(i)]} {self._number(i)}" if self.files else self._number(i)
        return place if self.lines is not None else f"{place} (counted from 0)"

    def short(self, i: int) -> str:
        """With the name of the file if the source has several."""
        several = self.files and len(self.files) > 1
        return f"{Path(self.files[self._file(i)]).name} {self._number(i)}" if self.files and several else self._number(i)

    def _file(self, i: int) -> int:
        return int(np.searchsorted(np.array(self.starts), i, side="right")) - 1

    def _number(self, i: int) -> str:
        if self.lines is not None:
            return f"line {self.lines[i]}"
        return f"row {i - self.starts[self._file(i)] if self.starts else i}"

    def save(self, folder: Path) -> None:
        (folder / "places.json").write_text(json.dumps([self.files, self.starts]))
        if self.lines is not None:
            np.save(folder / "lines.npy", self.lines)

    @classmethod
    def load(cls, folder: Path) -> Places:
        lines = folder / "lines.npy"
        files, starts = json.loads((folder / "places.json").read_text())
        return cls(files, starts, np.load(lines, mmap_mode="r") if lines.is_file() else None)
