"""A cache of few results, for methods: functools.lru_cache would hold the object, which holds the cache, and neither would be
freed before a full garbage collection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """The results for the last `most` numbers that were asked for first."""

    def __init__(self, most: int):
        self.most = most
        self._kept: dict[int, T] = {}

    def get(self, number: int, compute: Callable[[int], T]) -> T:
        """
        >>> squares = Recent(2)
        >>> [squares.get(n, lambda n: n * n) for n in (1, 2, 3)], squares.get(3, lambda n: 0), squares.get(1, lambda n: 0)
        ([1, 4, 9], 9, 0)
        """
        found = self._kept.get(number)
        if found is None:
            found = self._kept[number] = compute(number)
            for old in list(self._kept)[: -self.most]:
                self._kept.pop(old, None)
        return found
