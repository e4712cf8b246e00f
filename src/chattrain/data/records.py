"""The records of one source, by index; a malformed one is refused, or left out and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import numpy as np

from chattrain.chat import Malformed
from chattrain.data.malformed import MalformedRows
from chattrain.data.places import Places
from chattrain.errors import UserError
from chattrain.tasks.schemas import way_out

SAMPLE = 1000  # records that are tried before a message says that leaving some out leaves others

T = TypeVar("T")


class Table(Protocol):
    """All records of a source, by index. Raises Malformed for what cannot be read as a record."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> dict: ...


class Records:
    """The selected records of one source. `indices` (records,) int64: their indices in the table; None: all of it.

    The others are for messages: what the source is called, its path, its schema, and where each record of the table is.
    """

    def __init__(
        self,
        table: Table,
        indices: np.ndarray | None = None,
        label: str = "",
        path: str = "",
        schema: str = "",
        places: Places | None = None,
    ):
        self.table, self.label, self.path, self.schema = table, label, path, schema
        self.indices = np.arange(len(table)) if indices is None else indices
        self.places = places or Places()

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, start: int, stop: int) -> Iterator[tuple[int, dict]]:
        """Selected records start to stop, each as (index in the table, record). Raises UserError for what is no record."""
        return self.convert(lambda record: record, start, stop)

    def convert(
        self, convert: Callable[[dict], T], start: int = 0, stop: int | None = None, malformed: MalformedRows | None = None
    ) -> Iterator[tuple[int, T]]:
        """Selected records start to stop, each as (index in the table, what `convert` makes of it).

        One that cannot be read, or for which `convert` raises Malformed, is added to `malformed`; None: raises UserError with its
        place, the reason and the way out.
        """
        for i in self.indices[start:stop].tolist():
            try:
                converted = convert(self.table[i])
            except Malformed as error:
                if malformed is None:
                    raise self._refusal(i, error, convert) from None
                malformed.add(self.places.short(i), str(error))
            else:
                yield i, converted

    def _refusal(self, i: int, error: Malformed, convert: Callable[[dict], Any]) -> UserError:
        """The message for a malformed record. It offers to leave such rows out only where others are left."""
        advice = "mend the row, or leave such rows out with data.on_malformed=skip"
        if next(self.convert(convert, 0, SAMPLE, MalformedRows()), None) is None:
            advice = self._way_out()
        return UserError(f"{self.label}, {self.places.full(i)}: {error}; {advice}")

    def nothing_usable(self, malformed: MalformedRows) -> UserError:
        """The message where every record is malformed."""
        reasons = malformed.first()
        return UserError(f"{self.label} ({self.path}) has no usable row: {reasons}; {self._way_out()}")

    def _way_out(self) -> str:
        """What to do where no record can be used."""
        _, first = next(self.convert(lambda record: record, 0, SAMPLE, MalformedRows()), (0, None))
        return "none of the first rows can be read: check the file" if first is None else way_out(first, self.schema)
